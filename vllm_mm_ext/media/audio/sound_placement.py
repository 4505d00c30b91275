"""Places decoded sound on a clock by its timestamps: late starts, holes, overlaps, changes of rate.

Pure functions over plain values. Within a run the samples are contiguous, whatever the jitter of
the timestamps; a new run begins where timestamps say for longer that sound is missing or repeated.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from vllm_mm_ext.media.audio.conversion import convert_rate

# Timestamps off by no more are jitter. Containers that count in milliseconds are off by up to 1 ms,
# Vorbis in Ogg by up to 10 ms after short blocks; the shortest common packet lasts 20 ms.
TOLERANCE_S = 0.018
# Timestamps count where the median of so many in a row says the same.
_MEDIAN = 9
# Joined recordings of which the clock is known.
MAX_ORIGINS = 1000
# As the ffmpeg tool does in formats whose timestamps may start anew (`dts_delta_threshold`): a step
# back, or so far ahead, is a new clock and no overlap or hole.
_STEP_BACK_S = 0.1
STEP_AHEAD_S = 10.0
# Where pictures go on while the timestamps of the sound step back by no more, the sound overlaps.
# So far apart may sound and pictures be that lie beside each other in the file.
_OVERLAP_S = 1.0
# At a jump, the pictures before and behind the sound in the file that are looked at.
_NEAR = 4
# Among so many jumps in the file the next one of the decoded sound is sought.
_MAX_JUMPS = 1000
# The same for other formats (`dts_error_threshold`): such a timestamp cannot be true.
_IMPOSSIBLE_S = 30 * 3600.0


@dataclass(frozen=True, eq=False)
class Piece:
    """Some decoded samples.

    Attributes:
        samples: float32 mono ``[samples]``.
        rate: Their sampling rate in Hz.
        time: Seconds on the target clock at which they begin; None where it is not known.
    """

    samples: npt.NDArray[np.float32]
    rate: int
    time: float | None

    @property
    def seconds(self) -> float:
        """Duration."""
        return len(self.samples) / self.rate


@dataclass(frozen=True, eq=False)
class FileOrder:
    """Where packets of sound lie in the file among the pictures.

    Attributes:
        before: int64 ``[m]`` how many packets of pictures come before each packet of sound.
        sound: float64 ``[m]`` seconds on the container's clock of each packet of sound.
        stamps: float64 ``[n]`` seconds on the container's clock at which the pictures are shown, in
            the order of the file; NaN where not known.
        times: float64 ``[n]`` the same on the target clock; NaN for what is not shown.
    """

    before: npt.NDArray[np.int64]
    sound: npt.NDArray[np.float64]
    stamps: npt.NDArray[np.float64]
    times: npt.NDArray[np.float64]


class Clock:
    """Turns timestamps of a container into times on the target clock, in the order of decoding.

    Where the clock of the sound jumps, the pictures beside it in the file decide: sound is missing
    or overlaps if their timestamps say the same as those of the sound. Where they do not, or where
    nothing is known of pictures, the sound goes on without a gap.

    Args:
        origins: Seconds on the container's clock that are 0 on the target clock: one, or where the
            container's clock starts anew in the middle of the file one for each part of it. Empty
            lets the target clock begin with the first timestamp.
        restarts: The format's timestamps may start anew.
        joins: Files of the format are joined as they are: a timestamp that steps back to 0 begins
            the next file. A step ahead is missing sound in them.
        beside: Reads where the sound lies in the file; called only where its clock jumps, and where
            there are several ``origins``. None for sound without pictures.
    """

    def __init__(
        self,
        origins: Sequence[float],
        restarts: bool,
        beside: Callable[[], FileOrder] | None = None,
        *,
        joins: bool = False,
    ) -> None:
        self._joins = joins
        self._origin = origins[0] if origins else None
        self._has_parts = len(origins) > 1
        restarts = restarts or self._has_parts
        back = _OVERLAP_S if len(origins) == 1 else _STEP_BACK_S
        self._back = back if restarts else _IMPOSSIBLE_S
        self._ahead = STEP_AHEAD_S if restarts else _IMPOSSIBLE_S
        self._read_beside = beside
        self._beside: FileOrder | None = None
        # The packets of sound at which the clock jumps; those before it are done with.
        self._jumps = np.empty(0, np.int64)
        self._expected: float | None = None
        self._last: float | None = None

    def time(self, timestamp: float | None, seconds: float) -> float | None:
        """Time at which decoded samples begin; None before the first timestamp.

        Args:
            timestamp: Theirs, in seconds on the container's clock; None if they have none.
            seconds: Their duration.
        """
        # What comes with the timestamp of what went before says nothing about its own time.
        if timestamp is None or timestamp == self._last:
            time = self._expected
            if time is not None:
                self._expected = time + seconds
            return time
        self._last = timestamp
        if self._origin is None:
            self._origin = timestamp
        time = timestamp - self._origin
        expected = time if self._expected is None else self._expected
        is_first = self._expected is None and self._has_parts
        # Else it may be a wrong timestamp.
        is_joined = self._joins and abs(timestamp) <= _STEP_BACK_S < expected - time
        if is_first or is_joined or not -self._back <= time - expected <= self._ahead:
            self._origin = self._origin_of(timestamp, expected)
            time = timestamp - self._origin
        self._expected = time + seconds
        return time

    def _origin_of(self, timestamp: float, expected: float) -> float:
        """The origin after a jump."""
        stamps, times = self._pictures_beside(timestamp)
        if len(stamps):
            nearest = int(np.abs(stamps - timestamp).argmin())
            stamp, time = float(stamps[nearest]), float(times[nearest])
            if abs(timestamp - stamp) <= abs(expected - time) + _OVERLAP_S:
                return stamp - time
        return timestamp - expected

    def _pictures_beside(
        self, timestamp: float
    ) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
        """Timestamps and times of the pictures beside the next jump to ``timestamp`` in the file.

        Both are empty where nothing is known.
        """
        if self._beside is None and self._read_beside is not None:
            self._beside = self._read_beside()
            steps = np.diff(self._beside.sound, prepend=np.inf)
            self._jumps = np.flatnonzero((steps < -_STEP_BACK_S) | (steps > STEP_AHEAD_S))
        beside = self._beside
        if beside is not None:
            at = self._jumps[:_MAX_JUMPS]
            found = np.flatnonzero(np.abs(beside.sound[at] - timestamp) <= _OVERLAP_S)
            if len(found):
                place = int(beside.before[at[found[0]]])
                self._jumps = self._jumps[found[0] + 1 :]
                near = slice(max(0, place - _NEAR), place + _NEAR)
                stamps, times = beside.stamps[near], beside.times[near]
                known = ~np.isnan(stamps) & ~np.isnan(times)
                return stamps[known], times[known]
        return np.empty(0), np.empty(0)


def clock_origins(
    stamps: npt.NDArray[np.floating[Any]], times: npt.NDArray[np.floating[Any]]
) -> tuple[float, ...]:
    """The origins of the clocks of a video whose container's clock starts anew, for ``Clock``.

    Args:
        stamps: float64 ``[n]`` seconds on the container's clock at which pictures are shown.
        times: float64 ``[n]`` seconds of the same pictures on the target clock.

    Returns:
        One origin for each part, in the order of the pictures; at most ``MAX_ORIGINS``.
    """
    offsets = np.asarray(stamps - times, np.float64)
    if not len(offsets):
        return ()
    first = np.abs(np.diff(offsets, prepend=np.inf)) > _STEP_BACK_S
    return tuple(offsets[first][:MAX_ORIGINS].tolist())


def place(
    pieces: Sequence[Piece], end: float, max_samples: int
) -> tuple[npt.NDArray[np.float32], int, bool]:
    """The sound from second 0 to ``end`` of the target clock, without silence after its end.

    Where sound overlaps, what was decoded first stays, as with FFmpeg's ``aresample=async=1``.

    Args:
        pieces: In the order of decoding.
        end: Seconds.
        max_samples: Most samples.

    Returns:
        float32 ``[samples]``; the sampling rate in Hz, which is that of most of the sound; and
        whether there is sound after the end.
    """
    if not pieces:
        return np.empty(0, np.float32), 0, False
    seconds = np.array([piece.seconds for piece in pieces])
    rates = np.array([piece.rate for piece in pieces])
    kinds, kind_of = np.unique(rates, return_inverse=True)
    rate = int(kinds[np.argmax(np.bincount(kind_of, seconds))])
    runs = [(start, _joined(run, rate)) for start, run in _runs(pieces, seconds)]
    starts = [round(start * rate) for start, _ in runs]
    ends = [
        start + np.cumsum([len(part) for part in parts])
        for start, (_, parts) in zip(starts, runs, strict=True)
    ]
    whole = max(0, *(int(of_run[-1]) for of_run in ends))
    total = min(whole, max(0, math.ceil(end * rate - 1e-6)), max_samples)
    out = np.zeros(total, np.float32)
    filled = 0
    for start, stops, (_, parts) in zip(starts, ends, runs, strict=True):
        first, last = max(start, filled), min(int(stops[-1]), total)
        if first < last:
            low = int(np.searchsorted(stops, first, side="right"))
            wanted = parts[low : int(np.searchsorted(stops, last)) + 1]
            begin = int(stops[low]) - len(wanted[0])
            # Without a copy of the whole run, of which there may be hours.
            wanted[-1] = wanted[-1][: len(wanted[-1]) - (begin + sum(map(len, wanted)) - last)]
            wanted[0] = wanted[0][first - begin :]
            np.concatenate(wanted, out=out[first:last])
            filled = last
    return out[:filled], rate, whole > total


def _joined(run: Sequence[Piece], rate: int) -> list[npt.NDArray[np.float32]]:
    """The samples of a run at one rate, in parts."""
    if run[0].rate == rate:
        return [piece.samples for piece in run]
    samples = np.concatenate([piece.samples for piece in run])
    return [convert_rate(samples, run[0].rate, rate)]


def _runs(
    pieces: Sequence[Piece], seconds: npt.NDArray[np.float64]
) -> Iterator[tuple[float, list[Piece]]]:
    """Consecutive pieces of one rate that follow each other without a gap, each with its start."""
    before = np.concatenate([[0.0], np.cumsum(seconds)[:-1]])
    times = np.array([np.nan if piece.time is None else piece.time for piece in pieces])
    offsets = _steady(times - before)
    run: list[Piece] = []
    start = anchor = 0.0
    for piece, offset, count in zip(pieces, offsets.tolist(), before.tolist(), strict=True):
        moved = not run or abs(offset - anchor) > TOLERANCE_S
        if moved or piece.rate != run[0].rate:
            if run:
                yield start, run
            if moved:
                anchor = offset
            run, start = [], anchor + count
        run.append(piece)
    yield start, run


def _steady(offsets: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """How far timestamps are from counted samples, without jitter and single wrong timestamps.

    A median keeps steps where they are.

    Args:
        offsets: Seconds; NaN where there is no timestamp.
    """
    known = np.flatnonzero(~np.isnan(offsets))
    if not len(known):
        return np.zeros_like(offsets)
    # Without a timestamp, samples follow those before them.
    last = known[np.maximum(np.searchsorted(known, np.arange(len(offsets)), side="right") - 1, 0)]
    padded = np.pad(offsets[last], _MEDIAN // 2, mode="edge")
    windows = np.lib.stride_tricks.sliding_window_view(padded, _MEDIAN)
    return np.asarray(np.median(windows, axis=1), np.float64)
