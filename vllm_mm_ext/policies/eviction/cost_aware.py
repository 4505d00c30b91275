"""Which cached item to evict: the one whose bytes are expected to save the least recomputation.

The score of an item is its value density: its cost per byte times the reuses that are expected per
time it is kept (``reuse.py``). GreedyDual-Size-Frequency (Cherkasova, HPL-98-69R1, 1998)
approximates the same quantity by a count of uses and a clock. This policy learns it, and so also
fits traffic whose items come back after a think time, or never (``docs/benchmarks.md`` compares
the two).
"""

from __future__ import annotations

import random
from collections.abc import Callable, Hashable, Iterator
from typing import Generic, TypeVar

from vllm_mm_ext.policies.eviction.reuse_history import ReuseHistory
from vllm_mm_ext.policies.eviction.sampled_worst import SampledWorst

K = TypeVar("K", bound=Hashable)


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
        self._history: ReuseHistory[K] = ReuseHistory(ghosts)
        self.clear()

    def __contains__(self, key: object) -> bool:
        return key in self._cost_density

    def __len__(self) -> int:
        return len(self._cost_density)

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
        if key in self._cost_density:
            self.hit(key)
        else:
            self._history.tick()
            self._history.add(key)
            self._evictable.add(key)
        self._cost_density[key] = cost / size

    def hit(self, key: K) -> None:
        """Count a use of a cached item. Raises ``KeyError`` for an unknown one."""
        self._history.tick()
        self._history.use(key)
        self._evictable.rank_changed(key)

    def evict(self, key: K) -> None:
        """Drop an item to make room for others. Raises ``KeyError`` for an unknown one."""
        self._history.evict(key)
        self._drop(key)

    def forget(self, key: K) -> None:
        """Drop an item as if it had never been there; unknown ones are ignored."""
        self._history.forget(key)
        if key in self._cost_density:
            self._drop(key)

    def clear(self) -> None:
        """Forget everything."""
        self._history.clear()
        self._cost_density: dict[K, float] = {}
        self._evictable: SampledWorst[K] = SampledWorst(self.score, random.Random(0))

    def score(self, key: K) -> float:
        """The item's value density: recomputation that keeping it is expected to save now, per
        byte and time. Raises ``KeyError`` for an unknown item."""
        return self._cost_density[key] * self._history.rate(key)

    def victim(self, may_go: Callable[[K], bool] | None = None) -> K | None:
        """The item to evict next; None if there is none. The item stays until ``evict``.

        Args:
            may_go: Tells whether an item may be evicted now; without it every item may.
        """
        return self._evictable.worst(may_go)

    def order(self) -> Iterator[K]:
        """All items, lowest score first. O(n log n)."""
        return iter(sorted(self._cost_density, key=self.score))

    def check_integrity(self) -> None:
        """Raise ``AssertionError`` unless items, candidates and limits agree; for tests."""
        self._evictable.check_integrity()
        self._history.check_integrity()
        assert len(self._evictable) == len(self._cost_density) == len(self._history)
        assert all(key in self._evictable and key in self._history for key in self._cost_density)

    def _drop(self, key: K) -> None:
        self._evictable.remove(key)
        del self._cost_density[key]
