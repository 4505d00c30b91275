"""Downloads of stock vLLM's media code, made by the plugin's fetcher."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from vllm.connections import HTTPConnection

from vllm_mm_ext.adapters.runtime import current_runtime
from vllm_mm_ext.errors import ForbiddenDomainError, ForbiddenMediaError
from vllm_mm_ext.media.request_claim import current_claim


class StockDownloads(HTTPConnection):  # type: ignore[misc]
    """vLLM's HTTP client for images and stock loaders, under the rules for videos and sound.

    Address rules, allowed domains on every hop, size limits and retries are thus the same for all
    media, and the media budget counts a file until vLLM has it. With ``media.enabled`` off, vLLM
    downloads itself.

    Args:
        allowed_local_media_path: As the connector has it.
        allowed_media_domains: As the connector has them.
        translated: Turns the plugin's media errors into vLLM's.
    """

    def __init__(
        self,
        allowed_local_media_path: Path | None,
        allowed_media_domains: Sequence[str],
        translated: Callable[[], AbstractContextManager[None]],
    ) -> None:
        super().__init__()
        self._access = (allowed_local_media_path, allowed_media_domains)
        self._translated = translated

    def get_bytes(
        self,
        url: str,
        *,
        timeout: float | None = None,
        max_bytes: int | None = None,
        **options: Any,
    ) -> bytes:
        """Download ``url``; see ``async_get_bytes``."""
        runtime = current_runtime()
        if not runtime.config.media.enabled:
            stock = super().get_bytes(url, timeout=timeout, max_bytes=max_bytes, **options)
            return bytes(stock)
        work = self._download(url, timeout, max_bytes, options.get("request_budget"))
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
        if not current_runtime().config.media.enabled:
            stock = super().async_get_bytes(url, timeout=timeout, max_bytes=max_bytes, **options)
            return bytes(await stock)
        return await self._download(url, timeout, max_bytes, options.get("request_budget"))

    async def _download(
        self, url: str, timeout: float | None, max_bytes: int | None, request_budget: Any
    ) -> bytes:
        fetcher = current_runtime().fetcher(*self._access)
        with self._translated():
            try:
                blob = await fetcher.download(
                    url,
                    timeout_s=math.inf if timeout is None else timeout,
                    max_bytes=max_bytes,
                    claim=current_claim(fetcher.budget),
                )
            except ForbiddenDomainError as error:
                # Of a redirect's target: vLLM has checked the URL itself. Translated, this error
                # would be a ValueError, which vLLM takes for an invalid URL.
                raise ForbiddenMediaError(error.message) from None
        if request_budget is not None:
            request_budget.charge(blob.size)
        return await asyncio.to_thread(blob.read)
