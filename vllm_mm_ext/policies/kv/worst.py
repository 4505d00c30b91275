"""A set that knows its worst members, without keeping all of them in order. Pure."""

from __future__ import annotations

import random
from collections.abc import Callable, Hashable
from typing import Generic, TypeVar

K = TypeVar("K", bound=Hashable)

# Of more members the worst goes of some drawn at random, and the next worst are remembered until
# only a few are left, which compete with those drawn then (cf. Psounis and Prabhakar, "Efficient
# randomized web-cache replacement schemes using samples from past eviction times", IEEE/ACM Trans.
# Networking 10(4), 2002).
_DRAWN = 64
_REMEMBERED = 16
_LEFT = 12


class Worst(Generic[K]):
    """Members by a rank that changes with time. Every operation takes constant time on average.

    Args:
        rank: The lowest one is the worst; no two members have the same second value.
        source: Of random numbers.
    """

    def __init__(self, rank: Callable[[K], tuple[float, int]], source: random.Random) -> None:
        self._rank = rank
        self._random = source
        self._members: list[K] = []
        self._place: dict[K, int] = {}
        self._remembered: dict[K, tuple[float, int]] = {}

    def __len__(self) -> int:
        return len(self._members)

    def __contains__(self, member: object) -> bool:
        return member in self._place

    def add(self, member: K) -> None:
        """Take in a member that is not there."""
        self._place[member] = len(self._members)
        self._members.append(member)

    def remove(self, member: K) -> None:
        """Drop a member. Raises ``KeyError`` for an unknown one."""
        place, last = self._place.pop(member), self._members.pop()
        self._remembered.pop(member, None)
        if place < len(self._members):
            self._members[place] = last
            self._place[last] = place

    def worst(self) -> K | None:
        """The member of the lowest rank, of few exactly and of many probably; None of none."""
        members, known = self._members, self._remembered
        if len(members) <= _REMEMBERED:
            return min(members, key=self._rank, default=None)
        if len(known) <= _LEFT:
            drawn = members
            if len(members) > _DRAWN:
                draw = self._random.random
                drawn = [members[int(draw() * len(members))] for _ in range(_DRAWN)]
            for member in drawn:
                known[member] = self._rank(member)
            ranked = sorted(known.items(), key=lambda entry: entry[1])
            known = self._remembered = dict(ranked[:_REMEMBERED])
        return next(iter(known))

    def check_integrity(self) -> None:
        """Raise ``AssertionError`` if members and places disagree."""
        assert len(self._members) == len(self._place)
        assert all(self._place[member] == i for i, member in enumerate(self._members))
        assert self._remembered.keys() <= self._place.keys()
