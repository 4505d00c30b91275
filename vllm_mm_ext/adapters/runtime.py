"""The plugin's state in one process.

vLLM builds media connectors and video loaders by name, without a way to pass a configuration.
So the process holds one runtime; it is set when vLLM creates its renderer (the first point where
both the configuration and the model's processor exist).
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Coroutine, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypeVar

from vllm_mm_ext.base.heap import trim_when_due
from vllm_mm_ext.config.options import Reduction
from vllm_mm_ext.config.root import MIB, MMExtConfig
from vllm_mm_ext.media.cache import ByteBudgetCache
from vllm_mm_ext.media.fetch.blob import Blob
from vllm_mm_ext.media.fetch.byte_gate import MediaBudget
from vllm_mm_ext.media.fetch.download_cache import DownloadCacheSettings
from vllm_mm_ext.media.fetch.fetcher import MediaFetcher
from vllm_mm_ext.media.frontend import MediaFrontend
from vllm_mm_ext.media.loop_thread import LoopThread
from vllm_mm_ext.media.traits import ModelTraits

T = TypeVar("T")

# Each remembered file holds a descriptor; common limits on those begin at 1024.
_MAX_ENCODED = 512


class Runtime:
    """Front-end, fetchers and background loop of one process.

    Args:
        config: The plugin's configuration.
        traits: What the served model wants from the front-end.
    """

    def __init__(self, config: MMExtConfig, traits: ModelTraits) -> None:
        from vllm import envs

        self.config = config
        self.loop = LoopThread("mm-ext-frontend")
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
                    # As in vLLM, zero or less means no limit.
                    download_limit_bytes=max(envs.VLLM_MAX_MEDIA_DOWNLOAD_SIZE_MB, 0) * MIB or None,
                    max_retries=envs.VLLM_MEDIA_FETCH_MAX_RETRIES,
                    download_cache=_download_cache(),
                    allow_private_addresses=self.config.media.fetch.private_addresses == "allow",
                )
            return self._fetchers[key]

    @property
    def default_reduction(self) -> Reduction:
        """How the tokens of videos are made fewer unless a request says otherwise."""
        return self.config.compression.default_reduction(self.frontend.traits.default_reduction)

    async def run(self, work: Coroutine[Any, Any, T]) -> T:
        """Await front-end work from any event loop; cancelling the caller cancels it."""
        try:
            return await self.loop.run(work)
        finally:
            trim_when_due()

    def run_blocking(self, work: Coroutine[Any, Any, T]) -> T:
        """Run front-end work from a thread that has no event loop (``LLM.chat``)."""
        try:
            return asyncio.run_coroutine_threadsafe(work, self.loop.loop).result()
        finally:
            trim_when_due()

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
        }

    def close(self) -> None:
        """Stop workers and the background loop."""
        for fetcher in self._fetchers.values():
            fetcher.close()
        self.loop.stop(_nothing())
        self.frontend.close()


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


async def _nothing() -> None:
    """Nothing is left to wind down on the front-end's loop."""


_lock = threading.Lock()
_runtime: Runtime | None = None


def attach_runtime(config: MMExtConfig, traits: ModelTraits) -> Runtime:
    """Make this the process's runtime, replacing (and closing) an earlier one."""
    global _runtime
    with _lock:
        if _runtime is not None:
            _runtime.close()
        _runtime = Runtime(config, traits)
        return _runtime


def current_runtime() -> Runtime:
    """The process's runtime; without an attached model, one with default settings."""
    global _runtime
    with _lock:
        if _runtime is None:
            _runtime = Runtime(MMExtConfig(), ModelTraits())
        return _runtime
