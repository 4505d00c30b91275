"""Encoded media by URL: fetched once, named by content, remembered while that is right."""

from __future__ import annotations

import weakref
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from urllib3.exceptions import LocationParseError
from urllib3.util import parse_url

from vllm_mm_ext.errors import ForbiddenMediaError, MediaError
from vllm_mm_ext.media.cache import ByteBudgetCache, SingleFlight
from vllm_mm_ext.media.fetch.blob import Blob
from vllm_mm_ext.media.fetch.byte_gate import Claim, MediaBudget
from vllm_mm_ext.media.fetch.data_source import DataSource
from vllm_mm_ext.media.fetch.file_source import FileSource
from vllm_mm_ext.media.fetch.http_source import HttpSource
from vllm_mm_ext.media.fetch.source import BusyError, Fetched, MediaChangedError, Source
from vllm_mm_ext.media.loop_thread import LoopThread

__all__ = ["BusyError", "MediaChangedError", "MediaFetcher", "MediaRef"]


class MediaRef:
    """Resolved media: the digest is known, the bytes are read when they are asked for.

    Meant for one request: it holds on to bytes that resolving had to read, until they were used
    (``in_use``).

    Attributes:
        digest: Hex BLAKE3 of the encoded bytes.
        size: Their number.
        storable: False if the origin forbids keeping anything of it past this request
            (``Cache-Control: no-store``): do not cache what is decoded from it.
        claim: Of the request, on the media budget.
    """

    def __init__(self, fetched: Fetched, load: Callable[[], Awaitable[Blob]], claim: Claim) -> None:
        self.digest = fetched.digest
        self.size = fetched.size
        self.storable = fetched.storable
        self.claim = claim
        self._blob = fetched.blob
        self._load = load
        self._users = 0

    async def open(self) -> Blob:
        """The bytes: those just read, else the cached ones, else read or downloaded again.

        Raises:
            MediaChangedError: The content is no longer that of ``digest``. Resolve again.
            MediaError: It can no longer be read.
        """
        blob = self._blob
        if blob is None:
            blob = self._blob = await self._load()
        return blob

    @contextmanager
    def in_use(self) -> Iterator[None]:
        """Let go of the bytes after the last of the uses that overlap, however they end.

        Uses are entered and left in one thread. What is opened after that is read again.
        """
        self._users += 1
        try:
            yield
        finally:
            self._users -= 1
            if not self._users:
                self._blob = None


