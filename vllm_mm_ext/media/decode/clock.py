"""When each picture of a stream is shown, from the timestamps that its container has.

Timestamps of files from the field restart where recordings were joined, repeat, are missing, or are
rounded to the unit that the container counts in. This module is pure arithmetic on columns.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction

import numpy as np
import numpy.typing as npt

Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]

# Stands for a timestamp that a packet does not have.
NO_TICKS = int(np.iinfo(np.int64).min)
# Frame rate assumed where neither timestamps nor headers give one.
DEFAULT_FPS = 25.0
# ffmpeg's own limits (``-dts_delta_threshold`` and ``ts_discontinuity_process``): in formats whose
# clock may jump, a decoding time that is further ahead, or falls back by more, is another clock.
_AHEAD_S = 10.0
_BACK_S = 0.1
# How many pictures away from the step of their clock the sound of that time may lie in the file.
_NEAR = 64
# The part of such a step, at each end, in which sound proves nothing: the sound of a recording may
# end after its pictures, that of the next one begin before.
_LOOSE = 0.25
# Where there are no decoding times: pictures that may be decoded between one and the last that is
# shown before it. Common codecs reorder within 32.
_MAX_REORDERED = 64
# Times are taken for those of a constant rate only where its pictures are so many units of the
# clock apart that rounding alone hardly explains the fit.
_FEWEST_UNITS = 2.5
# The most, in seconds, to which a container rounds times that its time base tells finer: GIF counts
# in hundredths. Times that are all multiples of more are exact.
_COARSEST_UNIT = 0.0101


@dataclass(frozen=True, eq=False)
class Beside:
    """Packets of the sound that is heard with the pictures, in the order of the file.

    Attributes:
        before: int64 ``[m]`` how many of the pictures come before each.
        time: float64 ``[m]`` seconds on the container's clock at which each is decoded.
    """

    before: Ints
    time: Floats

    def goes_on(self, place: int, begin: float, end: float) -> bool:
        """Whether there is sound while no picture comes, so that the clock does not jump.

        Args:
            place: Number of the picture before which none comes.
            begin, end: Seconds on the container's clock from and to which none does.
        """
        low, high = np.searchsorted(self.before, [place - _NEAR, place + _NEAR + 1])
        time, loose = self.time[low:high], _LOOSE * (end - begin)
        return bool(((time > begin + loose) & (time < end - loose)).any())


@dataclass(frozen=True, eq=False)
class Clock:
    """Times of the pictures of a stream.

    Attributes:
        order: int64 ``[n]`` the pictures in presentation order, as positions in the columns given.
        time: float64 ``[n]`` seconds from the first picture to each, non-decreasing.
        usual: Seconds from one picture to the next, the median.
        exact: Each picture has a timestamp that no other has.
        unit: Seconds to which the container rounds times.
        has_jumps: The clock jumps.
    """

    order: Ints
    time: Floats
    usual: float
    exact: bool
    unit: float
    has_jumps: bool = False


def read_clock(
    pts: Ints,
    dts: Ints,
    time_base: float,
    fps: float,
    rates: Sequence[Fraction],
    *,
    from_key: bool,
    may_jump: bool,
    beside: Callable[[], Beside] | None = None,
) -> Clock:
    """Put pictures into presentation order and on one clock that begins with 0.

    Where the clock jumps (joined recordings), the pictures after the jump go on after the last one
    before the jump, in the usual distance. A step ahead in which the sound goes on is no jump but a
    picture that stands. Pictures whose timestamps repeat stay in decoding order and share the time
    up to the next picture.

    Args:
        pts: int64 ``[n]`` presentation timestamps in decoding order; ``NO_TICKS`` for none.
        dts: int64 ``[n]`` decoding timestamps; ``NO_TICKS`` for none.
        time_base: Seconds per unit of timestamps.
        fps: Frame rate that the container claims; 0 for none.
        rates: Frame rates that the container names, for ``on_grid``.
        from_key: The first picture is a keyframe: those to be shown before it are left out, as no
            decoder shows them.
        may_jump: The format may hold clocks that jump ahead, as transport streams do. In others a
            long gap is a long picture.
        beside: Reads where the sound lies; called only where the clock seems to jump ahead. None
            for a file without sound.
    """
    step = 1.0 / (fps or DEFAULT_FPS)
    if not bool((pts != NO_TICKS).all()):
        time: Floats = np.asarray(np.arange(len(pts)) * step, np.float64)
        if len(dts) > 1 and bool((dts != NO_TICKS).all()) and bool((np.diff(dts / 1.0) > 0).all()):
            # Decoders give pictures out in presentation order, one for each that they are given.
            time = np.asarray((dts - dts[0] / 1.0) * time_base, np.float64)
            step = float(np.median(np.diff(time)))
        return Clock(np.arange(len(pts)), time, step, exact=False, unit=time_base)
    run = _runs(pts, dts, time_base, may_jump, beside)
    # Garbage timestamps may be further apart than int64 holds; floating point does not wrap.
    shown = pts.astype(np.float64)
    order = np.lexsort((shown, run))
    if from_key:
        order = order[(run[order] > 0) | (shown[order] >= shown[0])]
    usual = _usual(shown[order], run[order])
    ticks = shown[order] - shown[order[0]]
    has_jumps = bool(run[-1])
    if has_jumps:
        ticks = _joined(shown[order], run[order], usual)
    exact = bool((np.diff(ticks) > 0).all())
    if not exact:
        ticks = _apart(ticks, usual or step / time_base)
    if has_jumps:
        exact = len(np.unique(pts[order])) == len(order)
    rounded = ticks * time_base
    unit = _unit(ticks) * time_base
    unit = unit if unit <= _COARSEST_UNIT else time_base
    time = on_grid(rounded, unit, [*rates, *_rates_near(rounded)])
    if len(time) > 1:
        step = float(np.median(np.diff(time)))
    return Clock(order, time, step, exact, unit if time is not rounded else time_base, has_jumps)


def paced(clock: Clock, delays: Ints, time_base: float) -> Clock:
    """The clock of a GIF, whose pictures follow each other after their delays.

    Args:
        clock: From ``read_clock``.
        delays: int64 ``[n]`` how long each picture is shown, in presentation order.
        time_base: Seconds per unit of ``delays``.
    """
    time: Floats = np.asarray((np.cumsum(delays) - delays) * time_base, np.float64)
    usual = float(np.median(np.diff(time))) if len(time) > 1 else clock.usual
    return replace(clock, time=time, usual=usual)


def players_delays(delays: Ints) -> Ints:
    """Delays of pictures of a GIF in 1/100 s as players take them: less than 2 counts as 10.

    As in browsers, and in FFmpeg up to version 7 (``min_delay``, ``default_delay``).
    """
    return np.where(delays < 2, 10, delays)


def on_grid(time: Floats, unit: float, rates: Sequence[Fraction]) -> Floats:
    """The exact times of a constant frame rate, where ``time`` is these times rounded.

    Containers that count in milliseconds show 30 pictures a second at 0, 33, 67, 100 ms. Pictures
    may be missing.

    Args:
        time: float64 ``[n]`` seconds, increasing, from 0.
        unit: Seconds to which ``time`` is rounded.
        rates: Frame rates to try, in pictures per second.

    Returns:
        Multiples of the time between two pictures, each within ``unit`` of ``time``; or ``time``
        itself where no rate fits.
    """
    for rate in rates:
        period = float(1 / rate) if rate > 0 else 0.0
        if period < _FEWEST_UNITS * unit or len(time) < 3:
            continue
        place = np.round(time / period)
        off = time - place * period
        if off.max() - off.min() <= 1.01 * unit and bool((np.diff(place) > 0).all()):
            return np.asarray(place * period)
    return time


def _rates_near(time: Floats) -> list[Fraction]:
    """Common frame rates near the mean rate: whole numbers, and those of NTSC."""
    if len(time) < 2 or time[-1] <= time[0]:
        return []
    mean = (len(time) - 1) / float(time[-1] - time[0])
    return [Fraction(round(mean)), Fraction(round(mean * 1.001) * 1000, 1001)]


def _usual(ticks: Floats, run: Ints) -> float:
    """Median distance of pictures of one run, of those not at the same time; 0 if there is none.

    Args:
        ticks: Timestamps in presentation order, run by run.
        run: Number of the run of each.
    """
    gaps = np.diff(ticks)[np.diff(run) == 0]
    gaps = gaps[gaps > 0]
    return float(np.median(gaps)) if len(gaps) else 0.0


def _runs(
    pts: Ints,
    dts: Ints,
    time_base: float,
    may_jump: bool,
    beside: Callable[[], Beside] | None,
) -> Ints:
    """Number of the run of each packet: a new run begins where the clock jumps."""
    if len(pts) < 2:
        return np.zeros(len(pts), np.int64)
    known = np.flatnonzero(dts != NO_TICKS)
    jump = np.zeros(len(pts) - 1, np.bool_)
    if may_jump or (len(known) == len(dts) and bool((dts <= pts).all())):
        time = dts[known].astype(np.float64) * time_base
        step = np.diff(time)
        # A packet is expected where the one before it ends.
        ahead = step - max(0.0, float(np.median(step))) if len(step) else step
        leap = may_jump & (ahead > _AHEAD_S)
        if beside is not None and leap.any():
            sound = beside()
            for at in np.flatnonzero(leap).tolist():
                leap[at] = not sound.goes_on(int(known[at + 1]), time[at], time[at + 1])
        jump[known[1:] - 1] = (step < -_BACK_S) | leap
    else:
        # Matroska has no decoding times. A picture before many that were decoded long ago is none
        # that was reordered.
        shown = pts.astype(np.float64)
        latest = np.maximum.accumulate(shown)
        jump[_MAX_REORDERED:] = shown[_MAX_REORDERED + 1 :] < latest[: -_MAX_REORDERED - 1]
        usual = _usual(np.sort(shown), np.zeros(len(shown), np.int64))
        jump &= np.diff(shown) < -_MAX_REORDERED * usual
    return np.concatenate([[0], np.cumsum(jump)]).astype(np.int64)


def _joined(ticks: Floats, run: Ints, usual: float) -> Floats:
    """Ticks from the first picture on, each run following the one before it.

    Args:
        ticks: Timestamps in presentation order, run by run.
        run: Number of the run of each, non-decreasing.
        usual: Distance from the last picture of a run to the first of the next.
    """
    first = np.flatnonzero(np.diff(run, prepend=-1))
    last = np.append(first[1:], len(ticks)) - 1
    length = ticks[last] - ticks[first] + usual
    begin = np.concatenate([[0.0], np.cumsum(length)[:-1]])
    which = np.searchsorted(first, np.arange(len(ticks)), side="right") - 1
    return np.asarray(ticks - ticks[first][which] + begin[which])


def _apart(ticks: Floats, usual: float) -> Floats:
    """Ticks of which those that repeat are spread evenly up to the next, or over ``usual``."""
    values, which, counts = np.unique(ticks, return_inverse=True, return_counts=True)
    if len(values) == len(ticks):
        return ticks
    room = np.append(np.diff(values), usual)
    first = np.searchsorted(which, np.arange(len(values)))
    return np.asarray(ticks + (np.arange(len(ticks)) - first[which]) * (room / counts)[which])


def _unit(ticks: Floats) -> float:
    """The unit that timestamps are multiples of, in units of the time base.

    A file that was made from one in milliseconds may count in smaller units.
    """
    gaps = np.diff(ticks)
    if not len(gaps) or gaps.max() >= 2**53:
        return 1.0
    return float(max(1, np.gcd.reduce(gaps.astype(np.int64))))
