"""Content-adaptive sampling, in three steps.

1. Stage 1 (``container_profile``) scores every frame by the sizes of the packets.
2. Stage 2 looks at a bounded number of frames, as thumbnails (``thumbnail_scan``), and finds the
   short events among them (``short_events``).
3. ``coverage`` takes those of the frames looked at that represent the others best.

Where ``max_frames`` or ``min_frames`` decides the number of frames, all frames of the clip compete
for the budget. Otherwise the sampler works window by window (see ``windows``), and no frame after
the end of a window takes part in the choice of the window's frames.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from vllm_mm_ext.media.sampling import container_profile, coverage, short_events, thumbnail_scan
from vllm_mm_ext.media.sampling.container_profile import Scores
from vllm_mm_ext.media.sampling.thumbnail_planes import pixels, planes
from vllm_mm_ext.media.sampling.timeline import Indices, second_of
from vllm_mm_ext.media.sampling.windows import Window, rows, windows_of
from vllm_mm_ext.media.types import (
    ActivityProfile,
    FrameSelection,
    MediaInfo,
    PacketTable,
    SamplingSpec,
)

Thumbnails = Callable[[Sequence[int], Sequence[int]], npt.NDArray[np.uint8]]

# No gap between chosen frames is wider than this many mean gaps.
_WIDEST = 7.0
# A clip's first and last frame are at most this many seconds from a chosen one.
_ENDS_S = 1.0
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
        looked_at: int64 ``[k]`` frames to look at, counted from the window's first frame.
        eligible: bool ``[k]`` which of them can be chosen if there is no event.
        pixels: float32 ``[k, p]`` their thumbnails, or ``p = 0`` where none are decoded.
        motion, transient: float64 ``[k]`` stage-2 scores (see ``short_events.motion_score``).
    """

    window: Window
    packets: PacketTable
    score: Scores
    looked_at: Indices
    eligible: npt.NDArray[np.bool_]
    pixels: npt.NDArray[np.float32] = field(default_factory=lambda: np.zeros((0, 0), np.float32))
    motion: Scores = field(default_factory=lambda: np.zeros(0))
    transient: Scores = field(default_factory=lambda: np.zeros(0))

    @classmethod
    def of(cls, packets: PacketTable, window: Window) -> _Part:
        known = rows(packets, window.back, window.high)
        score = container_profile.innovation(known)[window.low - window.back :]
        own = rows(packets, window.low, window.high)
        looked_at = thumbnail_scan.plan(own, score, max(1, window.count))
        eligible = thumbnail_scan.eligible(own.time[looked_at], window.count)
        return cls(window, own, score, looked_at, eligible)

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
        count, size = self.window.count, len(self.looked_at)
        if not count:
            return np.zeros(0, np.int64)
        time = self.packets.time
        here = time[self.looked_at]
        # Each frame of the clip counts for the frame looked at that is nearest in time.
        nearest = np.searchsorted((here[1:] + here[:-1]) / 2, time, side="right")
        events, eligible = short_events.events(self.transient, count), self.eligible.copy()
        for event in events:
            # With its neighbours: else a frame of the event would stand for what is around it.
            eligible[max(0, event.first - 1) : event.last + 2] = True
        looked = coverage.Looked(
            here,
            np.bincount(nearest, minlength=size).astype(np.float64),
            self.pixels if len(self.pixels) else np.zeros((size, 0), np.float32),
            events,
            eligible,
        )
        span = float(time[-1] - time[0])
        spacing = span / count
        floor = 1.0 / spec.min_fps if spec.min_fps > 0 else math.inf
        # The seconds together have room for as many frames as `fps` asks for and the budget has.
        mean = min(spec.fps, count / span) if span > 0 else 0.0
        chosen = coverage.choose(
            looked,
            count,
            # Two mean gaps at least: less would leave hardly anything to choose.
            widest=max(2 * spacing, min(_WIDEST * spacing, floor)),
            ends=self._ends(),
            ceiling=max(1, math.floor(spec.max_fps), math.ceil(spec.min_fps), math.ceil(mean)),
            least=min(count, spec.min_frames),
            taken=taken,
            multiple_of=spec.multiple_of,
        )
        taken.update(second_of(here[chosen]).tolist())
        return self.looked_at[chosen]

    def _ends(self) -> tuple[float, float]:
        """Most seconds from the window's first frame to the choice, and from there to its last.

        There is no bound where the ends would take all of the window's frames.
        """
        opens, closes = self.window.low == 0, self.window.is_rest
        if self.window.count <= opens + closes:
            return math.inf, math.inf
        return (_ENDS_S if opens else math.inf), (_ENDS_S if closes else math.inf)


