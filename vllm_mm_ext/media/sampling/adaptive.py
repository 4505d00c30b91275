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
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from vllm_mm_ext.media.sampling import container_profile, coverage, short_events, thumbnail_scan
from vllm_mm_ext.media.sampling.container_profile import Scores
from vllm_mm_ext.media.sampling.thumbnail_planes import Planes, pixels, planes
from vllm_mm_ext.media.sampling.thumbnail_scan import ENDS_S
from vllm_mm_ext.media.sampling.timeline import Indices, Times, clip_duration, second_of
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
# Seconds per bin of the reported activity profile. A clip of more than _MOST_BINS bins gets longer
# bins.
_BIN_S = 0.25
_MOST_BINS = 4000


@dataclass(eq=False)
class _Clip:
    """A clip while its frames are chosen.

    Attributes:
        packets: The clip's packet table, ``n`` rows.
        until: float64 ``[n]`` seconds until when each frame is on screen.
        windows: Its windows, which lie side by side.
        score: float64 ``[n]`` stage-1 score of each frame.
        looked_at: int64 ``[k]`` sorted indices of the frames to look at.
        eligible: bool ``[k]`` which of them can be chosen if there is no event.
        seen: The thumbnails of these frames; None where looking cannot change the choice.
    """

    packets: PacketTable
    until: Times
    windows: Sequence[Window]
    score: Scores
    looked_at: Indices
    eligible: npt.NDArray[np.bool_]
    seen: Planes | None = None

    @classmethod
    def of(cls, info: MediaInfo, spec: SamplingSpec) -> _Clip:
        packets = info.packets
        assert packets is not None
        until = np.append(packets.time[1:], max(packets.time[-1], clip_duration(info)))
        windows = windows_of(info, spec)
        score, looked_at = np.zeros(len(packets)), [np.zeros(0, np.int64)]
        eligible, left = [np.zeros(0, np.bool_)], thumbnail_scan.MAX_THUMBNAILS
        for window in windows:
            first, last = window.first, window.last
            if first == last:
                continue
            known = container_profile.innovation(rows(packets, window.back, last))
            score[first:last] = known[first - window.back :]
            own, count = rows(packets, first, last), max(1, window.wanted)
            most = max(left, thumbnail_scan.LATER_THUMBNAILS * count) if first else left
            found = thumbnail_scan.plan(own, score[first:last], count, most)
            likely = first + found[thumbnail_scan.eligible(own.time[found], count)]
            # What the window leaves to the next is all that the next may have.
            likely = thumbnail_scan.at_least(likely, first, window.high, window.wanted)
            likely = thumbnail_scan.at_least(likely, window.high, last, window.later)
            found = np.union1d(first + found, likely)
            left = max(0, left - len(found))
            looked_at.append(found)
            eligible.append(np.isin(found, likely))
        return cls(
            packets, until, windows, score, np.concatenate(looked_at), np.concatenate(eligible)
        )

    def places(self, first: int, last: int) -> slice:
        """Which of the frames looked at are ``first`` to ``last`` (exclusive)."""
        return slice(*np.searchsorted(self.looked_at, [first, last]).tolist())

    def look(self, thumbnails: Thumbnails) -> None:
        """Decode the thumbnails, if they could change which frames are chosen."""
        if any(map(_has_choice, self.windows)):
            likely = self.looked_at[self.eligible].tolist()
            self.seen = planes(thumbnails(self.looked_at.tolist(), likely))

    def scores(self, number: int) -> tuple[Scores, Scores]:
        """Stage-2 scores (see ``short_events.motion_score``) as a window knows them.

        The window is compared with itself and the one before.

        Returns:
            ``motion`` of the window's own frames that are looked at, and ``transient`` of those
            that it chooses from.
        """
        window = self.windows[number]
        compared = self.places(self.windows[max(0, number - 1)].first, window.last)
        own, choice = self.places(window.first, window.last), self.places(window.low, window.high)
        found = self.looked_at[compared]
        assert self.seen is not None
        motion, transient = short_events.motion_score(
            tuple(plane[compared] for plane in self.seen),
            self.packets.time[found],
            np.minimum(self.until[found], window.end),
        )
        skipped = choice.start - compared.start
        return (
            motion[own.start - compared.start :],
            transient[skipped : skipped + choice.stop - choice.start],
        )

    def choose(
        self, window: Window, transient: Scores | None, spec: SamplingSpec, taken: Counter[int]
    ) -> Indices:
        """Choose a window's frames.

        Args:
            window: Where to choose.
            transient: Its stage-2 scores; None without a look.
            spec: Policy and budget.
            taken: Frames chosen so far in each whole second of the clip; the chosen frames are
                added to it.

        Returns:
            int64 ``[k]`` frame indices.
        """
        count, place = window.count, self.places(window.low, window.high)
        looked_at, eligible = self.looked_at[place], self.eligible[place].copy()
        if not count:
            return np.zeros(0, np.int64)
        time = self.packets.time[window.low : window.high]
        here = self.packets.time[looked_at]
        # Each frame of the clip counts, for as long as it is on screen, for the frame looked at
        # that is nearest in time.
        nearest = np.searchsorted((here[1:] + here[:-1]) / 2, time, side="right")
        seconds = np.minimum(self.until[window.low : window.high], window.end) - time
        weight = np.bincount(nearest, seconds, len(here)).astype(np.float64)
        events, seen = [], np.zeros((len(here), 0), np.float32)
        if transient is not None and self.seen is not None:
            events = short_events.events(transient, count)
            seen = pixels(tuple(plane[place] for plane in self.seen))
        for event in events:
            # With its neighbours: else a frame of the event would stand for what is around it.
            eligible[max(0, event.first - 1) : event.last + 2] = True
        looked = coverage.Looked(here, weight, seen, events, eligible)
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
            ends=_ends(window, float(time[-1] - here[-1])),
            ceiling=max(1, math.floor(spec.max_fps), math.ceil(spec.min_fps), math.ceil(mean)),
            least=min(count, spec.min_frames),
            taken=taken,
            multiple_of=spec.multiple_of,
        )
        taken.update(second_of(here[chosen]).tolist())
        return looked_at[chosen]


