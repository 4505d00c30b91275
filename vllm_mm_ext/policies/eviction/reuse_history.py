"""Uses of cached items, and of items that were evicted: how soon each is expected again. Pure."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, replace
from itertools import chain, islice
from typing import Generic, TypeVar

from vllm_mm_ext.policies.eviction.reuse import ReuseModel

K = TypeVar("K", bound=Hashable)

# Uses after which the rates are learnt anew: few at first, then this many, and more where there are
# more items, so that the work per use is constant.
_FIRST_LESSON, _LESSON = 8, 256
# What was used in more than this share of all time, and so often, is shared by most requests.
_SHARED, _SHARED_USES = 0.5, 4
# Items that a lesson looks at, at most, so that it takes a few milliseconds: every second, third...
# stands for all.
_LOOKED_AT = 4096


@dataclass(slots=True)
class _History:
    """What is known of an item, cached or evicted.

    Attributes:
        uses: How often the item was used.
        last: The clock at the item's last use.
        kind: Kind of item; each kind is learnt by itself.
    """

    uses: int
    last: int
    kind: int


class ReuseHistory(Generic[K]):
    """How soon cached items are expected to be used again; learnt from when they are.

    Every operation takes constant time on average. An item that most requests share, as a system
    prompt, has the rate at which the item itself was used, and teaches nothing of others: the item
    always comes back at once, which others of its kind and age do not.

    Args:
        ghosts: Evicted keys that are remembered at most. Their uses count when they come back, and
            they teach what eviction has missed.
        levels: As for ``ReuseModel``, whose kinds of items these are.

    Attributes:
        remembers: Whether an item is known that was evicted.
    """

    def __init__(self, ghosts: int = 4096, levels: Sequence[float] = (1.0,)) -> None:
        if ghosts < 0:
            raise ValueError(f"ghosts must be at least 0, got {ghosts}")
        self._limit = ghosts
        self._levels = levels
        self.clear()

    def __contains__(self, key: object) -> bool:
        return key in self._items

    def __len__(self) -> int:
        return len(self._items)

    def clear(self) -> None:
        """Forget everything."""
        self._items: dict[K, _History] = {}
        self._ghosts: OrderedDict[K, _History] = OrderedDict()
        self.remembers = self._ghosts.__contains__
        self._model = ReuseModel(self._levels)
        self._uses = 0
        self._lesson_due = _FIRST_LESSON
        self._clock = 0

    def tick(self) -> None:
        """Let a unit of time pass."""
        self._clock += 1

    def add(self, key: K, kind: int = 0, like: K | None = None) -> None:
        """Take in an item that has just been computed.

        Args:
            key: Names the item, which is not cached.
            kind: Kind of item.
            like: A cached item that this one continues: it counts as used as often.
        """
        item = self._ghosts.pop(key, None)
        if item is None:
            uses = self._items[like].uses if like is not None else 1
            item = _History(uses, self._clock, kind)
        else:
            self._again(item)
        self._items[key] = item
        self._lesson()

    def use(self, key: K) -> None:
        """Count a use of a cached item. Raises ``KeyError`` for an unknown one."""
        item = self._items[key]
        self._again(item)
        self._lesson()

    def divide(self, key: K, rest: K) -> None:
        """Note that a part of an item is an item of its own from now on, with the same past."""
        self._ghosts.pop(rest, None)
        self._items[rest] = replace(self._items[key])

    def evict(self, key: K) -> None:
        """Drop an item to make room for others. Raises ``KeyError`` for an unknown one."""
        self._ghosts[key] = self._items.pop(key)
        if len(self._ghosts) > self._limit:
            _, ghost = self._ghosts.popitem(last=False)
            self._model.end(ghost.kind, ghost.uses, self._clock - ghost.last, reused=False)

    def forget(self, key: K) -> None:
        """Drop an item as if it had never been there; unknown ones are ignored."""
        self._ghosts.pop(key, None)
        self._items.pop(key, None)

    def rate(self, key: K) -> float:
        """Reuses of an item that are expected per time it is kept.

        Raises:
            KeyError: The item is unknown.
        """
        item = self._items[key]
        # The count first: it rules most items out, and all that are ranked come here.
        if item.uses >= _SHARED_USES and self._shared(item):
            return item.uses / self._clock
        return self._model.density(item.kind, item.uses, self._clock - item.last)

    def check_integrity(self) -> None:
        """Raise ``AssertionError`` unless items and limits agree; for tests."""
        assert not self._ghosts.keys() & self._items.keys()
        assert len(self._ghosts) <= self._limit
        assert all(0 <= self.rate(key) < float("inf") for key in self._items)

    def _shared(self, item: _History) -> bool:
        return item.uses > _SHARED * self._clock > 0 and item.uses >= _SHARED_USES

    def _again(self, item: _History) -> None:
        if not self._shared(item):
            self._model.end(item.kind, item.uses, self._clock - item.last, reused=True)
        item.uses += 1
        item.last = self._clock

    def _lesson(self) -> None:
        self._uses += 1
        if self._uses < self._lesson_due:
            return
        known = len(self._items) + len(self._ghosts)
        self._lesson_due += max(min(max(self._uses // 4, _FIRST_LESSON), _LESSON), known // 4)
        every = -(-known // _LOOKED_AT)
        items = islice(chain(self._items.values(), self._ghosts.values()), 0, None, every)
        self._model.learn(
            ((item.kind, item.uses, self._clock - item.last) for item in items), every
        )
