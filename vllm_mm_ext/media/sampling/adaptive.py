"""Content-adaptive sampling, in three steps.

1. Stage 1 (``container_profile``) scores every frame by the sizes of the packets.
2. Stage 2 (``thumbnail_scan``) decodes a bounded number of thumbnails and scores their pixels.
3. ``candidates`` turns both scores into a list of spots, and ``allocate`` spends the frame budget.

Where ``max_frames`` or ``min_frames`` decides the number of frames, all frames of the clip compete
for the budget. Otherwise the sampler works window by window (see ``windows``), and no frame after
the end of a window takes part in the choice of the window's frames.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from vllm_mm_ext.media.sampling import allocate, candidates, container_profile, thumbnail_scan
from vllm_mm_ext.media.sampling.container_profile import Scores
from vllm_mm_ext.media.sampling.timeline import Indices, Times, second_of
from vllm_mm_ext.media.sampling.windows import Window, rows, windows_of
from vllm_mm_ext.media.types import (
    ActivityProfile,
    FrameSelection,
    MediaInfo,
    PacketTable,
    SamplingSpec,
)

Thumbnails = Callable[[Sequence[int]], npt.NDArray[np.uint8]]

# Seconds per bin of the reported activity profile. A clip of more than _MOST_BINS bins gets longer
# bins.
_BIN_S = 0.25
_MOST_BINS = 4000


@dataclass(eq=False)
class _Part:
    """One window while its frames are chosen.

    Attributes:
        window: The window's place in the clip.
        packets: The rows of the packet table that lie in the window, ``n`` of them.
        score: float64 ``[n]`` stage-1 score of each frame.
        looked_at: int64 ``[k]`` frames whose thumbnails stage 2 decodes, counted from the window's
            first frame.
        motion, transient: float64 ``[k]`` stage-2 scores of these thumbnails (see
            ``thumbnail_scan.motion_score``).
    """

    window: Window
    packets: PacketTable
    score: Scores
    looked_at: Indices = field(default_factory=lambda: np.zeros(0, np.int64))
    motion: Scores = field(default_factory=lambda: np.zeros(0))
    transient: Scores = field(default_factory=lambda: np.zeros(0))

    @classmethod
    def of(cls, packets: PacketTable, window: Window) -> _Part:
        known = rows(packets, window.back, window.high)
        score = container_profile.innovation(known)[window.low - window.back :]
        return cls(window, rows(packets, window.low, window.high), score)

    @property
    def has_choice(self) -> bool:
        """Whether looking at the pixels could change which frames are chosen."""
        return 2 < self.window.count < len(self.packets)

    def choose(self, spec: SamplingSpec, taken: Counter[int]) -> Indices:
        """Choose the window's frames.

        Args:
            spec: Policy and budget.
            taken: Frames chosen so far in each whole second of the clip; the chosen frames are
                added to it.

        Returns:
            int64 ``[k]`` frame indices counted from the window's first frame.
        """
        if not self.window.count:
            return np.zeros(0, np.int64)
        time, count = self.packets.time, self.window.count
        spots = candidates.find(time, self.score, self.looked_at, self.transient, 3 * count)
        chosen = allocate.allocate(
            self.packets,
            count,
            [spot.index for spot in spots],
            _weights(self.packets, self.score),
            min_fps=spec.min_fps,
            max_fps=spec.max_fps,
            multiple_of=spec.multiple_of,
            taken=taken,
        )
        taken.update(second_of(time[chosen]).tolist())
        return chosen


def select_adaptive(info: MediaInfo, spec: SamplingSpec, thumbnails: Thumbnails) -> FrameSelection:
    """Choose frames where something happens. See ``sampling.select`` for the arguments.

    ``thumbnails`` is called at most once, with at most ``thumbnail_scan.MAX_THUMBNAILS`` indices
    of each window; decoding the indices of a window costs at most
    ``thumbnail_scan.decode_allowance`` frames.
    """
    packets = info.packets
    assert packets is not None
    parts = [_Part.of(packets, window) for window in windows_of(info, spec)]
    chosen = _choose(parts, spec)
    for part, indices in zip(parts, chosen, strict=True):
        if part.has_choice:
            # Stage 2 may decode as much as one full decode costs, less what the frames chosen so
            # far will cost.
            allowance = thumbnail_scan.decode_allowance(part.packets, indices)
            part.looked_at = thumbnail_scan.plan(
                part.packets, part.score, allowance, part.window.lead_in
            )
    if sum(len(part.looked_at) for part in parts) >= 3:
        _look(parts, packets, thumbnails)
        chosen = _choose(parts, spec)
    else:
        for part in parts:
            part.looked_at = part.looked_at[:0]
    found = np.concatenate(
        [part.window.low + indices for part, indices in zip(parts, chosen, strict=True)]
    )
    # A window that has fewer frames than it should choose may end within a temporal patch.
    if len(found) >= spec.multiple_of:
        found = found[: len(found) - len(found) % spec.multiple_of]
    return FrameSelection("adaptive", found, packets.time[found], _profile(packets, parts))


def _choose(parts: Sequence[_Part], spec: SamplingSpec) -> list[Indices]:
    taken: Counter[int] = Counter()
    return [part.choose(spec, taken) for part in parts]


def _look(parts: Sequence[_Part], packets: PacketTable, thumbnails: Thumbnails) -> None:
    """Decode the thumbnails and score them; a window is compared with itself and the one before."""
    indices = [part.window.low + part.looked_at for part in parts]
    pixels = thumbnails(np.concatenate(indices).tolist())
    bounds = np.cumsum([0, *(len(part) for part in indices)]).tolist()
    whole = parts[0].window.is_clip
    fewest = thumbnail_scan.FEWEST if whole else thumbnail_scan.FEWEST_IN_WINDOW
    for number, part in enumerate(parts):
        first = max(0, number - 1)
        time = packets.time[np.concatenate(indices[first : number + 1])]
        motion, transient = thumbnail_scan.motion_score(
            pixels[bounds[first] : bounds[number + 1]], time, fewest
        )
        own = bounds[number] - bounds[first]
        part.motion, part.transient = motion[own:], transient[own:]


def _weights(packets: PacketTable, score: Scores) -> Times:
    """float64 ``[n]`` weight of each frame for the rest of the budget.

    The weight is the frame's time on screen in seconds, up to doubled by its stage-1 score.
    """
    time = packets.time
    gaps = np.diff(time, append=time[-1] + (time[-1] - time[0]) / max(1, len(time) - 1))
    return np.asarray(np.maximum(gaps, 1e-9) * (1.0 + np.minimum(score, 10.0) / 10.0))


def _profile(packets: PacketTable, parts: Sequence[_Part]) -> ActivityProfile:
    end = float(packets.time[-1])
    bins = min(_MOST_BINS, int(end / _BIN_S) + 1)
    width = max(_BIN_S, end / bins * (1 + 1e-9))
    container = np.zeros(bins, np.float32)
    confirmed = np.full(bins, np.nan, np.float32)
    for part in parts:
        place = np.minimum((part.packets.time / width).astype(np.int64), bins - 1)
        np.maximum.at(container, place, (part.score / (part.score + 6.0)).astype(np.float32))
        np.fmax.at(confirmed, place[part.looked_at], part.motion.astype(np.float32))
    return ActivityProfile(np.arange(bins, dtype=np.float64) * width, container, confirmed)
