"""The media front-end of each engine whose requests this process renders.

vLLM builds media connectors and video loaders by name, without a way to pass a configuration. So
the process keeps a runtime for each of vLLM's renderers, made when vLLM makes the renderer (the
first point where both the configuration and the model's processor exist) and closed with it. The
connector finds the runtime by the renderer that the request's context names.
"""

from __future__ import annotations

import asyncio
import itertools
import math
import threading
import weakref
from collections.abc import Collection, Coroutine, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypeVar

from vllm_mm_ext.adapters.error_answers import answer_to
from vllm_mm_ext.adapters.long_video.state import LongVideoState
from vllm_mm_ext.adapters.media.byte_limits import download_limit, local_limit
from vllm_mm_ext.adapters.media.media_records import MediaRecords
from vllm_mm_ext.adapters.serving.encoder_asks import EncoderAsks
from vllm_mm_ext.adapters.sight.recorder import Recorder
from vllm_mm_ext.base.heap import trim_when_due
from vllm_mm_ext.config.options import NO_REDUCTION, Reduction
from vllm_mm_ext.config.root import MIB, MMExtConfig
from vllm_mm_ext.errors import BusyError
from vllm_mm_ext.media.cache import ByteBudgetCache
from vllm_mm_ext.media.fetch.blob import Blob
from vllm_mm_ext.media.fetch.byte_gate import MediaBudget
from vllm_mm_ext.media.fetch.download_cache import DownloadCacheSettings
from vllm_mm_ext.media.fetch.fetcher import MediaFetcher
from vllm_mm_ext.media.frontend import MediaFrontend
from vllm_mm_ext.media.loop_thread import LoopThread
from vllm_mm_ext.media.traits import ModelTraits
from vllm_mm_ext.sight.seen_media import SeenMedia

T = TypeVar("T")

# Each remembered file holds a descriptor; common limits on those begin at 1024.
_MAX_ENCODED = 512


class Runtime:
    """Front-end and fetchers for one engine, and the event-loop thread on which they all work.

    Args:
        config: The plugin's configuration.
        traits: What the served model wants from the front-end.
        number: Of the engine, among those this process has rendered for. All API servers of a
            service have the same number for its engine.

    Attributes:
        recorder: Takes note of requests; None where nobody asks for metrics or traces.
        encoder_asks: Asks encoder instances; None where there are none.
        records: Records of videos that instances share; None where they share nothing.
    """

    def __init__(self, config: MMExtConfig, traits: ModelTraits, number: int = 0) -> None:
        from vllm import envs

        self.config = config
        self.number = number
        self.recorder: Recorder | None = None
        self.encoder_asks: EncoderAsks | None = None
        self.records: MediaRecords | None = None
        self.long_video = LongVideoState(config.long_video)
        # What became of which file, where an operator may ask.
        self.seen = SeenMedia() if config.sight.page else None
        self.loop = LoopThread("mm-ext")
        cache = config.media.cache
        self.budget = MediaBudget(cache.in_flight_mb * MIB, cache.max_wait_s)
        self.frontend = MediaFrontend(
            config.media,
            traits,
            max_pixels=envs.VLLM_MAX_IMAGE_PIXELS,
            max_audio_s=envs.VLLM_MAX_AUDIO_DECODE_DURATION_S,
            max_audio_bytes=envs.VLLM_MAX_AUDIO_DECODE_BYTES,
        )
        self._encoded: ByteBudgetCache[str, Blob] = ByteBudgetCache(
            cache.encoded_mb * MIB,
            lambda blob: blob.size,
            max_entries=_MAX_ENCODED,
            lease_of=lambda blob: blob.lease,
        )
        self._fetchers: dict[tuple[Path | None, tuple[str, ...]], MediaFetcher] = {}
        self._lock = threading.Lock()
        self._finalizer = weakref.finalize(self, _close, self.loop, self.frontend, self._fetchers)

    def wait_without_end(self) -> None:
        """Let media wait for room as long as it takes: nobody would send them again."""
        self.budget.max_wait_s = math.inf

    def fetcher(
        self, allowed_local_media_path: Path | None, allowed_media_domains: Sequence[str]
    ) -> MediaFetcher:
        """The fetcher for vLLM's access settings; there is one per server."""
        from vllm import envs
        from vllm.version import __version__ as vllm_version

        key = (allowed_local_media_path, tuple(allowed_media_domains))
        with self._lock:
            if key not in self._fetchers:
                self._fetchers[key] = MediaFetcher(
                    allowed_local_media_path=allowed_local_media_path,
                    allowed_media_domains=allowed_media_domains,
                    allow_redirects=envs.VLLM_MEDIA_URL_ALLOW_REDIRECTS,
                    user_agent=f"vLLM/{vllm_version}",
                    encoded_cache=self._encoded,
                    budget=self.budget,
                    download_limit_bytes=download_limit(),
                    local_limit_bytes=local_limit(self.config.media.fetch),
                    max_retries=envs.VLLM_MEDIA_FETCH_MAX_RETRIES,
                    download_cache=_download_cache(),
                    allow_private_addresses=self.config.media.fetch.private_addresses == "allow",
                    loop=self.loop,
                )
            return self._fetchers[key]

    @property
    def default_reduction(self) -> Reduction:
        """How the tokens of videos are made fewer unless a request says otherwise."""
        traits = self.frontend.traits
        if not traits.cuts_videos:
            return NO_REDUCTION
        return self.config.compression.default_reduction(traits.default_reduction)

    async def run(self, work: Coroutine[Any, Any, T]) -> T:
        """Await front-end work from any event loop; cancelling the caller cancels it."""
        try:
            return await self.loop.run(work)
        finally:
            trim_when_due()

    def run_blocking(self, work: Coroutine[Any, Any, T]) -> T:
        """Run front-end work from a thread that has no event loop (``LLM.chat``)."""
        try:
            return self.loop.submit(work).result()
        finally:
            trim_when_due()

    async def forget(self, digests: Collection[str], urls: Collection[str]) -> None:
        """Drop media from everything that this runtime keeps; called on vLLM's event loop.

        Args:
            digests: Of the encoded files.
            urls: URLs that are no longer known to have any content.
        """
        for fetcher in list(self._fetchers.values()):
            await fetcher.forget(digests, urls)
        self.long_video.clear()
        await asyncio.to_thread(self.frontend.forget, digests)

    def stats(self) -> dict[str, Any]:
        """Counters of every part of the front-end, for ``GET /mm_ext/stats``."""
        fetch: dict[str, int] = {}
        for fetcher in list(self._fetchers.values()):
            for name, count in fetcher.stats().items():
                fetch[name] = fetch.get(name, 0) + count
        return {
            **self.frontend.stats(),
            "encoded_cache": asdict(self._encoded.stats()),
            "media_budget": self.budget.stats(),
            "fetch": fetch,
            "long_video": self.long_video.stats(),
            "encoder_asks": {} if self.encoder_asks is None else dict(self.encoder_asks.counts),
            "records": {} if self.records is None else dict(self.records.counts),
        }

    def close(self) -> None:
        """Stop workers and the event-loop thread. Also runs when the runtime is dropped."""
        self._finalizer()


