"""One user video as consecutive segments, each an mm item of its own.

Pure: numpy only. ``adapters/processors/segment_processor.py`` hands the segments to vLLM; the
module of a model family beside it says how the model lays a video out in the prompt.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Self

import numpy as np
import numpy.typing as npt
from blake3 import blake3

from vllm_mm_ext.config.options import NO_REDUCTION, Reduction
from vllm_mm_ext.media.payload import SampledFrames, Waveform
from vllm_mm_ext.media.recorded import RecordedSegment
from vllm_mm_ext.video.cuts import (
    Cut,
    Run,
    cut_between,
    cut_silent,
    cut_sounding,
    cut_units,
    reduced_runs,
)
from vllm_mm_ext.video.scores import Blocks, frame_blocks, static_scores
from vllm_mm_ext.video.select import kept_cells

Indices = npt.NDArray[np.int64]


@dataclass(frozen=True)
class VideoShape:
    """Everything that decides how many tokens a video becomes and where in the prompt they stand.

    Attributes:
        frames: Number of frames delivered.
        height, width: Size of the delivered frames in pixels.
        times: Presentation time of each frame in seconds; None for the model's own assumption.
        step: Nominal seconds between frames sampled on a fixed grid of time from 0, else None.
        audio_samples: Samples of the sound track at the model's rate; 0 for a video without sound.
        reduction: The token reduction.
        metadata: vLLM's metadata of the video; None if there is none.
        final: The frames have the size at which the model takes them.
        unit_s: Seconds of a unit of a video that is still growing; None: it is whole.
    """

    frames: int
    height: int
    width: int
    times: tuple[float, ...] | None = None
    step: float | None = None
    audio_samples: int = 0
    reduction: Reduction = NO_REDUCTION
    metadata: dict[str, Any] | None = field(default=None, compare=False)
    final: bool = True
    unit_s: float | None = None


@dataclass(frozen=True)
class Sound:
    """A video's sound as its model takes it.

    Attributes:
        runs: ``(visual, audio)`` tokens of the whole video in prompt order, before reduction.
        unit: Audio tokens of a window; the audio encoder attends within windows. 0: the video may
            be cut between any two runs, each of which is a group of merged grids or a window.
        least: Fewest audio tokens of a piece that the encoder encodes as it does within the whole.
    """

    runs: tuple[Run, ...]
    unit: int
    least: int = 1


@dataclass(frozen=True)
class VideoLayout:
    """How a model lays a video out in the prompt, before any reduction.

    Attributes:
        size: Height and width in pixels of the frames that the encoder takes.
        grids: Number of temporal grids.
        height, width: Tokens of a grid vertically and horizontally.
        temporal_patch: Frames per grid; the last grid may have fewer.
        positions: int64 ``[grids]`` temporal position of each grid, counted from the start of the
            video; None where positions follow from ``seconds_per_grid`` or the model has none.
        seconds_per_grid: Seconds between grids, as the model's processor would compute them.
        timestamps: Seconds written into the prompt before each grid; None if the model has no
            written times.
        sound: The sound track; None if the model does not hear the video.
        tail: Tokens that the model adds after the last grid (a newline).
        ends: Grids and audio tokens at the end of each unit of a growing video; None: it is whole.
    """

    size: tuple[int, int]
    grids: int
    height: int
    width: int
    temporal_patch: int
    positions: Indices | None = None
    seconds_per_grid: float = 1.0
    timestamps: tuple[float, ...] | None = None
    sound: Sound | None = None
    tail: int = 0
    ends: tuple[tuple[int, int], ...] | None = None

    @property
    def tokens_per_grid(self) -> int:
        """Tokens of one grid."""
        return self.height * self.width


@dataclass(frozen=True)
class Segment:
    """One segment's place in its video, and its tokens.

    Attributes:
        continues: The segment goes on where the mm item before it ended; False for a video's first.
        is_last: The segment is the last one of its video.
        grids: The segment's first temporal grid in the video, and the grid after its last.
        audio: The segment's first audio token in the video, and the audio token after its last.
        layout: Layout of the whole video.
        reduction: The token reduction.
        runs: The segment's tokens after reduction.
        kept: int64 ``[tokens]`` flat indices of the cells of the pooled and merged grid that stay,
            where ``reduction.static`` drops some; else None.
        left: Visual tokens left of each group of merged grids.
    """

    continues: bool
    is_last: bool
    grids: tuple[int, int]
    audio: tuple[int, int]
    layout: VideoLayout
    reduction: Reduction
    runs: tuple[Run, ...]
    kept: Indices | None
    left: tuple[int, ...]

    @property
    def num_grids(self) -> int:
        """Temporal grids before reduction."""
        return self.grids[1] - self.grids[0]

    @property
    def frames(self) -> slice:
        """The segment's frames within the video."""
        patch = self.layout.temporal_patch
        return slice(self.grids[0] * patch, self.grids[1] * patch)

    @property
    def positions(self) -> Indices | None:
        """Temporal positions of the segment's grids, counted from the start of the video."""
        of_video = self.layout.positions
        return None if of_video is None else of_video[slice(*self.grids)]

    @property
    def timestamps(self) -> tuple[float, ...] | None:
        """Seconds written into the prompt before each group of merged grids: the group's mean."""
        if self.layout.timestamps is None:
            return None
        return group_means(self.layout.timestamps[slice(*self.grids)], self.reduction.temporal)

    @property
    def visual(self) -> int:
        """Visual tokens after reduction, without the layout's ``tail``."""
        return sum(self.left)

    def key(self) -> bytes:
        """Digest of everything but the frames and the sound that decides the model's outputs."""
        hasher = blake3()
        parts: list[object] = [self.continues, self.layout.size, self.num_grids, self.runs]
        parts += [self.reduction.key(), self.layout.seconds_per_grid, self.timestamps]
        parts.append(self.layout.tail if self.is_last else 0)
        for part in parts:
            hasher.update(repr(part).encode() + b"\0")
        for array in (self.positions, self.kept):
            hasher.update(b"-" if array is None else array.tobytes() + b"\0")
        return hasher.digest()


