"""Which replica a request goes to: the ways that routers in front of vLLM have."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from typing import Protocol

from vllm_mm_ext.fleet.maglev import maglev_table, mixed

# `hash_balance_factor` of configs/routers/envoy.yaml: hundredths of the mean of requests in flight.
BALANCE_FACTOR = 120


class Router(Protocol):
    """A router. It is told which replicas serve before it is asked."""

    def serve_by(self, replicas: Sequence[int]) -> None:
        """These replicas serve from now on, at least one."""

    def choose(self, session: int, media: int, loads: Sequence[int], total: int) -> int:
        """The replica of a request.

        Args:
            session: Number of its conversation.
            media: Number of the first medium of the conversation; -1: none.
            loads: Requests in flight by replica.
            total: Requests in flight on all replicas.
        """


class RandomRouter:
    """Any replica.

    Args:
        seed: Of the choices.
    """

    def __init__(self, seed: int) -> None:
        self._random = random.Random(seed).random
        self._replicas: list[int] = []

    def serve_by(self, replicas: Sequence[int]) -> None:
        """As of ``Router``."""
        self._replicas = list(replicas)

    def choose(self, session: int, media: int, loads: Sequence[int], total: int) -> int:  # noqa: ARG002
        """As of ``Router``."""
        return self._replicas[int(self._random() * len(self._replicas))]


class RoundRobin:
    """One replica after the other."""

    def __init__(self) -> None:
        self._replicas: list[int] = []
        self._last = -1

    def serve_by(self, replicas: Sequence[int]) -> None:
        """As of ``Router``."""
        self._replicas = list(replicas)

    def choose(self, session: int, media: int, loads: Sequence[int], total: int) -> int:  # noqa: ARG002
        """As of ``Router``."""
        self._last = (self._last + 1) % len(self._replicas)
        return self._replicas[self._last]


class Hashed:
    """The same key goes to the same replica, by a Maglev table as Envoy has one.

    Args:
        by_media: The key is the first medium of the conversation, if there is one; else, and
            otherwise, its session.
        balance: Replicas with more requests in flight than so many hundredths of the mean are
            passed over, in an order that depends on the key (Envoy's rule); 0: none is.
    """

    def __init__(self, *, by_media: bool, balance: int = 0) -> None:
        self._by_media = by_media
        self._balance = balance
        self._replicas: list[int] = []
        self._table: Sequence[int] = ()

    def serve_by(self, replicas: Sequence[int]) -> None:
        """As of ``Router``."""
        self._replicas = list(replicas)
        self._table = maglev_table(self._replicas)

    def choose(self, session: int, media: int, loads: Sequence[int], total: int) -> int:
        """As of ``Router``."""
        # Sessions and media have numbers of their own each.
        key = mixed(2 * media if self._by_media and media >= 0 else 2 * session + 1)
        chosen = self._table[key % len(self._table)]
        if not self._balance:
            return chosen
        count = len(self._replicas)
        of_all = math.ceil((total + 1) * self._balance / 100)
        slots = max(1, math.ceil(of_all / count))
        if loads[chosen] <= slots:
            return chosen
        for _ in range(2 * count):
            key = mixed(key)
            other = self._replicas[key % count]
            if loads[other] <= slots:
                return other
        return min(self._replicas, key=loads.__getitem__)


ROUTERS: dict[str, Callable[[int], Router]] = {
    "random": RandomRouter,
    "round-robin": lambda _: RoundRobin(),
    "session": lambda _: Hashed(by_media=False),
    "media-key": lambda _: Hashed(by_media=True, balance=BALANCE_FACTOR),
    "media-key-unbounded": lambda _: Hashed(by_media=True),
}
