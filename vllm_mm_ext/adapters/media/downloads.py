"""Downloads of stock vLLM's media code, made by the plugin's fetcher."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from vllm.connections import HTTPConnection

from vllm_mm_ext.adapters.error_answers import client_errors
from vllm_mm_ext.adapters.runtime import Runtime
from vllm_mm_ext.adapters.sight.stage_notes import note_download
from vllm_mm_ext.errors import ForbiddenDomainError, ForbiddenMediaError
from vllm_mm_ext.request.context import RequestContext


class StockDownloads(HTTPConnection):  # type: ignore[misc]
    """vLLM's HTTP client for images and stock loaders, under the rules for videos and sound.

    Address rules, allowed domains on every hop, size limits and retries are thus the same for all
    media, and the media budget counts a file until vLLM has it. With ``media.enabled`` off, vLLM
    downloads itself.

    Args:
        allowed_local_media_path: As the connector has it.
        allowed_media_domains: As the connector has them.
        asking: Gives the request that asks, and the front-end of its engine.
    """

    def __init__(
        self,
        allowed_local_media_path: Path | None,
        allowed_media_domains: Sequence[str],
        asking: Callable[[], tuple[RequestContext, Runtime]],
    ) -> None:
        super().__init__()
        self._access = (allowed_local_media_path, allowed_media_domains)
        self._asking = asking

    def get_bytes(
        self,
        url: str,
        *,
        timeout: float | None = None,
        max_bytes: int | None = None,
        **options: Any,
    ) -> bytes:
        """Download ``url``; see ``async_get_bytes``."""
        context, runtime = self._asking()
        if not runtime.config.media.enabled:
            stock = super().get_bytes(url, timeout=timeout, max_bytes=max_bytes, **options)
            return bytes(stock)
        work = self._download(
            context, runtime, url, timeout, max_bytes, options.get("request_budget")
        )
        return runtime.run_blocking(work)

    async def async_get_bytes(
        self,
        url: str,
        *,
        timeout: float | None = None,
        max_bytes: int | None = None,
        **options: Any,
    ) -> bytes:
        """Download ``url``.

        Args:
            url: http or https URL.
            timeout: Seconds for the first attempt; None for no limit.
            max_bytes: Limit on the size; None for the server's own only.
            **options: ``request_budget``, from vLLM 0.33 on, is charged with the size.
                ``allow_redirects`` comes from a setting that the fetcher reads itself.

        Raises:
            VLLMError, ValueError: What the media error is translated to.
        """
        context, runtime = self._asking()
        if not runtime.config.media.enabled:
            stock = super().async_get_bytes(url, timeout=timeout, max_bytes=max_bytes, **options)
            return bytes(await stock)
        return await self._download(
            context, runtime, url, timeout, max_bytes, options.get("request_budget")
        )

    async def _download(
        self,
        context: RequestContext,
        runtime: Runtime,
        url: str,
        timeout: float | None,
        max_bytes: int | None,
        request_budget: Any,
    ) -> bytes:
        fetcher = runtime.fetcher(*self._access)
        started = time.perf_counter()
        with client_errors():
            try:
                blob = await fetcher.download(
                    url,
                    timeout_s=math.inf if timeout is None else timeout,
                    max_bytes=max_bytes,
                    claim=context.budget_claim(runtime.budget),
                )
            except ForbiddenDomainError as error:
                # Of a redirect's target: vLLM has checked the URL itself. Translated, this error
                # would be a ValueError, which vLLM takes for an invalid URL.
                raise ForbiddenMediaError(error.message) from None
        # What vLLM's own loader decodes is a video, else it is an image.
        modality = next((item.modality for item in context.items if item.url == url), "image")
        seconds = time.perf_counter() - started
        note_download(context.trace, runtime.recorder, modality, seconds, blob.size)
        if request_budget is not None:
            request_budget.charge(blob.size)
        return await asyncio.to_thread(blob.read)