def group_means(values: Sequence[float], size: int) -> tuple[float, ...]:
    """Mean of each ``size`` consecutive values; the last group may have fewer."""
    groups = [values[i : i + size] for i in range(0, len(values), size)]
    return tuple(sum(group) / len(group) for group in groups)


class VideoSegment(SampledFrames):
    """The frames of one segment, an mm item.

    Attributes:
        part: The segment's place in its video; None on an array derived from a segment.
        whole: On the first segment of a video, the video.
        recorded: What another server made of the segment, whose pixels are not here; else None.
    """

    part: Segment | None
    whole: SampledFrames | None
    recorded: RecordedSegment | None

    @classmethod
    def of(
        cls, frames: npt.NDArray[np.uint8], part: Segment, *, digest: str, track: Waveform | None
    ) -> Self:
        """Make a segment.

        Args:
            frames: The segment's frames, uint8 ``[n, height, width, 3]``; memory is shared.
            part: The segment's place in its video.
            digest: Identity of the segment, see ``segment_digest``.
            track: The segment's piece of the sound track; None for silence.
        """
        self = cls(frames, digest=digest, audio=track)
        self.part = part
        return self

    def __array_finalize__(self, obj: object) -> None:
        super().__array_finalize__(obj)
        self.part = self.whole = self.recorded = None


def cut_video(layout: VideoLayout, reduction: Reduction, target: int) -> list[Cut]:
    """Where a video is cut.

    Args:
        layout: Layout of the whole video.
        reduction: The token reduction; grids that it merges stay in one segment.
        target: Most tokens of a segment after reduction, as these are the tokens that the prompt
            and the encoder cache hold. A segment has more where the video cannot be cut. 0: no
            cuts. A growing video is also cut where its units end.
    """
    per_grid, sound = layout.tokens_per_grid, layout.sound

    def reduced(grids: int) -> int:
        return reduction.count(grids, layout.height, layout.width)

    if layout.ends is not None:
        runs = ((per_grid, 0),) * layout.grids if sound is None else sound.runs

        def inside(own: Sequence[Run]) -> list[Cut]:
            return cut_between(own, per_grid, target, reduced)

        whole = sound is not None and bool(sound.unit)
        return cut_units(runs, per_grid, layout.ends, None if whole else inside)
    if sound is None:
        return cut_silent(layout.grids, per_grid, target, reduced, reduction.temporal)
    if not sound.unit:
        return cut_between(sound.runs, per_grid, target, reduced)
    return cut_sounding(
        sound.runs,
        per_grid,
        target,
        reduced,
        audio_unit=sound.unit,
        audio_least=sound.least,
        unit=reduction.temporal,
    )


