"""Replies about windows that are kept for later questions: notes, and how much a window matters."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Awaitable, Callable
from time import monotonic

from cachetools import TTLCache

from vllm_mm_ext.long_video.asking import Reply

# Bytes of a kept reply besides its text: its key, its fields, its place in the store.
_OVERHEAD = 1024


class NoteStore:
    """Keeps replies by digest, bounded in bytes, each for a time. For one event loop.

    Concurrent calls for one reply ask once: the others wait, and where the one that asks fails or
    is cancelled, one of the others asks for itself. So no request depends on another one. A reply
    that was asked for before ``clear`` is not kept.

    Args:
        max_bytes: Bytes of all replies; the least recently used ones go first.
        ttl_s: Seconds for which a reply is kept.
        now: The clock, in seconds.
    """

    def __init__(self, max_bytes: int, ttl_s: float, now: Callable[[], float] = monotonic) -> None:
        self._replies: TTLCache[str, Reply] = TTLCache(max_bytes, ttl_s, now, _size_of)
        self._asking: dict[str, asyncio.Event] = {}
        self._clears = 0

    async def reply(self, key: str, ask: Callable[[], Awaitable[Reply]]) -> tuple[Reply, bool]:
        """The reply that is kept under a key, or else the one that ``ask`` gets.

        Args:
            key: Digest of everything that the reply depends on.
            ask: Asks the model.

        Returns:
            The reply, with what it took when it was made, and whether it was kept.
        """
        while (kept := self._replies.get(key)) is None:
            if (asking := self._asking.get(key)) is not None:
                await asking.wait()
                continue
            done = self._asking[key] = asyncio.Event()
            clears = self._clears
            try:
                reply = await ask()
                if clears == self._clears and _size_of(reply) <= self._replies.maxsize:
                    self._replies[key] = reply
                return reply, False
            finally:
                del self._asking[key]
                done.set()
        return kept, True

    def kept(self, key: str) -> Reply | None:
        """The reply that is kept under a key."""
        return self._replies.get(key)

    def clear(self) -> None:
        """Forget all replies."""
        self._replies.clear()
        self._clears += 1

    @property
    def num_bytes(self) -> int:
        """Bytes of the replies that are kept."""
        self._replies.expire()
        return int(self._replies.currsize)

    def __len__(self) -> int:
        self._replies.expire()
        return len(self._replies)


def _size_of(reply: Reply) -> int:
    return _OVERHEAD + sys.getsizeof(reply.text) + sum(map(sys.getsizeof, reply.chances))