def _download_cache() -> DownloadCacheSettings | None:
    """The directory for downloads that vLLM's settings name, if they do."""
    from vllm import envs

    if not envs.VLLM_MEDIA_CACHE:
        return None
    return DownloadCacheSettings(
        directory=Path(envs.VLLM_MEDIA_CACHE),
        max_bytes=envs.VLLM_MEDIA_CACHE_MAX_SIZE_MB * MIB,
        ttl_s=envs.VLLM_MEDIA_CACHE_TTL_HOURS * 3600,
    )


def _close(loop: LoopThread, frontend: MediaFrontend, fetchers: Mapping[Any, MediaFetcher]) -> None:
    async def disconnect() -> None:
        for fetcher in fetchers.values():
            await fetcher.disconnect()

    loop.stop(disconnect())
    frontend.close()


_lock = threading.Lock()
_runtimes: weakref.WeakKeyDictionary[Any, Runtime] = weakref.WeakKeyDictionary()
# Renderers whose engine has been shut down; requests may still be under way.
_ended: weakref.WeakSet[Any] = weakref.WeakSet()
_unowned: Runtime | None = None
_numbers = itertools.count()


def attach_runtime(config: MMExtConfig, traits: ModelTraits, renderer: Any = None) -> Runtime:
    """Make the runtime of a renderer; it ends with the renderer.

    Args:
        config: The plugin's configuration.
        traits: What the served model wants from the front-end.
        renderer: vLLM's renderer, which had no runtime before. None makes the runtime of connectors
            that are used without a renderer. Either way an earlier one of that kind is closed.
    """
    global _unowned
    with _lock:
        runtime = Runtime(config, traits, 0 if renderer is None else next(_numbers))
        if _unowned is not None:
            _unowned.close()
        _unowned = runtime if renderer is None else None
        if renderer is not None:
            _runtimes[renderer] = runtime
            _ended.discard(renderer)
        return runtime


def detach_runtime(renderer: Any = None) -> None:
    """Close the runtime of a renderer that ends, or that without a renderer, if there is one."""
    global _unowned
    with _lock:
        if renderer is None:
            runtime, _unowned = _unowned, None
        else:
            runtime = _runtimes.pop(renderer, None)
            if runtime is not None:
                _ended.add(renderer)
    if runtime is not None:
        runtime.close()


def runtime_of(renderer: Any) -> Runtime:
    """The runtime of a renderer.

    Args:
        renderer: vLLM's renderer. Where it is None or never had a runtime, as in code that uses a
            connector or loader by itself, the runtime is that of ``current_runtime``.

    Raises:
        VLLMError: The renderer's runtime has ended, which is answered as busy (503): another one
            has other settings, such as which addresses may be contacted.
    """
    with _lock:
        if renderer is not None and renderer in _ended:
            raise answer_to(BusyError("The server's engine is being shut down."))
        found = None if renderer is None else _runtimes.get(renderer)
    return found or current_runtime()


def current_runtime() -> Runtime:
    """The runtime where no renderer is named: that without a renderer, else the last one made.

    Where there is none at all, one with default settings is made.
    """
    global _unowned
    with _lock:
        if _unowned is not None:
            return _unowned
        if _runtimes:
            return list(_runtimes.values())[-1]
        _unowned = Runtime(MMExtConfig(), ModelTraits())
        return _unowned