def select_adaptive(info: MediaInfo, spec: SamplingSpec, thumbnails: Thumbnails) -> FrameSelection:
    """Choose frames that represent the clip, and show short events. See ``sampling.select``.

    ``thumbnails`` is called at most once, with at most as many indices of each window as
    ``thumbnail_scan.plan`` says. All frames chosen are among them, if it is called for their
    window. But for those at an event, they are also among its second argument: a decoder that keeps
    the pictures of these need not decode them again.
    """
    packets = info.packets
    assert packets is not None
    parts = [_Part.of(packets, window) for window in windows_of(info, spec)]
    if any(part.has_choice for part in parts):
        _look(parts, packets, thumbnails)
    taken: Counter[int] = Counter()
    chosen = [part.choose(spec, taken) for part in parts]
    found = np.concatenate(
        [part.window.low + indices for part, indices in zip(parts, chosen, strict=True)]
    )
    # A window that has fewer frames than it should choose may end within a temporal patch.
    if len(found) >= spec.multiple_of:
        found = found[: len(found) - len(found) % spec.multiple_of]
    return FrameSelection("adaptive", found, packets.time[found], _profile(packets, parts))


def _look(parts: Sequence[_Part], packets: PacketTable, thumbnails: Thumbnails) -> None:
    """Decode the thumbnails and score them; a window is compared with itself and the one before."""
    parts = [part for part in parts if part.has_choice]
    indices = [part.window.low + part.looked_at for part in parts]
    eligible = [found[part.eligible] for found, part in zip(indices, parts, strict=True)]
    seen = planes(thumbnails(np.concatenate(indices).tolist(), np.concatenate(eligible).tolist()))
    bounds = np.cumsum([0, *(len(part) for part in indices)]).tolist()
    for number, part in enumerate(parts):
        first = max(0, number - 1)
        time = packets.time[np.concatenate(indices[first : number + 1])]
        compared = slice(bounds[first], bounds[number + 1])
        motion, transient = short_events.motion_score(
            tuple(plane[compared] for plane in seen), time
        )
        own = bounds[number] - bounds[first]
        part.motion, part.transient = motion[own:], transient[own:]
        looked_at = slice(bounds[number], bounds[number + 1])
        part.pixels = pixels(tuple(plane[looked_at] for plane in seen))


def _profile(packets: PacketTable, parts: Sequence[_Part]) -> ActivityProfile:
    end = float(packets.time[-1])
    bins = min(_MOST_BINS, int(end / _BIN_S) + 1)
    width = max(_BIN_S, end / bins * (1 + 1e-9))
    container = np.zeros(bins, np.float32)
    confirmed = np.full(bins, np.nan, np.float32)
    for part in parts:
        place = np.minimum((part.packets.time / width).astype(np.int64), bins - 1)
        np.maximum.at(container, place, (part.score / (part.score + 6.0)).astype(np.float32))
        if len(part.motion):
            np.fmax.at(confirmed, place[part.looked_at], part.motion.astype(np.float32))
    return ActivityProfile(np.arange(bins, dtype=np.float64) * width, container, confirmed)
