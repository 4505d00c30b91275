"""How a video is split into segments, and recipes of splits that later requests use again.

The recipes are kept in the memo of the video's frames and hold no pixels. NumPy arrays take no part
in Python's garbage collection: if the memo of frames held segments, which are views of the frames,
neither would ever be freed.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from vllm_mm_ext.media.payload import SampledFrames, Waveform
from vllm_mm_ext.media.recorded import MediaRecord, RecordError, cells, piece_of, record_of
from vllm_mm_ext.video.segments import (
    Segment,
    VideoLayout,
    VideoSegment,
    segment_digest,
    segments_of,
)

# Recipes kept for one video. Requests can ask for any number of different splits.
_MAX_SPLITS = 8


@dataclass(frozen=True)
class SplitVideo:
    """A user video as the prompt takes it.

    Attributes:
        segments: The video's segments in order, each an mm item; each is None if the client sent
            only the video's ``uuid``.
        names: The ``uuid`` of each segment if the client named the video, else None for each.
        metadata: vLLM's metadata of the video.
        before, after: Prompt tokens before the first and after the last segment.
    """

    segments: Sequence[VideoSegment | None]
    names: Sequence[str | None]
    metadata: dict[str, Any]
    before: tuple[int, ...] = ()
    after: tuple[int, ...] = ()


@dataclass(frozen=True)
class SegmentRecipe:
    """A segment without its pixels.

    Attributes:
        part: The segment's place in its video.
        digest: Identity of the segment.
        track: The segment's piece of the sound track; None for silence.
    """

    part: Segment
    digest: str
    track: Waveform | None


@dataclass(frozen=True)
class SplitRecipe:
    """A split video without its pixels.

    Attributes:
        segments: The segments in order.
        before, after: Prompt tokens before the first and after the last segment.
    """

    segments: tuple[SegmentRecipe, ...]
    before: tuple[int, ...]
    after: tuple[int, ...]

    def applied(self, frames: SampledFrames, metadata: dict[str, Any] | None) -> SplitVideo:
        """The split of a video with these frames; its segments are views of ``frames``.

        Args:
            frames: The frames of the whole video.
            metadata: vLLM's metadata of the video.
        """
        pixels = np.asarray(frames)
        segments = [
            VideoSegment.of(pixels[one.part.frames], one.part, digest=one.digest, track=one.track)
            for one in self.segments
        ]
        if segments:
            segments[0].whole = frames
        if (record := record_of(frames)) is not None:
            for segment, recorded in zip(segments, record.segments, strict=True):
                segment.recorded = recorded
        names = [None] * len(segments)
        return SplitVideo(segments, names, metadata or {}, self.before, self.after)


def recorded_recipe(
    record: MediaRecord,
    frames: SampledFrames,
    layout: VideoLayout,
    target: int,
    around: tuple[tuple[int, ...], tuple[int, ...]],
) -> SplitRecipe:
    """The split of a video that another server has decoded and split.

    Args:
        record: What that server found.
        frames: The recorded frames, without pixels.
        layout: How the model lays the video out.
        target: Most tokens of a segment, as for ``cut_video``.
        around: Prompt tokens before the first and after the last segment.

    Raises:
        RecordError: This server splits the video otherwise.
    """

    def pixels(part: slice) -> npt.NDArray[np.uint8]:
        raise AssertionError(f"recorded frames have no pixels: {part}")

    try:
        known = [cells(one.kept) for one in record.segments]
        parts = segments_of(layout, frames.reduction, target, pixels, known)
    except ValueError as error:
        raise RecordError(str(error)) from error
    digests, segments = frames.frame_digests(), []
    for part, one in zip(parts, record.segments, strict=True):
        if (one.track is None) != (part.audio[0] == part.audio[1]):
            raise RecordError("the sound is in other segments")
        track = piece_of(one.track, frames)
        digest = segment_digest(part, frames.shape[1:3], digests[part.frames], track)
        segments.append(SegmentRecipe(part, digest, track))
    return SplitRecipe(tuple(segments), *around)


def remembered(
    frames: SampledFrames, key: Hashable, make: Callable[[], SplitRecipe | None]
) -> SplitRecipe | None:
    """The recipe that the memo of ``frames`` holds for ``key``, else the one that ``make`` returns.

    Args:
        frames: The frames of the whole video; follow-up requests get the same frames.
        key: Everything besides the frames and their sound that decides the recipe.
        make: Computes the recipe; None means that the video is not split.
    """
    made: dict[Hashable, SplitRecipe | None] = frames.memo.setdefault("splits", {})
    recipe = made.pop(key) if key in made else make()
    made[key] = recipe
    while len(made) > _MAX_SPLITS:
        made.pop(next(iter(made)))
    return recipe
