"""One user video as consecutive segments, each an mm item of its own.

Pure: numpy only. ``segment_processor`` hands the segments to vLLM, the families say how their
model lays a video out.
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
from vllm_mm_ext.video.cuts import (
    Cut,
    Run,
    cut_between,
    cut_silent,
    cut_sounding,
    reduced_runs,
)
from vllm_mm_ext.video.scores import static_scores
from vllm_mm_ext.video.select import kept_cells

Indices = npt.NDArray[np.int64]


@dataclass(frozen=True)
class VideoShape:
    """All that decides how many tokens a video becomes and where they stand.

    Attributes:
        frames: Frames delivered.
        height, width: Their size in pixels, as delivered.
        times: Presentation time of each frame in seconds; None leaves the model's own assumption.
        step: Nominal seconds between frames sampled on a fixed grid from 0, else None.
        audio_samples: Samples of the sound track at the model's rate; 0 for silence.
        reduction: How its tokens are made fewer.
        metadata: What vLLM's loader said about the video, if anything.
        final: The frames have the size at which the model takes them.
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


@dataclass(frozen=True)
class Sound:
    """A video's sound as its model takes it.

    Attributes:
        runs: ``(visual, audio)`` tokens of the whole video in prompt order.
        unit: Audio tokens of a window that the audio encoder attends within; 0: every run is a
            group of grids that merge, or a whole number of windows.
        least: Audio tokens a piece must have for the encoder to see it as it sees the whole.
    """

    runs: tuple[Run, ...]
    unit: int
    least: int = 1


@dataclass(frozen=True)
class VideoLayout:
    """How a model lays a video out, before any reduction.

    Attributes:
        size: Height and width in pixels at which the encoder sees frames.
        grids: Temporal grids.
        height, width: Tokens of a grid vertically and horizontally.
        temporal_patch: Frames per grid; the last grid may have fewer.
        positions: int64 ``[grids]`` temporal positions from the start of the video; None where
            they follow from ``seconds_per_grid``, or the model has none.
        seconds_per_grid: What the model's processor would say.
        timestamps: Seconds written into the prompt before each grid, if the model wants them.
        sound: The sound track, if it is heard.
        tail: Tokens the model adds after the last grid (a newline).
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

    @property
    def tokens_per_grid(self) -> int:
        """Tokens of one grid."""
        return self.height * self.width


@dataclass(frozen=True)
class Segment:
    """One segment's place in its video and its tokens.

    Attributes:
        continues: It goes on where the mm item before it ended.
        is_last: No other segment of the video follows.
        grids: First temporal grid in the video and the one past the last.
        audio: First audio token in the video and the one past the last.
        layout: The whole video's layout.
        reduction: How its tokens are made fewer.
        runs: Its tokens after reduction.
        kept: int64 ``[tokens]`` cells of the pooled and merged grid that stay, where
            ``reduction.static`` selects.
        left: Tokens left of each group of grids.
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
        """Its frames within the video."""
        patch = self.layout.temporal_patch
        return slice(self.grids[0] * patch, self.grids[1] * patch)

    @property
    def positions(self) -> Indices | None:
        """Temporal positions of its grids from the start of the video."""
        of_video = self.layout.positions
        return None if of_video is None else of_video[slice(*self.grids)]

    @property
    def timestamps(self) -> tuple[float, ...] | None:
        """Seconds written before each group of grids: the mean over the group."""
        if self.layout.timestamps is None:
            return None
        return group_means(self.layout.timestamps[slice(*self.grids)], self.reduction.temporal)

    @property
    def visual(self) -> int:
        """Visual tokens, without the model's tail."""
        return sum(self.left)

    def key(self) -> bytes:
        """Bytes that differ whenever what the model makes of equal frames could."""
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
    """The frames of one segment.

    Attributes:
        part: Its place in the video.
    """

    part: Segment | None

    @classmethod
    def of(
        cls, frames: npt.NDArray[np.uint8], part: Segment, *, digest: str, track: Waveform | None
    ) -> Self:
        """A segment of ``frames`` (already cut to it) with its piece of the sound track."""
        self = cls(frames, digest=digest, audio=track)
        self.part = part
        return self

    def __array_finalize__(self, obj: object) -> None:
        super().__array_finalize__(obj)
        self.part = None


def cut_video(layout: VideoLayout, reduction: Reduction, target: int) -> list[Cut]:
    """Where a video is cut.

    Args:
        layout: Of the whole video.
        reduction: How its tokens are made fewer; grids that merge stay together.
        target: Tokens a segment should not exceed after reduction: they are what the prompt and
            the encoder cache hold. 0: no cuts.
    """
    per_grid, sound = layout.tokens_per_grid, layout.sound

    def reduced(grids: int) -> int:
        return reduction.count(grids, layout.height, layout.width)

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
) -> list[Segment]:
    """The segments of a video.

    Args:
        layout, reduction, target: As for ``cut_video``.
        pixels: Frames of a segment at their final size; asked for only where ``reduction.static``
            must see them.
    """
    cuts = cut_video(layout, reduction, target)
    segments = []
    for number, cut in enumerate(cuts):
        grids, height, width = cut.grids[1] - cut.grids[0], layout.height, layout.width
        merged, rows, columns = reduction.grid(grids, height, width)
        kept, left = None, (rows * columns,) * merged
        if reduction.static != "none" and grids:
            patch = layout.temporal_patch
            frames = pixels(slice(cut.grids[0] * patch, cut.grids[1] * patch))
            kept = kept_cells(static_scores(frames, height, width, patch, reduction), reduction)
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


def segment_digest(
    part: Segment, size: tuple[int, ...], frames: Sequence[bytes], track: Waveform | None
) -> str:
    """Identity of a segment's content: its frames, its layout, its piece of sound.

    Args:
        part: Its place in the video.
        size: Height and width of the frames as delivered.
        frames: Digest of each of its frames.
        track: Its piece of the sound track.
    """
    hasher = blake3(part.key())
    hasher.update(repr(tuple(size)).encode())
    for frame in frames:
        hasher.update(frame)
    hasher.update(b"-" if track is None else (track.digest or "").encode())
    return str(hasher.hexdigest())
