"""Which cached item to evict: the one whose bytes save the least recomputation.

GreedyDual-Size-Frequency (Cherkasova, "Improving WWW Proxies Performance with
Greedy-Dual-Size-Frequency Caching Policy", HPL-98-69R1, 1998; Arlitt et al., ACM SIGMETRICS
Performance Evaluation Review 27(4), 2000): an item scores ``clock + uses * cost / size``, and the
clock moves up to the score of whatever is evicted, so what is not used again ages away.
"""

from __future__ import annotations

import heapq
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator
from dataclasses import dataclass
from typing import Generic, TypeVar

K = TypeVar("K", bound=Hashable)


@dataclass(slots=True)
class _Item:
    size: float
    cost: float
    uses: int
    score: float
    order: int


class CostAware(Generic[K]):
    """Ranks cached items by what keeping them is worth; deterministic, without wall time.

    It neither holds the items nor counts capacity: the cache tells it what happens and asks for a
    victim. Every operation is O(log n).

    Args:
        ghosts: Evicted keys whose number of uses is remembered, so that an item that comes back
            is not taken for new.
    """

    def __init__(self, ghosts: int = 1024) -> None:
        if ghosts < 0:
            raise ValueError(f"ghosts must be at least 0, got {ghosts}")
        self._limit = ghosts
        self._items: dict[K, _Item] = {}
        self._ghosts: OrderedDict[K, int] = OrderedDict()
        # Entries whose order is not their item's are out of date and skipped.
        self._heap: list[tuple[float, int, K]] = []
        self._clock = 0.0
        self._orders = 0

    def __contains__(self, key: object) -> bool:
        return key in self._items

    def __len__(self) -> int:
        return len(self._items)

    def admit(self, key: K, size: float, cost: float) -> None:
        """Take in an item that has just been computed; one that is known counts as used again.

        Args:
            key: Names the item.
            size: Its size in bytes (or blocks), above 0.
            cost: What computing it again takes, at least 0, in any one unit.

        Raises:
            ValueError: Size or cost is out of range.
        """
        if not (size > 0 and cost >= 0):
            raise ValueError(f"size must be above 0 and cost at least 0, got {size} and {cost}")
        known = self._items.get(key)
        uses = known.uses if known is not None else self._ghosts.pop(key, 0)
        self._rank(key, size, cost, uses + 1)

    def hit(self, key: K) -> None:
        """Count a use of a cached item. Raises ``KeyError`` for an unknown one."""
        item = self._items[key]
        self._rank(key, item.size, item.cost, item.uses + 1)

    def evict(self, key: K) -> None:
        """Drop an item that made room for others. Raises ``KeyError`` for an unknown one."""
        item = self._items.pop(key)
        self._clock = max(self._clock, item.score)
        if self._limit:
            self._ghosts[key] = item.uses
            if len(self._ghosts) > self._limit:
                self._ghosts.popitem(last=False)
        self._compact()

    def forget(self, key: K) -> None:
        """Drop an item as if it had never been there; unknown ones are ignored."""
        self._items.pop(key, None)
        self._ghosts.pop(key, None)
        self._compact()

    def clear(self) -> None:
        """Forget everything."""
        self.__init__(self._limit)  # type: ignore[misc]

    def score(self, key: K) -> float:
        """What the item is worth keeping, relative to others. Raises ``KeyError`` if unknown."""
        return self._items[key].score

    def victim(self, may_go: Callable[[K], bool] | None = None) -> K | None:
        """The item to evict next; None if there is none. It stays until ``evict``.

        Args:
            may_go: Whether an item may be evicted now; all may without it. O(log n) for each item
                that it turns down.
        """
        held = []
        found: K | None = None
        while self._heap:
            entry = self._heap[0]
            if not self._current(entry):
                heapq.heappop(self._heap)
            elif may_go is None or may_go(entry[2]):
                found = entry[2]
                break
            else:
                held.append(heapq.heappop(self._heap))
        for entry in held:
            heapq.heappush(self._heap, entry)
        return found

    def order(self) -> Iterator[K]:
        """All items, those to go first first. O(n log n); for inspection and tests."""
        ranked = sorted((item.score, item.order, key) for key, item in self._items.items())
        return (key for _, _, key in ranked)

    def _rank(self, key: K, size: float, cost: float, uses: int) -> None:
        self._orders += 1
        item = _Item(size, cost, uses, self._clock + uses * cost / size, self._orders)
        self._items[key] = item
        heapq.heappush(self._heap, (item.score, item.order, key))
        self._compact()

    def _current(self, entry: tuple[float, int, K]) -> bool:
        item = self._items.get(entry[2])
        return item is not None and item.order == entry[1]

    def _compact(self) -> None:
        # At most half of the entries are out of date, so this is O(1) per operation on average.
        if len(self._heap) > 2 * len(self._items) + 64:
            self._heap = [(item.score, item.order, key) for key, item in self._items.items()]
            heapq.heapify(self._heap)