class MediaFetcher:
    """Resolves media URLs to digests and bytes. Usable from any event loop and thread.

    Concurrent requests for the same media share one read. All work runs on a private event loop
    and its threads, so the caller's loop never blocks on it.

    Args:
        allowed_local_media_path: Directory below which ``file:`` URLs may point; None forbids them.
        allowed_media_domains: Hosts that may be contacted, redirects included; empty allows all.
        allow_redirects: Follow HTTP redirects (at most 10).
        user_agent: ``User-Agent`` of HTTP requests.
        encoded_cache: Where bytes are kept, by digest.
        download_limit_bytes: Limit on one download; None for none.
        local_limit_bytes: Limit on one ``file:`` or ``data:`` URL, whose bytes are copied into
            memory; None for none.
        max_retries: Attempts per download, at least one.
        retry_pause_s: Seconds before the second attempt; each further pause is four times longer.
        max_known: URLs, files and data URLs remembered, each.
        budget: The media budget, which holds encoded bytes from before they are read until they
            are let go.
    """

    def __init__(
        self,
        *,
        allowed_local_media_path: Path | None,
        allowed_media_domains: Sequence[str],
        allow_redirects: bool,
        user_agent: str,
        encoded_cache: ByteBudgetCache[str, Blob],
        download_limit_bytes: int | None,
        local_limit_bytes: int | None = 4 << 30,
        max_retries: int = 3,
        retry_pause_s: float = 1.0,
        max_known: int = 4096,
        budget: MediaBudget | None = None,
    ) -> None:
        self.encoded_cache = encoded_cache
        self.budget = budget or MediaBudget(1 << 30)
        self._files = FileSource(
            allowed_local_media_path, max_bytes=local_limit_bytes, max_known=max_known
        )
        self._data = DataSource(max_bytes=local_limit_bytes, max_known=max_known)
        self._http = HttpSource(
            allowed_domains=allowed_media_domains,
            allow_redirects=allow_redirects,
            user_agent=user_agent,
            max_bytes=download_limit_bytes,
            max_retries=max_retries,
            retry_pause_s=retry_pause_s,
            max_known=max_known,
        )
        self._flights: SingleFlight[Any, Fetched] = SingleFlight()
        self._thread = LoopThread("mm-ext-fetch")
        self._finalizer = weakref.finalize(self, _close, self._thread, self._http)

    async def resolve(
        self,
        url: str,
        *,
        timeout_s: float,
        max_bytes: int | None = None,
        claim: Claim | None = None,
    ) -> MediaRef:
        """Find out what content ``url`` has now, reading it only if that is not known.

        Args:
            url: ``http:``, ``https:``, ``file:`` or base64 ``data:`` URL.
            timeout_s: Seconds for the first attempt to download.
            max_bytes: Limit on the encoded size on top of the fetcher's own; None for none.
            claim: Of the request, on the media budget; None: the media is a request of its own.

        Raises:
            ForbiddenMediaError: Scheme, domain or path is not allowed.
            UnreachableMediaError: It cannot be fetched.
            MediaTooLargeError: It is past a size limit.
            BusyError: The media budget had no room for it for too long.
            MediaError: The URL is malformed, or the file not a regular one.
        """
        claim = claim or self.budget.claim()
        return await self._thread.run(self._resolve(url, timeout_s, max_bytes, claim))

    def stats(self) -> dict[str, int]:
        """Counters since the start: what was read and what was found without reading."""
        return {**self._http.counts, **self._files.counts, **self._data.counts}

    def close(self) -> None:
        """Cancel what runs and close connections. Blocks briefly. Also runs at exit."""
        self._finalizer()

    async def _resolve(
        self, url: str, timeout_s: float, max_bytes: int | None, claim: Claim
    ) -> MediaRef:
        source = self._source_of(url)
        location = await source.locate(url)
        fetched = await self._fetch(source, location, timeout_s, max_bytes, claim, load=False)
        digest = fetched.digest

        async def load() -> Blob:
            # Not with `fetched`, which would keep the bytes as long as the reference.
            return await self._thread.run(
                self._load(source, location, digest, timeout_s, max_bytes, claim)
            )

        return MediaRef(fetched, load, claim)

    async def _load(
        self,
        source: Source[Any],
        location: Any,
        digest: str,
        timeout_s: float,
        limit: int | None,
        claim: Claim,
    ) -> Blob:
        blob = self.encoded_cache.get(digest)
        if blob is None:
            fetched = await self._fetch(source, location, timeout_s, limit, claim, load=True)
            assert fetched.blob is not None
            blob = fetched.blob
        if blob.digest != digest:
            raise MediaChangedError(
                "The media changed while the request was served; send it again."
            )
        return blob

    async def _fetch(
        self,
        source: Source[Any],
        location: Any,
        timeout_s: float,
        max_bytes: int | None,
        claim: Claim,
        *,
        load: bool,
    ) -> Fetched:
        # Callers with different limits do not share: the lower one may have to fail.
        key = (location, max_bytes, load)
        fetched = await self._flights.run(
            key,
            lambda: source.fetch(
                location, timeout_s=timeout_s, max_bytes=max_bytes, load=load, claim=claim
            ),
            claim,
        )
        if fetched.blob is not None and fetched.storable:
            self.encoded_cache.put(fetched.digest, fetched.blob)
        return fetched

    def _source_of(self, url: str) -> Source[Any]:
        if url[:5].lower() == "data:":
            return self._data
        try:
            scheme = parse_url(url).scheme
        except LocationParseError:
            raise MediaError("The media URL is not valid.") from None
        if scheme in ("http", "https"):
            return self._http
        if scheme == "file":
            return self._files
        raise ForbiddenMediaError("The media URL must be an http, https, file or data URL.")


def _close(thread: LoopThread, http: HttpSource) -> None:
    thread.stop(http.close())
