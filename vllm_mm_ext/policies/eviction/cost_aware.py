"""Which cached item to evict: the one whose bytes are expected to save the least recomputation.

The score of an item is its value density: its cost per byte times the reuses that are expected per
time it is kept (``reuse.py``). GreedyDual-Size-Frequency (Cherkasova, HPL-98-69R1, 1998)
approximates the same quantity by a count of uses and a clock. This policy learns it, and so also
fits traffic whose items come back after a think time, or never (``docs/benchmarks.md`` compares
the two).
"""

from __future__ import annotations

import random
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator
from dataclasses import dataclass
from typing import Generic, TypeVar

from vllm_mm_ext.policies.eviction.reuse import ReuseModel
from vllm_mm_ext.policies.eviction.sampled_worst import SampledWorst

K = TypeVar("K", bound=Hashable)

# Events after which the model learns: few at first, then this many, and more where there are more
# items, so that the work per event is constant.
_FIRST_LESSON, _LESSON = 32, 256


@dataclass(slots=True)
class _Item:
    """An item, cached or evicted.

    Attributes:
        cost_density: What computing the item again takes, per unit of its size.
        uses: How often the item was used.
        last: The policy's clock at the item's last use.
    """

    cost_density: float
    uses: int
    last: int


class CostAware(Generic[K]):
    """Ranks cached items by value density; deterministic, without wall time.

    The policy neither holds the items nor counts capacity: the cache tells the policy what happens
    to items and asks it for a victim. The policy's clock counts uses of any item. Every operation
    takes constant time on average.

    Args:
        ghosts: Evicted keys that the policy remembers at most. Their uses count when they come
            back, and the policy learns from them what eviction has missed.
    """

    def __init__(self, ghosts: int = 4096) -> None:
        if ghosts < 0:
            raise ValueError(f"ghosts must be at least 0, got {ghosts}")
        self._limit = ghosts
        self.clear()

    def __contains__(self, key: object) -> bool:
        return key in self._items

    def __len__(self) -> int:
        return len(self._items)

    def admit(self, key: K, size: float, cost: float) -> None:
        """Take in an item that has just been computed; a cached item counts as used again.

        Args:
            key: Names the item.
            size: Its size in bytes (or blocks), above 0.
            cost: What computing it again takes, at least 0, in any one unit.

        Raises:
            ValueError: Size or cost is out of range.
        """
        if not (size > 0 and cost >= 0):
            raise ValueError(f"size must be above 0 and cost at least 0, got {size} and {cost}")
        if key in self._items:
            self.hit(key)
        else:
            self._clock += 1
            item = self._ghosts.pop(key, None)
            if item is None:
                item = _Item(0.0, 1, self._clock)
            else:
                self._reuse(item)
            self._items[key] = item
            self._evictable.add(key)
            self._lesson()
        self._items[key].cost_density = cost / size

    def hit(self, key: K) -> None:
        """Count a use of a cached item. Raises ``KeyError`` for an unknown one."""
        item = self._items[key]
        self._clock += 1
        self._reuse(item)
        self._evictable.rank_changed(key)
        self._lesson()

    def evict(self, key: K) -> None:
        """Drop an item to make room for others. Raises ``KeyError`` for an unknown one."""
        self._ghosts[key] = self._drop(key)
        if len(self._ghosts) > self._limit:
            _, ghost = self._ghosts.popitem(last=False)
            self._model.end(ghost.uses, self._clock - ghost.last, reused=False)

    def forget(self, key: K) -> None:
        """Drop an item as if it had never been there; unknown ones are ignored."""
        self._ghosts.pop(key, None)
        if key in self._items:
            self._drop(key)

    def clear(self) -> None:
        """Forget everything."""
        self._items: dict[K, _Item] = {}
        self._ghosts: OrderedDict[K, _Item] = OrderedDict()
        self._evictable: SampledWorst[K] = SampledWorst(self._rank, random.Random(0))
        self._model = ReuseModel()
        self._clock = 0
        self._events = 0

    def score(self, key: K) -> float:
        """The item's value density: recomputation that keeping it is expected to save now, per
        byte and time. Raises ``KeyError`` for an unknown item."""
        item = self._items[key]
        return item.cost_density * self._model.density(item.uses, self._clock - item.last)

    def victim(self, may_go: Callable[[K], bool] | None = None) -> K | None:
        """The item to evict next; None if there is none. The item stays until ``evict``.

        Args:
            may_go: Tells whether an item may be evicted now; without it every item may.
        """
        return self._evictable.worst(may_go)

    def order(self) -> Iterator[K]:
        """All items, lowest score first; of equals the longest unused one first. O(n log n)."""
        return iter(sorted(self._items, key=self._rank))

    def check_integrity(self) -> None:
        """Raise ``AssertionError`` unless items, candidates and limits agree; for tests."""
        self._evictable.check_integrity()
        assert len(self._evictable) == len(self._items)
        assert all(key in self._evictable for key in self._items)
        assert not self._ghosts.keys() & self._items.keys()
        assert len(self._ghosts) <= self._limit
        assert all(0 <= self.score(key) < float("inf") for key in self._items)

    def _rank(self, key: K) -> tuple[float, int]:
        return self.score(key), self._items[key].last

    def _reuse(self, item: _Item) -> None:
        self._model.end(item.uses, self._clock - item.last, reused=True)
        item.uses += 1
        item.last = self._clock

    def _drop(self, key: K) -> _Item:
        self._evictable.remove(key)
        return self._items.pop(key)

    def _lesson(self) -> None:
        self._events += 1
        pause = min(max(self._clock // 2, _FIRST_LESSON), _LESSON)
        if self._events < max(pause, (len(self._items) + len(self._ghosts)) // 4):
            return
        self._events = 0
        known = (*self._items.values(), *self._ghosts.values())
        self._model.learn([(item.uses, self._clock - item.last) for item in known])
