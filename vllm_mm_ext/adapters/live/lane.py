"""CPU work of live sessions in a few threads that all sessions share."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import Executor, Future
from typing import Any, ParamSpec, TypeVar

P = ParamSpec("P")
T = TypeVar("T")


class Lane:
    """The work of one session, one piece at a time, so sessions take turns in the threads.

    Args:
        threads: Where the work runs, in the order in which it comes.
    """

    def __init__(self, threads: Executor) -> None:
        self._threads = threads
        self._piece: Future[Any] | None = None

    async def run(self, work: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Run ``work`` in a thread; the caller waits for it before it runs more."""
        self._piece = self._threads.submit(work, *args, **kwargs)
        try:
            return await asyncio.wrap_future(self._piece)
        finally:
            # An error leads to this frame by its traceback, and must not be led to by it.
            if self._piece is not None and self._piece.done():
                self._piece = None

    async def end(self) -> None:
        """Wait until no thread works for the session, whatever has become of its callers."""
        piece, self._piece = self._piece, None
        if piece is not None:
            await asyncio.gather(asyncio.wrap_future(piece), return_exceptions=True)
