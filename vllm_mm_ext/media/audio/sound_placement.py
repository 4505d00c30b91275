"""Places decoded sound on a clock by its timestamps: late starts, holes, overlaps, changes of rate.

Pure functions over plain values. Within a run the samples are contiguous, whatever the jitter of
the timestamps; a new run begins where timestamps say for longer that sound is missing or repeated.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
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
_OVERLAP_S = 1.0
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


class Clock:
    """Turns timestamps of a container into times on the target clock, in the order of decoding.

    Where the clock of the sound seems to jump, the clock of the pictures decides: sound lies in the
    part of the file whose pictures are shown at its time, however much of it is missing in between.
    Where the pictures do not tell, or say that sound would lie before sound that came before it,
    the sound goes on without a gap.

    Args:
        origins: Seconds on the container's clock that are 0 on the target clock: one, or where the
            container's clock starts anew in the middle of the file one for each part of it. Empty
            lets the target clock begin with the first timestamp.
        restarts: The format's timestamps may start anew.
        begins: Seconds on the target clock at which the pictures of each of these parts begin;
            empty where the clock of the pictures is not known.
    """

    def __init__(
        self, origins: Sequence[float], restarts: bool, begins: Sequence[float] = ()
    ) -> None:
        # What comes before the first picture belongs to the first part.
        starts = [-math.inf, *begins[1:]] if begins else []
        ends = [*starts[1:], math.inf]
        self._origin = origins[0] if origins else None
        restarts = restarts or len(origins) > 1
        self._parts = list(zip(origins, starts, ends, strict=False)) if restarts else []
        back = _OVERLAP_S if len(origins) == 1 else _STEP_BACK_S
        self._back = back if restarts else _IMPOSSIBLE_S
        self._ahead = STEP_AHEAD_S if restarts else _IMPOSSIBLE_S
        self._expected: float | None = None
        # Where sound would go on if no step ahead so far were true: a timestamp may be wrong.
        self._surely = math.inf
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
                self._went_on(time, seconds)
            return time
        self._last = timestamp
        if self._expected is None:
            within = (o for o, *part in self._parts if _is_in(part, timestamp - o))
            self._origin = next(within, timestamp if self._origin is None else self._origin)
        assert self._origin is not None
        time = timestamp - self._origin
        if self._expected is not None and not -self._back <= time - self._expected <= self._ahead:
            self._origin = self._origin_of(timestamp, self._expected)
            time = timestamp - self._origin
        self._went_on(time, seconds)
        return time

    def _went_on(self, time: float, seconds: float) -> None:
        self._expected = time + seconds
        self._surely = min(self._surely, time) + seconds

    def _origin_of(self, timestamp: float, expected: float) -> float:
        """The origin after a jump."""
        for after in (expected, self._surely):
            possible = [
                origin
                for origin, *part in self._parts
                if -_OVERLAP_S <= timestamp - origin - after <= _IMPOSSIBLE_S
                and _is_in(part, timestamp - origin)
            ]
            if possible:
                return min(possible, key=lambda origin: abs(timestamp - origin - after))
        return timestamp - expected


def _is_in(part: Sequence[float], time: float) -> bool:
    """Whether a time lies between the two of ``part``; sound may overlap the next part a little."""
    return part[0] - _OVERLAP_S <= time <= part[1] + _OVERLAP_S


def clock_parts(
    stamps: npt.NDArray[np.floating[Any]], times: npt.NDArray[np.floating[Any]]
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """The parts of a video whose container's clock starts anew, for ``Clock``.

    Args:
        stamps: float64 ``[n]`` seconds on the container's clock at which pictures are shown.
        times: float64 ``[n]`` seconds of the same pictures on the target clock.

    Returns:
        For each part, in the order of the pictures, its origin; and the seconds on the target clock
        at which it begins. At most ``MAX_ORIGINS`` of each.
    """
    offsets = np.asarray(stamps - times, np.float64)
    if not len(offsets):
        return (), ()
    first = np.flatnonzero(np.abs(np.diff(offsets, prepend=np.inf)) > _STEP_BACK_S)[:MAX_ORIGINS]
    return tuple(offsets[first].tolist()), tuple(times[first].tolist())


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
