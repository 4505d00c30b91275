"""Spends a frame budget: one frame in every slot of time, then the best spots, then gaps."""

from __future__ import annotations

import heapq
import itertools
import math
from collections import Counter
from collections.abc import Iterable, Mapping

import numpy as np

from vllm_mm_ext.media.sampling.timeline import Indices, Times, gop_starts, second_of
from vllm_mm_ext.media.types import PacketTable

# A slot is at most this many uniform spacings long (a uniform spacing is the clip's duration over
# the budget). Each slot holds a frame, so no gap is wider than two slots, 7 spacings. The sampler
# promises at most 8; the rest is for clips that have no frame exactly where one is wanted.
_SLOT_SPACINGS = 3.5
# A frame that no spot asks for may lie this share of its gap beside the middle, to be cheap to
# decode.
_SLACK = 0.25


def allocate(
    packets: PacketTable,
    count: int,
    spots: Iterable[int],
    weight: Times,
    *,
    min_fps: float,
    max_fps: float,
    multiple_of: int = 1,
    taken: Mapping[int, int] | None = None,
) -> Indices:
    """Choose at most ``count`` frames.

    The clip is cut into equal slots of at most ``1 / min_fps`` seconds and at most
    ``_SLOT_SPACINGS`` uniform spacings. Each slot gets a frame: the best spot in the slot, or one
    near the slot's middle if it has no spot. The rest of the budget goes to ``spots`` in their
    order, then to the middle of whichever gap between chosen frames weighs most, until the budget
    is spent or every second is full.

    Args:
        packets: The packet table of the clip, ``n`` rows.
        count: The frame budget, 1 to ``n``.
        spots: Frame indices, most wanted first.
        weight: float64 ``[n]``, positive: a gap weighs as much as the frames in it together.
        min_fps: Least frames per second, as far as the budget goes.
        max_fps: Most frames in any whole second (one is always allowed).
        multiple_of: The number of frames is cut to a multiple of this, if there are that many.
        taken: Frames already chosen elsewhere in each whole second; they count for ``max_fps``.

    Returns:
        int64 ``[k]``, strictly increasing, ``k <= count``.
    """
    return _Allocation(packets, count, min_fps, max_fps, taken or {}).run(
        spots, weight, multiple_of
    )


class _Allocation:
    """One allocation: the frames taken so far, and how many of them each second and slot holds."""

    def __init__(
        self,
        packets: PacketTable,
        count: int,
        min_fps: float,
        max_fps: float,
        taken: Mapping[int, int],
    ) -> None:
        time = packets.time
        self._time, self._count, size = time, count, len(packets)
        duration = float(time[-1] - time[0])
        floor = math.ceil(duration * min_fps)
        self._slots = min(count, max(1, floor, math.ceil(count / _SLOT_SPACINGS)))
        part = (time - time[0]) / duration if duration > 0 else np.zeros(size)
        self._slot = np.minimum((part * self._slots + 1e-9).astype(np.int64), self._slots - 1)
        self._second = second_of(time)
        self._ceiling = max(1, math.floor(max_fps), math.ceil(min_fps))
        self._starts = gop_starts(packets)
        self._gop = np.searchsorted(self._starts, np.arange(size), side="right") - 1
        # Last frame of each GOP that is decoded anyway for a frame taken so far.
        self._reach = self._starts - 1
        self._chosen: dict[int, None] = {}
        self._in_slot: Counter[int] = Counter()
        self._in_second: Counter[int] = Counter(taken)

    def run(self, spots: Iterable[int], weight: Times, multiple_of: int) -> Indices:
        """Spend the budget; see ``allocate``."""
        occupied = len(np.unique(self._slot))
        free = self._count - occupied
        for index in spots:
            new_slot = not self._in_slot[int(self._slot[index])]
            if (new_slot or free > 0) and self._take(index):
                free -= not new_slot
        bounds = np.searchsorted(self._slot, np.arange(self._slots + 1))
        for slot, (low, high) in enumerate(itertools.pairwise(bounds.tolist())):
            if high > low and not self._in_slot[slot]:
                self._take(self._cheapest(low - 1, high))
        self._fill(weight)
        chosen = sorted(self._chosen)
        surplus = len(chosen) % multiple_of if len(chosen) >= multiple_of else 0
        for _ in range(surplus):
            chosen.remove(self._least_missed(chosen))
        return np.array(chosen, np.int64)

    def _take(self, index: int) -> bool:
        """Take a frame; False if it is taken already or its second is full."""
        second = int(self._second[index])
        if index in self._chosen or self._in_second[second] >= self._ceiling:
            return False
        self._chosen[index] = None
        self._in_second[second] += 1
        self._in_slot[int(self._slot[index])] += 1
        gop = self._gop[index]
        self._reach[gop] = max(self._reach[gop], index)
        return True

    def _cheapest(self, low: int, high: int) -> int:
        """The cheapest frame to decode near the middle of frames ``low`` and ``high`` (exclusive).

        ``low`` may be -1 and ``high`` the number of frames: the ends of the clip.
        """
        last = len(self._time) - 1
        start, end = self._time[max(low, 0)], self._time[min(high, last)]
        middle, slack = (start + end) / 2, (end - start) * _SLACK
        first = int(np.searchsorted(self._time, middle - slack))
        stop = int(np.searchsorted(self._time, middle + slack, side="right"))
        first, stop = max(low + 1, min(first, high - 1)), min(high, max(stop, low + 2))
        stop = max(stop, first + 1)
        window = np.arange(first, stop)
        cost = np.maximum(0, window - self._reach[self._gop[window]])
        # Among frames of equal cost, the one nearest to the middle.
        aside = np.abs(self._time[window] - middle)
        return int(window[np.lexsort((aside, cost))[0]])

    def _fill(self, weight: Times) -> None:
        """Split the heaviest gap until the budget is spent; parts get smaller, so this ends."""
        total = np.concatenate([[0.0], np.cumsum(weight)])
        order = [-1, *sorted(self._chosen), len(self._time)]
        heap: list[tuple[float, int, int]] = []

        def push(low: int, high: int) -> None:
            if high - low > 1:
                heapq.heappush(heap, (-float(total[high] - total[low + 1]), low, high))

        for low, high in itertools.pairwise(order):
            push(low, high)
        while heap and len(self._chosen) < self._count:
            _, low, high = heapq.heappop(heap)
            split = self._cheapest(low, high)
            self._take(split)
            push(low, split)
            push(split, high)

    def _least_missed(self, chosen: list[int]) -> int:
        """The frame taken last among those that do not empty their slot; else the last taken."""
        for index in reversed(self._chosen):
            slot = int(self._slot[index])
            if index in chosen and self._in_slot[slot] > 1:
                self._in_slot[slot] -= 1
                return index
        return next(index for index in reversed(self._chosen) if index in chosen)
