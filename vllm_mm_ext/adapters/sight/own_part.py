"""One API server's part of what an operator sees and does; the others ask it for it."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Awaitable, Callable, Collection, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

from vllm_mm_ext.adapters.live.registry import LiveSessions
from vllm_mm_ext.adapters.rendering_wrappers import on_processor_thread
from vllm_mm_ext.adapters.runtime import runtime_of
from vllm_mm_ext.adapters.sight.processor_cache import drop_inputs
from vllm_mm_ext.base.heap import trim_now
from vllm_mm_ext.base.heap_scrub import scrub, scrub_here
from vllm_mm_ext.request.trace import RequestTrace
from vllm_mm_ext.sight.request_log import RequestLog
from vllm_mm_ext.sight.running_requests import RunningRequests
from vllm_mm_ext.sight.seen_media import Made, SeenMedia, unknown_digest

# Seconds for requests about media that are taken down to end.
_END_S = 15.0
_REASON = "The media of this session were taken down by the server's operator."


class OwnPart:
    """What this API server knows and holds.

    Args:
        index: Of this API server.
        renderer: vLLM's renderer.
        running: The requests under way.
        log: The requests that have ended.
        live: The live sessions; None where there can be none.
    """

    def __init__(
        self,
        index: int,
        renderer: Any,
        running: RunningRequests,
        log: RequestLog,
        live: LiveSessions | None,
    ) -> None:
        self._index = index
        self._renderer = renderer
        self._running = running
        self._log = log
        self._live = live

    async def answer(self, question: Mapping[str, Any]) -> Any:
        """Answer another API server, or this one.

        Args:
            question: ``do`` is the name of a method, the rest are its arguments.
        """
        arguments = dict(question)
        answers: dict[str, Callable[..., Awaitable[Any]]] = {
            "state": self.state,
            "requests": self.requests,
            "record": self.record,
            "names": self.names,
            "media": self.media,
            "made_of": self.made_of,
            "end": self.end,
            "clear": self.clear,
            "forget": self.forget,
            "sweep": self.sweep,
            "end_session": self.end_session,
        }
        return await answers[arguments.pop("do")](**arguments)

    async def state(self) -> dict[str, Any]:
        """Everything that the page shows of this API server, with the latest requests."""
        return {
            "server": self._index,
            "pid": os.getpid(),
            "stats": runtime_of(self._renderer).stats(),
            "live": {} if self._live is None else self._live.stats(),
            "sessions": [] if self._live is None else self._live.listing(),
            "running": self._running.now(),
            "requests": self._log.summaries(),
        }

    async def requests(self, before: float) -> list[dict[str, Any]]:
        """Rows of requests that ended at a time or before: see ``RequestLog.summaries``."""
        return self._log.summaries(before)

    async def record(self, request_id: str) -> dict[str, Any] | None:
        """All that is known of a finished request; None if that is nothing."""
        return self._log.record(request_id)

    async def names(self, hashes: Mapping[str, str]) -> dict[str, Any]:
        """What the files are called of which mm items were made, by vLLM's hash of the item.

        Args:
            hashes: The items' modalities by their hashes.
        """
        named = {}
        for one, modality in hashes.items():
            if (medium := self._seen.medium_of(one, modality)) is not None:
                url = next(reversed(medium.urls), "")
                named[one] = {"digest": medium.digest, "url": url}
        return named

    async def media(self, url: str | None, digests: Collection[str]) -> dict[str, Any]:
        """What is known of a URL or of some files.

        Args:
            url: A URL that requests named; None for none.
            digests: Of files.

        Returns:
            Digests, URLs, and vLLM's hashes of the mm items of all these files.
        """
        found = set(digests)
        if url is not None:
            found |= self._seen.digests_at(url)
        hashes = self._seen.hashes_of(found)
        if self._live is not None:
            hashes |= self._live.hashes_of(found)
        return {
            "digests": sorted(found),
            "urls": sorted(self._seen.urls_of(found)),
            "hashes": sorted(hashes),
        }

    async def made_of(self, digests: Collection[str], hashes: Collection[str]) -> dict[str, Any]:
        """Of which files some mm items may have been made.

        Args:
            digests: Of the files that are asked about.
            hashes: vLLM's hashes of the items.

        Returns:
            ``items`` of which ``SeenMedia.made_of`` tells the same: places of their files among
            ``files``, whether they are apart, and their hashes. Each item by itself with digests of
            its files would be more than one API server takes from another. An item of a live
            session with one of the files may have been made of that one, whatever else had it.
        """
        found = self._seen.made_of(digests, hashes)
        if self._live is not None:
            found |= dict.fromkeys(self._live.hashes_of(digests), Made(frozenset(), False))
        alike: dict[Made, list[str]] = {}
        for one, made in found.items():
            alike.setdefault(made, []).append(one)
        files = sorted(frozenset().union(*(made.files for made in alike)))
        places = {file: place for place, file in enumerate(files)}
        items = [
            ([places[file] for file in made.files], made.apart, those)
            for made, those in alike.items()
        ]
        return {"files": files, "items": items}

    async def end(
        self, digests: Collection[str], urls: Collection[str], hashes: Collection[str]
    ) -> dict[str, Any]:
        """End requests and live sessions about some files, and note what they made of the files.

        Args:
            digests: Of the files.
            urls: Of the files.
            hashes: vLLM's hashes of the mm items that may have been made of the files.

        Returns:
            Numbers of ``requests`` and ``sessions`` that were ended, and ``requests_left`` and
            ``sessions_left``: of those that may still use the files.
        """
        deadline, live = time.monotonic() + _END_S, self._live
        sessions = [] if live is None else live.end_holding(digests, _REASON)
        ended, left, traces = await self._running.cancel(digests, urls, hashes, _END_S)
        sessions_left = 0 if live is None else await live.left(sessions, deadline)
        # The processor's thread ends what it has begun, and caches it.
        await on_processor_thread(self._renderer, lambda: None)
        for trace in traces:
            self._note(trace)
        return {
            "requests": ended,
            "sessions": len(sessions),
            "requests_left": left,
            "sessions_left": sessions_left,
        }

    async def clear(
        self,
        digests: Collection[str],
        urls: Collection[str],
        hashes: Collection[str],
        others: Collection[str],
    ) -> dict[str, Any]:
        """Drop everything of some files from this process, its workers and its downloads.

        Args:
            digests: Of the files.
            urls: Of the files.
            hashes: vLLM's hashes of the mm items of requests with the files. What a request that
                is not about the files uses stays: it was made of another file.
            others: Those of ``hashes`` that were made of other files for sure.

        Returns:
            The number of model inputs that were dropped, the hashes of what stays, and the number
            of requests that go on with an item that they name by its uuid alone and that may have
            been made of the files.
        """
        runtime = runtime_of(self._renderer)
        await runtime.forget(frozenset(digests), urls)
        for trace in self._running.about(digests, urls):
            # The files came again meanwhile, and must not be forgotten.
            self._note(trace)
        in_use = self._running.hashes().intersection(hashes)
        in_use |= self._running.named().intersection(others)
        drop = partial(drop_inputs, self._renderer.mm_processor_cache, {*hashes} - in_use)
        inputs = await on_processor_thread(self._renderer, drop)
        self._log.forget(digests, urls)
        # From now on no request finds the items by their uuid. One that did before goes on.
        naming = self._running.naming({*hashes}.difference(others))
        return {"inputs": inputs, "in_use": sorted(in_use), "requests_left": naming}

    async def forget(self, digests: Collection[str], before: float) -> None:
        """Forget what became of some files, of which nothing is left in any process.

        Args:
            digests: Of the files.
            before: Value of ``time.monotonic()``, which is the same for all processes. Files that
                came again since are not forgotten.
        """
        self._seen.forget(digests, before)
        if self._live is not None:
            self._live.forget(digests, before)

    async def sweep(self) -> None:
        """Clear the freed memory of this process, and give it back."""
        loop, own = asyncio.get_running_loop(), runtime_of(self._renderer).loop
        pools = [*own.pools, self._renderer._mm_executor, self._renderer._executor._inner]
        pools.append(getattr(loop, "_default_executor", None))
        with ThreadPoolExecutor(1) as apart:
            known = [pool for pool in pools if isinstance(pool, ThreadPoolExecutor)]
            await loop.run_in_executor(apart, scrub, known)
            await own.run(_scrubbed())
            scrub_here()
            await loop.run_in_executor(apart, trim_now)

    async def end_session(self, session_id: str) -> bool:
        """End a live session; False if this API server has none of that id."""
        if self._live is None:
            return False
        return self._live.end(session_id, "The server's operator ended the session.")

    def _note(self, trace: RequestTrace) -> None:
        """Note which files a request uses, and all that has been made of them so far."""
        # Other threads add to the hashes.
        hashes = trace.hashes.copy()
        self._seen.note_all(trace.media, trace.images, hashes)
        for url, digest in trace.held.items():
            self._seen.note(digest or unknown_digest(url), "video", url, hashes)

    @property
    def _seen(self) -> SeenMedia:
        seen = runtime_of(self._renderer).seen
        assert seen is not None  # Where there are sight routes.
        return seen


async def _scrubbed() -> None:
    """Clear the freed memory of the thread of an event loop."""
    scrub_here()