def segments_of(
    layout: VideoLayout,
    reduction: Reduction,
    target: int,
    pixels: Callable[[slice], npt.NDArray[np.uint8]],
    known: Sequence[Indices | None] | None = None,
) -> list[Segment]:
    """The segments of a video.

    Which cells of a segment stay under ``reduction.static`` depends on the video before it as well:
    its first cells are compared with the last ones of the segment before.

    Args:
        layout, reduction, target: As for ``cut_video``.
        pixels: Returns frames of the video at their final size; called only for a
            ``reduction.static`` that compares pixels, and once for each frame.
        known: For each segment the cells that such a reduction keeps, if that is known already.

    Raises:
        ValueError: It is known of another number of segments.
    """
    cuts = cut_video(layout, reduction, target)
    if known is not None and len(known) != len(cuts):
        raise ValueError(f"{len(known)} segments are known of a video that has {len(cuts)}")
    segments = []
    height, width, patch = layout.height, layout.width, layout.temporal_patch
    # The places of the grid at which a token of an earlier segment stays.
    shown = np.zeros(reduction.grid(1, height, width)[1:], dtype=bool)
    # Of the frames before a segment: as many as a cell has.
    earlier: Blocks | None = None
    for number, cut in enumerate(cuts):
        grids = cut.grids[1] - cut.grids[0]
        merged, rows, columns = reduction.grid(grids, height, width)
        kept, left = None, (rows * columns,) * merged
        if reduction.static != "none" and grids:
            if known is not None:
                kept = _checked(known[number], merged * rows * columns, reduction)
            else:
                begin, end = (grid * patch for grid in cut.grids)
                blocks, before = frame_blocks(pixels(slice(begin, end)), height, width), 0
                if earlier is not None:
                    blocks, before = np.concatenate([earlier, blocks]), len(earlier)
                earlier = blocks[-patch * reduction.temporal :]
                scores = static_scores(blocks, layout.size, height, width, patch, reduction, before)
                scores[0, ~shown] = np.inf
                kept = kept_cells(scores, reduction)
                shown.flat[kept % shown.size] = True
            left = tuple(np.bincount(kept // (rows * columns), minlength=merged).tolist())
        runs = cut.runs
        if not reduction.is_identity:
            runs = tuple(reduced_runs(runs, height * width, left, reduction.temporal))
        segments.append(
            Segment(
                continues=number > 0,
                is_last=number == len(cuts) - 1,
                grids=cut.grids,
                audio=cut.audio,
                layout=layout,
                reduction=reduction,
                runs=runs,
                kept=kept,
                left=left,
            )
        )
    return segments


def _checked(kept: Indices | None, cells: int, reduction: Reduction) -> Indices:
    if kept is None or not 0 < len(kept) == reduction.kept(cells):
        raise ValueError("it is not known which cells a segment keeps")
    if kept[0] < 0 or kept[-1] >= cells or not bool((np.diff(kept) > 0).all()):
        raise ValueError("cells that a segment keeps are not its own, or out of order")
    return kept


def segment_digest(
    part: Segment, size: tuple[int, ...], frames: Sequence[bytes], track: Waveform | None
) -> str:
    """Identity of a segment: a digest of its frames, its layout and its piece of sound.

    Args:
        part: The segment's place in its video.
        size: Height and width of the frames as delivered, in pixels.
        frames: Digest of each of the segment's frames.
        track: The segment's piece of the sound track; None for silence.
    """
    hasher = blake3(part.key())
    hasher.update(repr(tuple(size)).encode())
    for frame in frames:
        hasher.update(frame)
    hasher.update(b"-" if track is None else (track.digest or "").encode())
    return str(hasher.hexdigest())
