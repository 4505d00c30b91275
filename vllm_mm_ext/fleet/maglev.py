"""Maglev hashing (Eisenbud et al., NSDI 2016): a table of servers that changes little with them."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

# Envoy's default, a prime.
TABLE_SIZE = 65_537
_MASK = (1 << 64) - 1


def mixed(number: int) -> int:
    """A well mixed number of 64 bits (the finalizer of SplitMix64)."""
    number = (number + 0x9E3779B97F4A7C15) & _MASK
    number = ((number ^ (number >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    number = ((number ^ (number >> 27)) * 0x94D049BB133111EB) & _MASK
    return number ^ (number >> 31)


def maglev_table(servers: Sequence[int], size: int = TABLE_SIZE) -> Sequence[int]:
    """The server of each place, with as many places for each.

    Args:
        servers: Numbers of the servers, all different, at least one.
        size: Places of the table, a prime above the number of servers.

    Raises:
        ValueError: There are no servers, or more than places.
    """
    if not 0 < len(servers) <= size:
        raise ValueError(f"from 1 to {size} servers, got {len(servers)}")
    return _filled(tuple(servers), size)


# A table takes a good part of a second, and fleets have the same servers again and again.
@lru_cache(maxsize=8)
def _filled(servers: tuple[int, ...], size: int) -> Sequence[int]:
    places = [mixed(2 * server) % size for server in servers]
    skips = [mixed(2 * server + 1) % (size - 1) + 1 for server in servers]
    table = [-1] * size
    left = size
    while True:
        for number, server in enumerate(servers):
            place, skip = places[number], skips[number]
            while table[place] >= 0:
                place += skip
                if place >= size:
                    place -= size
            table[place] = server
            places[number] = place
            left -= 1
            if not left:
                return table
