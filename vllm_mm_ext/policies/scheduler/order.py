"""Requests in order: by coming, and by what is left to do. Pure."""

from __future__ import annotations

from collections.abc import Hashable, Iterator
from itertools import islice
from typing import Any, Generic, TypeVar

from sortedcontainers import SortedDict  # type: ignore[import-untyped]

# A request's place among all in the order of coming; no two requests have the same. Where the
# server schedules by priority, the first value is vLLM's arrival time, in seconds: vLLM puts
# requests of equal priority in that order. Else it is 0, and the count of requests decides.
Order = tuple[float, int]
# Class, priority, work and order; the lowest goes first.
Rank = tuple[int, int, int, Order]

K = TypeVar("K", bound=Hashable)


def aged_after_s(aging_s: float) -> float:
    """Seconds after which a request is aged: later requests no longer pass it."""
    return aging_s / 2


class Ranking(Generic[K]):
    """Keys sorted by rank; placing or dropping one takes O(log n)."""

    def __init__(self) -> None:
        self._by_rank: Any = SortedDict()
        self._ranks: dict[K, Any] = {}

    def place(self, key: K, rank: Any) -> None:
        """Put a key where it belongs now.

        Args:
            key: Known or new.
            rank: Lower comes first; no two keys have the same.
        """
        known = self._ranks.get(key)
        if known == rank:
            return
        if known is not None:
            del self._by_rank[known]
        self._ranks[key] = rank
        self._by_rank[rank] = key

    def drop(self, key: K) -> None:
        """Take a key out.

        Raises:
            KeyError: It is not there.
        """
        del self._by_rank[self._ranks.pop(key)]

    def first(self, count: int) -> Iterator[K]:
        """Up to so many keys from the first on."""
        return islice(self._by_rank.values(), count)

    def __len__(self) -> int:
        return len(self._ranks)

    def __contains__(self, key: object) -> bool:
        return key in self._ranks

    def __iter__(self) -> Iterator[K]:
        return iter(self._by_rank.values())
