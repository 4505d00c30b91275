"""Requests about the same media go to the same data-parallel rank. Pure."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

# A rank takes its own media while it has at most this many times the mean load...
_MOST_OVER_MEAN = 1.25
# ...or so many requests more than the mean, which decides where there are few.
_MOST_ABOVE_MEAN = 2.0


def preference(content: str, ranks: int) -> list[int]:
    """Ranks by how much they are preferred for some content, the most preferred first.

    Rendezvous hashing (Thaler and Ravishankar 1998): with one rank more or less, only the content
    of that rank moves.

    Args:
        content: Its digest.
        ranks: How many ranks there are.
    """

    def weight(rank: int) -> bytes:
        return hashlib.blake2b(f"{content}/{rank}".encode(), digest_size=8).digest()

    return sorted(range(ranks), key=weight, reverse=True)


def rank_for(content: str, loads: Sequence[float]) -> int | None:
    """Rank that a request about some content goes to; None leaves it to vLLM.

    Args:
        content: Digest of its media.
        loads: Requests running and waiting, by rank.

    Returns:
        The preferred rank, or the next in order of preference where that is overloaded. So content
        that spills over spills to one rank, not to all.
    """
    if len(loads) < 2:
        return None
    mean = sum(loads) / len(loads)
    most = max(_MOST_OVER_MEAN * mean, mean + _MOST_ABOVE_MEAN)
    return next(rank for rank in preference(content, len(loads)) if loads[rank] <= most)
