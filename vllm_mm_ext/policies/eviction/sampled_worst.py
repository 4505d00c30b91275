"""A set that finds its worst member without keeping all members in order. Pure."""

from __future__ import annotations

import random
from collections.abc import Callable, Hashable, Iterable
from typing import Any, Generic, TypeVar

K = TypeVar("K", bound=Hashable)

# In a larger set, the worst of this many members drawn at random is taken. A set remembers the
# next worst of the drawn members; once few of those are left, they compete with newly drawn ones
# (cf. Psounis and Prabhakar, "Efficient randomized web-cache replacement schemes using samples from
# past eviction times", IEEE/ACM Trans. Networking 10(4), 2002).
DRAWN = 64
_REMEMBERED = 16
_LEFT = 12


class SampledWorst(Generic[K]):
    """Members whose ranks change with time. Every operation takes constant time on average.

    Args:
        rank: Tells a member's rank; the member of the lowest rank is the worst, of equal ones any.
        source: Of random numbers.
        drawn: Members drawn at a time; a set of so many is ranked exactly.
    """

    def __init__(self, rank: Callable[[K], Any], source: random.Random, drawn: int = DRAWN) -> None:
        self._draws = drawn
        self._rank = rank
        self._random = source
        self._members: list[K] = []
        self._place: dict[K, int] = {}
        self._remembered: dict[K, Any] = {}

    def __len__(self) -> int:
        return len(self._members)

    def __contains__(self, member: object) -> bool:
        return member in self._place

    def add(self, member: K) -> None:
        """Take in a member that is not in the set."""
        self._place[member] = len(self._members)
        self._members.append(member)

    def remove(self, member: K) -> None:
        """Drop a member.

        Raises:
            KeyError: The member is not in the set.
        """
        place, last = self._place.pop(member), self._members.pop()
        self._remembered.pop(member, None)
        if place < len(self._members):
            self._members[place] = last
            self._place[last] = place

    def rank_changed(self, member: K) -> None:
        """Note that a member's rank is no longer what the set may remember of it."""
        self._remembered.pop(member, None)

    def worst(self, may_go: Callable[[K], bool] | None = None) -> K | None:
        """The member of the lowest rank: of few members exactly, of many probably.

        Args:
            may_go: Tells whether a member may be chosen now; without it every member may.

        Returns:
            None if no member may be chosen.
        """
        members = self._members
        if len(members) > self._draws:
            if len(self._remembered) <= _LEFT:
                self._remember()
            for member in self._remembered:
                if may_go is None or may_go(member):
                    return member
            # All that the set remembers must stay.
            found = self._lowest(self._drawn(), may_go)
            if found is not None:
                return found
        return self._lowest(members, may_go)

    def _lowest(self, members: Iterable[K], may_go: Callable[[K], bool] | None) -> K | None:
        chosen = members if may_go is None else filter(may_go, members)
        return min(chosen, key=self._rank, default=None)

    def _drawn(self) -> list[K]:
        """Members drawn at random."""
        members = self._members
        draw = self._random.random
        return [members[int(draw() * len(members))] for _ in range(self._draws)]

    def _remember(self) -> None:
        """Draw members, and remember the worst of them and of those remembered."""
        for member in self._drawn():
            self._remembered[member] = self._rank(member)
        ranked = sorted(self._remembered.items(), key=lambda entry: entry[1])
        self._remembered = dict(ranked[:_REMEMBERED])

    def check_integrity(self) -> None:
        """Raise ``AssertionError`` if members and places disagree; for tests."""
        assert len(self._members) == len(self._place)
        assert all(self._place[member] == i for i, member in enumerate(self._members))
        assert self._remembered.keys() <= self._place.keys()
