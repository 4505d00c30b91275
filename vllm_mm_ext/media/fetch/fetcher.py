"""Encoded media by URL: read once, named by content, remembered as long as the content stands."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Collection, Iterator, Sequence
from contextlib import contextmanager, suppress
from copy import copy
from pathlib import Path
from typing import Any
from weakref import WeakValueDictionary

import aiohttp
from aiohttp.abc import AbstractResolver
from urllib3.exceptions import LocationParseError
from urllib3.util import parse_url

from vllm_mm_ext.errors import BusyError, ForbiddenMediaError, MediaError
from vllm_mm_ext.media.cache import ByteBudgetCache, SingleFlight
from vllm_mm_ext.media.fetch.blob import Blob
from vllm_mm_ext.media.fetch.byte_gate import Claim, MediaBudget
from vllm_mm_ext.media.fetch.data_source import DataSource
from vllm_mm_ext.media.fetch.data_url import is_data_url
from vllm_mm_ext.media.fetch.download_cache import CachedDownloads, DownloadCacheSettings
from vllm_mm_ext.media.fetch.file_source import FileSource
from vllm_mm_ext.media.fetch.http_source import HttpSource
from vllm_mm_ext.media.fetch.source import Fetched, MediaChangedError, Source
from vllm_mm_ext.media.loop_thread import LoopThread

__all__ = ["BusyError", "MediaChangedError", "MediaFetcher", "MediaRef"]

# Files that are read at a time; as many that are looked up, and as many of the download cache.
_READERS = 16
_FILES = "files of too many other requests"


class MediaRef:
    """Media whose digest is known and whose bytes are read when somebody asks for them.

    A reference belongs to one request. Where resolving the URL had to read the bytes, the reference
    holds them until their last use ends (``in_use``).

    Attributes:
        digest: Hex BLAKE3 of the encoded bytes.
        size: Number of the encoded bytes.
        storable: False if the origin forbids keeping the content past this request
            (``Cache-Control: no-store``): nothing decoded from it may be cached.
        claim: Of the request, on the media budget.
    """

    def __init__(
        self, fetched: Fetched, load: Callable[[Claim], Awaitable[Blob]], claim: Claim
    ) -> None:
        self.digest = fetched.digest
        self.size = fetched.size
        self.storable = fetched.storable
        self.claim = claim
        self._blob = fetched.blob
        self._load = load
        self._users = 0

    async def open(self) -> Blob:
        """Return the encoded bytes: as just read, else from the cache, else read again.

        Raises:
            MediaChangedError: The URL's content no longer has this digest. Resolve the URL again.
            MediaError: The content can no longer be read.
        """
        blob = self._blob
        if blob is None:
            blob = self._blob = await self._load(self.claim)
        return blob

    async def opened(self) -> MediaRef:
        """The same media for work that other requests may wait for, with the bytes in hand.

        Such work must not depend on where one of the requests gets its bytes from, which can fail
        or take long, nor on how long that request keeps them.

        Raises:
            MediaError: As ``open``.
        """
        await self.open()
        return self.claimed_by(self.claim)

    def claimed_by(self, claim: Claim) -> MediaRef:
        """The same media for another request, with the bytes that this reference holds now.

        Args:
            claim: Of the other request.
        """
        made = copy(self)
        made.claim = claim
        made._users = 0
        return made

    @contextmanager
    def in_use(self) -> Iterator[None]:
        """Keep the bytes while the ``with`` block runs, and drop them after the last such block.

        Blocks may overlap. All of them are entered and left in one thread. ``open`` reads the
        bytes again after they were dropped.
        """
        self._users += 1
        try:
            yield
        finally:
            self._users -= 1
            if not self._users:
                self._blob = None


class MediaFetcher:
    """Resolves media URLs to digests and bytes. Any event loop and any thread may use it.

    Concurrent requests for the same media share one read. All work runs on ``loop`` and in its
    threads, so the caller's own event loop never blocks on it.

    Args:
        allowed_local_media_path: Directory below which ``file:`` URLs may point; None forbids them.
        allowed_media_domains: Hosts that may be contacted, redirects included; empty allows all.
        allow_redirects: Follow HTTP redirects (at most 10).
        user_agent: ``User-Agent`` of HTTP requests.
        encoded_cache: Keeps encoded bytes by their digest.
        download_limit_bytes: Limit on one download; None for none.
        local_limit_bytes: Limit on one ``file:`` or ``data:`` URL, whose bytes are copied into
            memory; None for none.
        max_retries: Attempts per download, at least one.
        retry_pause_s: Seconds before the second attempt; each further pause is four times longer.
        max_known: URLs, files and data URLs remembered, each.
        allow_private_addresses: Download from loopback and private addresses too; see
            ``HttpSource``.
        make_resolver: Makes what resolves host names; see ``HttpSource``.
        download_cache: Where downloads are kept on disk; None keeps none.
        budget: The media budget, which holds encoded bytes from before they are read until they
            are let go.
        loop: Where the work runs. Whoever stops it awaits ``disconnect`` on it last.
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
        local_limit_bytes: int | None,
        loop: LoopThread,
        budget: MediaBudget,
        max_retries: int = 3,
        retry_pause_s: float = 1.0,
        max_known: int = 4096,
        allow_private_addresses: bool = True,
        make_resolver: Callable[[], AbstractResolver] = aiohttp.ThreadedResolver,
        download_cache: DownloadCacheSettings | None = None,
    ) -> None:
        self.encoded_cache = encoded_cache
        self.budget = budget
        self._files = FileSource(
            allowed_local_media_path,
            threads=loop.threads(_READERS, "files", _FILES),
            lookups=loop.threads(_READERS, "lookups", _FILES),
            max_bytes=local_limit_bytes,
            max_known=max_known,
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
            allow_private_addresses=allow_private_addresses,
            make_resolver=make_resolver,
        )
        self._disk: CachedDownloads | None = None
        if download_cache is not None:
            self._disk = CachedDownloads(
                self._http,
                download_cache,
                threads=loop.threads(_READERS, "downloads", "the disk with too many downloads"),
                max_bytes=download_limit_bytes,
                max_known=max_known,
            )
        self._flights: SingleFlight[Any, Fetched] = SingleFlight()
        # Bytes that somebody still uses, cached or not: none is read twice at a time.
        self._in_use: WeakValueDictionary[str, Blob] = WeakValueDictionary()
        self._thread = loop

    async def resolve(
        self,
        url: str,
        *,
        timeout_s: float,
        max_bytes: int | None = None,
        claim: Claim | None = None,
    ) -> MediaRef:
        """Find out which content a URL has now, and read the content only if that is not known.

        Args:
            url: ``http:``, ``https:``, ``file:`` or base64 ``data:`` URL.
            timeout_s: Seconds for the first attempt to download.
            max_bytes: Limit on the encoded size on top of the fetcher's own; None for none.
            claim: Of the request, on the media budget; None: the media is a request of its own.

        Raises:
            ForbiddenMediaError: Scheme, domain, address or path is not allowed.
            UnreachableMediaError: The URL leads to no media. Its subclasses ``OriginError`` and
                ``OriginTimeoutError``: the origin failed, or took too long.
            MediaTooLargeError: The content is past a size limit.
            BusyError: The media budget had no room for the content for too long, or reads from
                servers that are gone have taken all threads.
            MediaError: The URL is malformed, or the file is not a regular file.
        """
        claim = claim or self.budget.claim()
        return await self._thread.run(self._resolve(url, timeout_s, max_bytes, claim))

    async def download(
        self,
        url: str,
        *,
        timeout_s: float,
        max_bytes: int | None = None,
        claim: Claim | None = None,
    ) -> Blob:
        """Return the bytes that an HTTP URL has now. Nothing is remembered, in memory or on disk.

        Args:
            url: ``http:`` or ``https:`` URL.
            timeout_s: Seconds for the first attempt.
            max_bytes: Limit on the encoded size on top of the fetcher's own; None for none.
            claim: As of ``resolve``.

        Raises:
            MediaError: As ``resolve``.
        """
        claim = claim or self.budget.claim()
        return await self._thread.run(self._download(url, timeout_s, max_bytes, claim))

    def stats(self) -> dict[str, int]:
        """Return counters since the start: what was read, and what was known without reading."""
        counts = {**self._http.counts, **self._files.counts, **self._data.counts}
        return counts if self._disk is None else {**counts, **self._disk.counts}

    async def forget(self, digests: Collection[str], urls: Collection[str]) -> None:
        """Drop files, in memory and in the download cache, and what is known of their URLs.

        Args:
            digests: Of the files.
            urls: URLs whose content is forgotten, whatever it was.
        """
        await self._thread.run(self._forget(digests, urls))

    async def disconnect(self) -> None:
        """Close connections; called on the fetcher's loop."""
        await self._http.close()

    async def _forget(self, digests: Collection[str], urls: Collection[str]) -> None:
        for digest in digests:
            self.encoded_cache.discard(digest)
        places = set()
        for url in urls:
            with suppress(MediaError):  # No URL that this fetcher would ever have read.
                places.add(await self._http.locate(url, self.budget.claim()))
        for source in (self._http, self._files, self._data):
            source.forget(digests)
        self._http.forget_urls(places)
        if self._disk is not None:
            await asyncio.to_thread(self._disk.forget, digests, places)

    async def _resolve(
        self, url: str, timeout_s: float, max_bytes: int | None, claim: Claim
    ) -> MediaRef:
        source = self._source_of(url)
        location = await source.locate(url, claim)
        fetched = await self._fetch(source, location, timeout_s, max_bytes, claim, load=False)
        digest = fetched.digest

        async def load(claim: Claim) -> Blob:
            # This function does not refer to `fetched`: that would keep the bytes in memory for
            # as long as the reference lives.
            return await self._thread.run(
                self._load(source, location, digest, timeout_s, max_bytes, claim)
            )

        return MediaRef(fetched, load, claim)

    async def _download(
        self, url: str, timeout_s: float, max_bytes: int | None, claim: Claim
    ) -> Blob:
        location = await self._http.locate(url, claim)
        fetched = await self._http.fetch(
            location, timeout_s=timeout_s, max_bytes=max_bytes, load=True, claim=claim
        )
        assert fetched.blob is not None
        return fetched.blob

    async def _load(
        self,
        source: Source[Any],
        location: Any,
        digest: str,
        timeout_s: float,
        limit: int | None,
        claim: Claim,
    ) -> Blob:
        blob = self.encoded_cache.get(digest) or self._in_use.get(digest)
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
        # Callers with different limits share no read: the lower limit may make one of them fail.
        key = (location, max_bytes, load)
        fetched = await self._flights.run(
            key,
            lambda: source.fetch(
                location, timeout_s=timeout_s, max_bytes=max_bytes, load=load, claim=claim
            ),
            claim,
        )
        if fetched.blob is not None and fetched.storable:
            self._in_use[fetched.digest] = fetched.blob
            self.encoded_cache.put(fetched.digest, fetched.blob)
        return fetched

    def _source_of(self, url: str) -> Source[Any]:
        if is_data_url(url):
            return self._data
        try:
            scheme = parse_url(url).scheme
        except LocationParseError:
            raise MediaError("The media URL is not valid.") from None
        if scheme in ("http", "https"):
            return self._disk or self._http
        if scheme == "file":
            return self._files
        raise ForbiddenMediaError("The media URL must be an http, https, file or data URL.")
