"""Rendezvous hashing: the same key goes to the same server, and few keys move when servers do."""

from __future__ import annotations

from collections.abc import Iterable

from blake3 import blake3


def ranked(key: str, servers: Iterable[str]) -> list[str]:
    """Servers in the order in which a key prefers them.

    Highest random weight (Thaler and Ravishankar, 1998): each server's weight depends on the key
    and on that server's name alone, so a server that goes or comes moves only its own share of the
    keys.

    Args:
        key: What should stay together, for example the key of a medium.
        servers: Names of the servers; names that come twice count once.
    """
    return sorted(dict.fromkeys(servers), key=lambda server: _weight(key, server), reverse=True)


def _weight(key: str, server: str) -> tuple[bytes, str]:
    # The length keeps the pairs ("a", "bc") and ("ab", "c") apart.
    hasher = blake3(len(key).to_bytes(8, "little"))
    hasher.update(key.encode("utf-8", "surrogatepass"))
    hasher.update(server.encode("utf-8", "surrogatepass"))
    return hasher.digest(), server
