"""Which cached item to evict: the one whose bytes are expected to save the least recomputation.

An item scores its cost per byte times the reuses expected per time it is kept (``reuse.py``). That
is the quantity which GreedyDual-Size-Frequency (Cherkasova, HPL-98-69R1, 1998) approximates by a
count of uses and a clock; learning it also fits traffic whose items come back after a think time,
or never (``docs/benchmarks.md`` compares them).
"""

from __future__ import annotations

import random
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterable, Iterator
from dataclasses import dataclass
from typing import Generic, TypeVar

from vllm_mm_ext.policies.eviction.reuse import ReuseModel

K = TypeVar("K", bound=Hashable)

# Of more items than this so many are drawn, and the worst of them goes. On average it is among the
# worst 1.5 % of all (cf. Psounis and Prabhakar, IEEE/ACM Trans. Networking 10(4), 2002).
_SAMPLE = 64
# Events after which the model learns: few at first, then this many, and more where there are more
# items, so that the work per event is constant.
_FIRST_LESSON, _LESSON = 32, 256


@dataclass(slots=True)
class _Item:
    worth: float
    uses: int
    last: int


class CostAware(Generic[K]):
    """Ranks cached items by what keeping them is worth; deterministic, without wall time.

    It neither holds the items nor counts capacity: the cache tells it what happens and asks for a
    victim. Time is the number of uses so far. Every operation takes constant time on average.

    Args:
        ghosts: Evicted keys that are remembered: their uses count when they come back, and it is
            learnt from them what eviction has missed.
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
            self._place[key] = len(self._keys)
            self._keys.append(key)
            self._lesson()
        self._items[key].worth = cost / size

    def hit(self, key: K) -> None:
        """Count a use of a cached item. Raises ``KeyError`` for an unknown one."""
        item = self._items[key]
        self._clock += 1
        self._reuse(item)
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
        # The same keys as a list, to draw from, and where each of them stands in it.
        self._keys: list[K] = []
        self._place: dict[K, int] = {}
        self._model = ReuseModel()
        self._clock = 0
        self._events = 0
        self._random = random.Random(0)

    def score(self, key: K) -> float:
        """What the item is worth keeping now, per byte. Raises ``KeyError`` if unknown."""
        item = self._items[key]
        return item.worth * self._model.density(item.uses, self._clock - item.last)

    def victim(self, may_go: Callable[[K], bool] | None = None) -> K | None:
        """The item to evict next; None if there is none. It stays until ``evict``.

        Args:
            may_go: Whether an item may be evicted now; all may without it.
        """
        if len(self._keys) > _SAMPLE:
            drawn = self._random.sample(self._keys, _SAMPLE)
            found = self._worst(drawn if may_go is None else filter(may_go, drawn))
            if found is not None:
                return found
        return self._worst(self._keys if may_go is None else filter(may_go, self._keys))

    def order(self) -> Iterator[K]:
        """All items, lowest score first; of equals the longest unused one first. O(n log n)."""
        return iter(sorted(self._items, key=self._rank))

    def check_integrity(self) -> None:
        """Raise ``AssertionError`` unless keys, places and limits agree; for tests."""
        assert len(self._keys) == len(self._place) == len(self._items)
        assert all(self._place[key] == place for place, key in enumerate(self._keys))
        assert self._place.keys() == self._items.keys()
        assert not self._ghosts.keys() & self._items.keys()
        assert len(self._ghosts) <= self._limit
        assert all(0 <= self.score(key) < float("inf") for key in self._items)

    def _rank(self, key: K) -> tuple[float, int]:
        return self.score(key), self._items[key].last

    def _worst(self, keys: Iterable[K]) -> K | None:
        return min(keys, key=self._rank, default=None)

    def _reuse(self, item: _Item) -> None:
        self._model.end(item.uses, self._clock - item.last, reused=True)
        item.uses += 1
        item.last = self._clock

    def _drop(self, key: K) -> _Item:
        place, last = self._place.pop(key), self._keys.pop()
        if last != key:
            self._keys[place] = last
            self._place[last] = place
        return self._items.pop(key)

    def _lesson(self) -> None:
        self._events += 1
        pause = min(max(self._clock // 2, _FIRST_LESSON), _LESSON)
        if self._events < max(pause, (len(self._items) + len(self._ghosts)) // 4):
            return
        self._events = 0
        known = (*self._items.values(), *self._ghosts.values())
        self._model.learn([(item.uses, self._clock - item.last) for item in known])
