"""Keys in the order of ranks that change one by one. Pure."""

from __future__ import annotations

from collections.abc import Hashable, Iterator
from itertools import islice
from typing import Any, Generic, TypeVar

from sortedcontainers import SortedDict  # type: ignore[import-untyped]

K = TypeVar("K", bound=Hashable)


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