def _has_choice(window: Window) -> bool:
    """Whether looking at the pixels could change which frames of a window are chosen."""
    return 0 < window.count < window.high - window.low


def _ends(window: Window, unseen: float) -> tuple[float, float]:
    """Most seconds from the first frame looked at to the choice, and from there to the last.

    There is no bound where the ends would take all of the window's frames.

    Args:
        window: Where to choose.
        unseen: Seconds between the last frame looked at and the window's last frame.
    """
    opens, closes = window.low == 0, window.is_rest
    if window.count <= opens + closes:
        return math.inf, math.inf
    return (ENDS_S if opens else math.inf), (ENDS_S - unseen if closes else math.inf)


def select_adaptive(info: MediaInfo, spec: SamplingSpec, thumbnails: Thumbnails) -> FrameSelection:
    """Choose frames that represent the clip, and show short events. See ``sampling.select``.

    ``thumbnails`` is called at most once. All frames chosen are among its first argument, if it is
    called. But for those at an event, they are also among its second argument: a decoder that keeps
    the pictures of these need not decode them again.
    """
    clip = _Clip.of(info, spec)
    clip.look(thumbnails)
    taken: Counter[int] = Counter()
    chosen = []
    confirmed = np.full(len(clip.packets), np.nan)
    for number, window in enumerate(clip.windows):
        transient = None
        if clip.seen is not None:
            motion, transient = clip.scores(number)
            confirmed[clip.looked_at[clip.places(window.first, window.last)]] = motion
        if not _has_choice(window):
            transient = None
        chosen.append(clip.choose(window, transient, spec, taken))
    found = np.concatenate(chosen)
    # A window that has fewer frames than it should choose may end within a temporal patch.
    if len(found) >= spec.multiple_of:
        found = found[: len(found) - len(found) % spec.multiple_of]
    profile = _profile(clip.packets, clip.score, confirmed)
    return FrameSelection("adaptive", found, clip.packets.time[found], profile)


def _profile(packets: PacketTable, score: Scores, motion: Scores) -> ActivityProfile:
    """The clip's activity by stage 1 and, where it was looked at, by stage 2 (elsewhere NaN)."""
    end = float(packets.time[-1])
    bins = min(_MOST_BINS, int(end / _BIN_S) + 1)
    width = max(_BIN_S, end / bins * (1 + 1e-9))
    container = np.zeros(bins, np.float32)
    confirmed = np.full(bins, np.nan, np.float32)
    place = np.minimum((packets.time / width).astype(np.int64), bins - 1)
    np.maximum.at(container, place, (score / (score + 6.0)).astype(np.float32))
    np.fmax.at(confirmed, place, motion.astype(np.float32))
    return ActivityProfile(np.arange(bins, dtype=np.float64) * width, container, confirmed)
