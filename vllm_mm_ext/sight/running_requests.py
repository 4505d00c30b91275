"""The requests that an API server is serving, and the end of those about media that must go."""

from __future__ import annotations

import asyncio
import itertools
import time
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

from vllm_mm_ext.request.trace import RequestTrace
from vllm_mm_ext.sight.request_log import Arrival, RequestLog, record_of

# Seconds between two looks whether requests have ended.
_LOOK_S = 0.02


@dataclass(eq=False)
class Running:
    """A request under way.

    Attributes:
        arrival: Of the request.
        trace: What was done for it so far.
        task: That took the request. vLLM serves some routes in another one (``trace.tasks``).
        started: Value of ``time.perf_counter()`` at its beginning.
        taken_down: It ends because of its media.
    """

    arrival: Arrival
    trace: RequestTrace
    task: asyncio.Task[Any] | None
    started: float
    taken_down: bool = False

    def uses(
        self,
        digests: Collection[str],
        urls: Collection[str],
        hashes: frozenset[str] = frozenset(),
    ) -> bool:
        """Whether the request is about one of these files, or of these URLs.

        Args:
            digests: Of the files.
            urls: Of the files.
            hashes: vLLM's hashes of mm items of the files, for media that the request names by
                their `uuid` alone.
        """
        trace = self.trace
        return (
            any(url in urls or digest in digests for url, digest in trace.held.items())
            or any(item.url in urls or item.known_digest in digests for item in trace.media)
            or any(image.url in urls or image.digest in digests for image in trace.images)
            or not trace.named.isdisjoint(hashes)
        )

    def end(self) -> None:
        """End the request, because of its media."""
        self.taken_down = True
        for task in (self.task, *self.trace.tasks):
            if task is not None:
                task.cancel()

    async def left(self) -> None:
        """Wait until no other task serves the request."""
        if others := self.trace.tasks - {self.task}:
            await asyncio.wait(others)

    @property
    def settled(self) -> bool:
        """Whether the request knows all its media, as far as it ever will."""
        trace = self.trace
        if not all(trace.held.values()):
            return False
        return not (trace.media or trace.images) or (
            bool(trace.tokens)
            and all(item.known_digest or item.report is not None for item in trace.media)
            and all(image.width for image in trace.images)
        )


class RunningRequests:
    """Follows the requests of one API server, if an operator wants to see them.

    Attributes:
        log: Where requests go that have ended; None follows none.
    """

    def __init__(self) -> None:
        self.log: RequestLog | None = None
        self._running: dict[str, Running] = {}
        self._numbers = itertools.count(1)
        self._prefix = ""

    def follow(self, log: RequestLog, server: int) -> None:
        """Follow requests from now on.

        Args:
            log: Where requests go that have ended.
            server: Index of this API server, which is part of their ids.
        """
        self.log = log
        self._prefix = f"{server}-"

    def begin(self, path: str, trace: RequestTrace) -> Running | None:
        """A request that the current task begins to serve; None if requests are not followed."""
        if self.log is None:
            return None
        arrival = Arrival(f"{self._prefix}{next(self._numbers)}", path, time.time())
        running = Running(arrival, trace, asyncio.current_task(), time.perf_counter())
        trace.watched = True
        self._running[arrival.id] = running
        return running

    def end(self, running: Running, status: int) -> None:
        """Note that a request was answered; it ends with the last task that serves it.

        A request with media that has ended goes to the log.

        Args:
            running: From ``begin``.
            status: HTTP status; 0 where there was no answer.
        """
        # Responses in the background are made after the answer.
        if going_on := [task for task in running.trace.tasks - {running.task} if not task.done()]:
            going_on[0].add_done_callback(lambda _: self.end(running, status))
            return
        self._running.pop(running.arrival.id, None)
        trace = running.trace
        if self.log is None or not (trace.media or trace.images or trace.long_video):
            return
        seconds = time.perf_counter() - running.started
        if running.taken_down:
            trace.refused = trace.refused or "taken_down"
        self.log.add(record_of(running.arrival, trace, seconds, status))

    def now(self) -> list[dict[str, Any]]:
        """The requests with media that are being served, the first one first."""
        now = time.perf_counter()
        return [
            {
                "id": running.arrival.id,
                "path": running.arrival.path,
                "seconds": round(now - running.started, 2),
                # The videos of a long video are among the media only if one prompt shows them.
                "media": len(running.trace.media or running.trace.held) + len(running.trace.images),
                "tokens": dict(running.trace.tokens),
                "stage": running.trace.timeline[-1].stage if running.trace.timeline else "",
            }
            for running in self._running.values()
            if running.trace.media or running.trace.held or running.trace.images
        ]

    def hashes(self) -> set[str]:
        """vLLM's hashes of the mm items of the requests under way that nobody has ended."""
        # Other threads add to these sets: none may be looped over in Python.
        return set[str]().union(
            *(one.trace.hashes for one in self._running.values() if not one.taken_down)
        )

    def named(self) -> set[str]:
        """vLLM's hashes of the mm items that these requests name by their `uuid` alone."""
        return set[str]().union(
            *(one.trace.named for one in self._running.values() if not one.taken_down)
        )

    def naming(self, hashes: Collection[str]) -> int:
        """Number of requests that name some mm items by their `uuid` alone, and go on.

        Args:
            hashes: vLLM's hashes of the items.
        """
        wanted = frozenset(hashes)
        return sum(
            not (one.taken_down or one.trace.named.isdisjoint(wanted))
            for one in self._running.values()
        )

    def about(self, digests: Collection[str], urls: Collection[str]) -> list[RequestTrace]:
        """The traces of the requests about some files, or URLs, that nobody has ended."""
        return [
            one.trace
            for one in self._running.values()
            if not one.taken_down and one.uses(digests, urls)
        ]

    async def cancel(
        self,
        digests: Collection[str],
        urls: Collection[str],
        hashes: Collection[str],
        timeout_s: float,
    ) -> tuple[int, int, list[RequestTrace]]:
        """End the requests about some files, those that do not know yet what they are about too.

        Args:
            digests: Of the files.
            urls: Of the files.
            hashes: vLLM's hashes of the mm items that may have been made of the files.
            timeout_s: Seconds to wait for requests to end, or to know their media.

        Returns:
            Number of requests that were ended, of those that may still use the files, and the
            traces of those about the files.
        """
        first, known = set(self._running), frozenset(hashes)
        about: dict[str, RequestTrace] = {}
        ended: set[str] = set()
        deadline = time.monotonic() + timeout_s
        while True:
            waiting = 0
            for name in first & self._running.keys():
                running = self._running[name]
                if running.uses(digests, urls, known):
                    about[name] = running.trace
                    if not running.taken_down:
                        running.end()
                        ended.add(name)
                    waiting += 1
                elif not running.settled:
                    waiting += 1
            if not waiting or time.monotonic() > deadline:
                return len(ended), waiting, [*about.values()]
            await asyncio.sleep(_LOOK_S)
