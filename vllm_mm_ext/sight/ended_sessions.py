"""What became of the files that live sessions were sent, for takedowns. Pure."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Collection
from dataclasses import dataclass

# Hashes that are remembered of a session, about 150 bytes each; those of its last prompt in any
# case. A session with a prompt a second has as many in four hours.
_MOST_OF_SESSION = 1 << 14
# Files and hashes of all sessions that have ended, about 100 bytes each.
MOST_OF_ENDED = 1 << 18


class SessionHashes:
    """vLLM's hashes of the mm items of a session's prompts; the oldest ones are forgotten.

    Args:
        most: Hashes that are remembered, if no prompt has half as many.
    """

    def __init__(self, most: int = _MOST_OF_SESSION) -> None:
        self._most = most
        self._older: set[str] = set()
        self._latest: set[str] = set()

    def latest(self) -> set[str]:
        """The set to which the next prompt adds its hashes, from another thread perhaps."""
        if len(self._latest) >= self._most // 2:
            self._older, self._latest = self._latest, set()
        return self._latest

    def all(self) -> set[str]:
        """The hashes that are remembered."""
        return self._older | self._latest


@dataclass(frozen=True, slots=True)
class _Ended:
    files: frozenset[bytes]
    hashes: frozenset[str]
    ended: float


class EndedSessions:
    """The sessions that ended last, not more than have ``most`` files and hashes together.

    For one event loop.

    Args:
        most: Files and hashes remembered at most; the session that ended last is remembered in any
            case.
    """

    def __init__(self, most: int = MOST_OF_ENDED) -> None:
        self._most = most
        self._sessions: deque[_Ended] = deque()
        self._count = 0

    def add(self, files: Collection[bytes], hashes: Collection[str]) -> None:
        """Remember a session that has ended, if anything was made of its files.

        Args:
            files: The first halves of the BLAKE3 digests of the files that its client sent.
            hashes: vLLM's hashes of the mm items of its prompts.
        """
        if not files or not hashes:
            return
        self._sessions.append(_Ended(frozenset(files), frozenset(hashes), time.monotonic()))
        self._count += len(files) + len(hashes)
        while self._count > self._most and len(self._sessions) > 1:
            first = self._sessions.popleft()
            self._count -= len(first.files) + len(first.hashes)

    def hashes_of(self, digests: Collection[str]) -> set[str]:
        """vLLM's hashes of the mm items of all sessions with one of these files."""
        files = first_halves(digests)
        found = (one.hashes for one in self._sessions if not one.files.isdisjoint(files))
        return set[str]().union(*found)

    def forget(self, digests: Collection[str], before: float) -> None:
        """Forget the sessions with one of these files.

        Args:
            digests: Of the files.
            before: Value of ``time.monotonic()``; sessions that have ended since are not forgotten.
        """
        files = first_halves(digests)
        sessions, self._sessions = self._sessions, deque()
        self._count = 0
        for one in sessions:
            if one.ended >= before or one.files.isdisjoint(files):
                self._sessions.append(one)
                self._count += len(one.files) + len(one.hashes)


def first_halves(digests: Collection[str]) -> set[bytes]:
    """The first halves of the digests of files, by which live sessions know files.

    Args:
        digests: Hex BLAKE3 each; what stands for a digest that is not known (``unknown_digest``) is
            left out.
    """
    return {bytes.fromhex(digest[:32]) for digest in digests if ":" not in digest}
