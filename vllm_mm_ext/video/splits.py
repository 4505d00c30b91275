"""How a video is split, and what of that is remembered with its frames for later turns.

Recipes hold no pixels. NumPy arrays take no part in Python's garbage collection: frames whose memo
held their segments, which are views of them, would never be freed.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from vllm_mm_ext.media.payload import SampledFrames, Waveform
from vllm_mm_ext.video.segments import Segment, VideoSegment

# Ways in which one video is split that are remembered with its frames; requests choose them.
_MAX_SPLITS = 8


@dataclass(frozen=True)
class SplitVideo:
    """A user video as the prompt takes it.

    Attributes:
        segments: Its mm items; None where the client sent the name alone.
        names: Their names where the client named the video, else None each.
        metadata: vLLM's own words on the video.
        before, after: Tokens around all of them.
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
        part: Its place in the video.
        digest: Identity of its content.
        track: Its piece of the sound track.
    """

    part: Segment
    digest: str
    track: Waveform | None


@dataclass(frozen=True)
class SplitRecipe:
    """A split video without its pixels.

    Attributes:
        segments: The segments in their order.
        before, after: Tokens around all of them.
    """

    segments: tuple[SegmentRecipe, ...]
    before: tuple[int, ...]
    after: tuple[int, ...]

    def applied(self, frames: SampledFrames, metadata: dict[str, Any] | None) -> SplitVideo:
        """The split video; its segments are views of ``frames``."""
        pixels = np.asarray(frames)
        segments = [
            VideoSegment.of(pixels[one.part.frames], one.part, digest=one.digest, track=one.track)
            for one in self.segments
        ]
        names = [None] * len(segments)
        return SplitVideo(segments, names, metadata or {}, self.before, self.after)


def remembered(
    frames: SampledFrames, key: Hashable, make: Callable[[], SplitRecipe | None]
) -> SplitRecipe | None:
    """The recipe that the memo of ``frames`` has for ``key``, else what ``make`` returns.

    Args:
        frames: Of the whole video; a follow-up turn gets those of the first.
        key: All that decides the recipe beside the frames and their sound.
        make: Works the recipe out; None: the video is not split.
    """
    made: dict[Hashable, SplitRecipe | None] = frames.memo.setdefault("splits", {})
    recipe = made.pop(key) if key in made else make()
    made[key] = recipe
    while len(made) > _MAX_SPLITS:
        made.pop(next(iter(made)))
    return recipe
