"""Media over HTTP: allowed domains on every hop, limits, retries and revalidation."""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections.abc import Sequence
from urllib.parse import urljoin

import aiohttp
from cachetools import LRUCache
from urllib3.exceptions import LocationParseError
from urllib3.util import Url, parse_url
from yarl import URL

from vllm_mm_ext.errors import ForbiddenMediaError, MediaError, UnreachableMediaError
from vllm_mm_ext.media.fetch.blob import Blob, BlobWriter, check_size
from vllm_mm_ext.media.fetch.byte_gate import Claim, Lease
from vllm_mm_ext.media.fetch.freshness import StoredResponse, freshness_fields, judge
from vllm_mm_ext.media.fetch.source import Fetched, tighter

logger = logging.getLogger(__name__)

_MAX_REDIRECTS = 10
_REDIRECT_STATUS = frozenset({301, 302, 303, 307, 308})
# Same growth of timeout and pause per retry as vLLM's own media client.
_BACKOFF_FACTOR = 4
_WHAT = "The remote media"
# Bytes that a body of unknown length acquires at a time.
_STEP_BYTES = 8 << 20


class _TransientError(UnreachableMediaError):
    """A failure that another attempt may not meet."""


class _NoRoomError(Exception):
    """The media budget has no room for a body at present.

    Attributes:
        num_bytes: Bytes to wait for before the body is requested again.
    """

    def __init__(self, num_bytes: int) -> None:
        super().__init__(num_bytes)
        self.num_bytes = num_bytes


class HttpSource:
    """Downloads ``http:`` and ``https:`` URLs and remembers their digests while HTTP allows it.

    A location is the normalised URL without its fragment, credentials included.

    Args:
        allowed_domains: Host names that may be contacted, redirects included; empty allows all.
        allow_redirects: False makes a redirect an error.
        user_agent: ``User-Agent`` request header.
        max_bytes: Limit on one body, None for none.
        max_retries: Attempts in all, at least one. Timeouts, broken connections and 5xx answers
            are tried again, each with four times the timeout of the one before.
        retry_pause_s: Seconds before the second attempt, four times as long before each further.
        max_known: URLs remembered.

    Attributes:
        counts: Requests sent, answers from memory, 304 answers, whole bodies and their bytes.
    """

    def __init__(
        self,
        *,
        allowed_domains: Sequence[str],
        allow_redirects: bool,
        user_agent: str,
        max_bytes: int | None,
        max_retries: int,
        retry_pause_s: float = 1.0,
        max_known: int = 4096,
    ) -> None:
        self._allowed_domains = frozenset(domain.lower() for domain in allowed_domains)
        self._allow_redirects = allow_redirects
        self._user_agent = user_agent
        self._max_bytes = max_bytes
        self._max_attempts = max(max_retries, 1)
        self._retry_pause_s = retry_pause_s
        # Only touched on the fetcher's event loop, so it needs no lock.
        self._known: LRUCache[str, StoredResponse] = LRUCache(max_known)
        self._session: aiohttp.ClientSession | None = None
        self.counts = {
            "http_requests": 0,
            "http_fresh": 0,
            "http_not_modified": 0,
            "http_bodies": 0,
            "http_body_bytes": 0,
        }

    async def locate(self, url: str) -> str:
        """The normalised URL, if its scheme and domain are allowed."""
        return self._check(url)

    async def fetch(
        self, location: str, *, timeout_s: float, max_bytes: int | None, load: bool, claim: Claim
    ) -> Fetched:
        """See ``Source.fetch``. A fresh URL costs no request, an unchanged one no body."""
        limit = tighter(self._max_bytes, max_bytes)
        known = None if load else self._known.get(location)
        if known is not None and known.is_fresh(time.monotonic()):
            check_size(known.size, limit, _WHAT)
            self.counts["http_fresh"] += 1
            return Fetched(known.digest, known.size, None)
        for attempt in range(self._max_attempts):
            attempt_timeout = timeout_s * _BACKOFF_FACTOR**attempt
            try:
                return await self._with_room(location, known, limit, attempt_timeout, claim)
            except _TransientError as error:
                if attempt + 1 == self._max_attempts:
                    raise UnreachableMediaError(error.message) from None
                logger.info("%s Trying again.", error.message)
            await asyncio.sleep(self._retry_pause_s * _BACKOFF_FACTOR**attempt)
        raise AssertionError("unreachable")

    async def close(self) -> None:
        """Close connections. The source can be used again afterwards."""
        session, self._session = self._session, None
        if session is not None:
            await session.close()

    async def _with_room(
        self,
        location: str,
        known: StoredResponse | None,
        limit: int | None,
        timeout_s: float,
        claim: Claim,
    ) -> Fetched:
        """One attempt, with as many requests as it takes to find room in the media budget.

        The length of a body is known when its headers are. If there is no room for it, the
        connection is closed, and the URL requested again once there is: nothing but bytes is held
        while a request waits for bytes. A body of unknown length acquires more bytes as it arrives,
        and is given up in the same way; then twice as many are waited for.
        """
        lease = claim.lease()
        try:
            while True:
                try:
                    return await self._attempt(location, known, limit, timeout_s, claim, lease)
                except _NoRoomError as error:
                    num_bytes = error.num_bytes
                lease.release()
                lease = await claim.acquire(num_bytes)
        finally:
            # A blob counts its bytes with a lease of its own.
            lease.release()

    async def _attempt(
        self,
        location: str,
        known: StoredResponse | None,
        limit: int | None,
        timeout_s: float,
        claim: Claim,
        lease: Lease,
    ) -> Fetched:
        host = _host(parse_url(location))
        try:
            async with asyncio.timeout(timeout_s):
                return await self._follow(location, known, limit, claim, lease)
        except TimeoutError:
            raise _TransientError(f"{host} did not deliver the media in {timeout_s:g} s.") from None
        except aiohttp.ClientConnectorDNSError:
            raise _TransientError(f"The host name {host} cannot be resolved.") from None
        except aiohttp.ClientPayloadError:
            raise _TransientError(f"{host} broke off in the middle of the media.") from None
        except (aiohttp.ClientConnectionError, OSError):
            raise _TransientError(f"The connection to {host} failed.") from None
        except (aiohttp.ClientError, ValueError) as error:
            if isinstance(error, MediaError):
                raise
            # Not the error's own text: it may quote the URL with its credentials.
            raise UnreachableMediaError(f"{host} did not answer with valid HTTP.") from None

    async def _follow(
        self,
        location: str,
        known: StoredResponse | None,
        limit: int | None,
        claim: Claim,
        lease: Lease,
    ) -> Fetched:
        url = location
        storable, fresh_until = True, math.inf
        for _ in range(_MAX_REDIRECTS + 1):
            conditional = known.conditional_headers(url) if known is not None else {}
            self.counts["http_requests"] += 1
            sent = time.monotonic()
            async with self._client().get(
                URL(url, encoded=True), headers=conditional, allow_redirects=False
            ) as response:
                arrived = time.monotonic()
                fields = freshness_fields(response.headers.items())
                not_modified = response.status == 304 and known is not None and bool(conditional)
                if not_modified and known is not None:
                    fields = {**known.headers, **fields}
                # The chain is as fresh as its stalest hop.
                verdict = judge(fields, received=time.time(), delay_s=arrived - sent)
                storable = storable and verdict.storable
                fresh_until = min(fresh_until, arrived + verdict.lifetime_s)

                if response.status in _REDIRECT_STATUS:
                    url = self._redirect_target(url, response.headers.get("Location"))
                    continue
                if not_modified and known is not None:
                    check_size(known.size, limit, _WHAT)
                    self.counts["http_not_modified"] += 1
                    self._remember(location, known.refreshed(fields, fresh_until), storable)
                    return Fetched(known.digest, known.size, None, storable)
                if response.status != 200:
                    _raise_for_status(response.status, _host(parse_url(url)))
                check_size(response.content_length or 0, limit, _WHAT)
                size = _announced(response)
                if size is None:
                    size = tighter(limit, _STEP_BYTES) or _STEP_BYTES
                blob = await _read(response, limit, size, claim, lease)
            self.counts["http_bodies"] += 1
            self.counts["http_body_bytes"] += blob.size
            stored = StoredResponse(blob.digest, blob.size, url, fields, fresh_until)
            self._remember(location, stored, storable)
            return Fetched.of(blob, storable=storable)
        raise UnreachableMediaError(
            f"{_host(parse_url(location))} redirects more than {_MAX_REDIRECTS} times."
        )

    def _remember(self, location: str, stored: StoredResponse, storable: bool) -> None:
        # Without lifetime and validators the entry could never be used.
        if storable and (stored.has_validator() or stored.is_fresh(time.monotonic())):
            self._known[location] = stored
        else:
            self._known.pop(location, None)

    def _redirect_target(self, url: str, target: str | None) -> str:
        host = _host(parse_url(url))
        if not self._allow_redirects:
            raise ForbiddenMediaError(f"{host} redirects, and this server follows no redirects.")
        if not target:
            raise UnreachableMediaError(f"{host} redirects without saying where to.")
        try:
            joined = urljoin(url, target)
        except ValueError:
            raise UnreachableMediaError(f"{host} redirects to an invalid URL.") from None
        return self._check(joined)

    def _check(self, url: str) -> str:
        try:
            spec = parse_url(url)
        except LocationParseError:
            raise MediaError("The media URL is not valid.") from None
        if spec.scheme not in ("http", "https"):
            raise ForbiddenMediaError("Media may only be fetched by http or https.")
        if not spec.hostname:
            raise MediaError("The media URL has no host.")
        # One parser decides for the check, another connects: they must agree on the host.
        normalised = spec._replace(fragment=None).url
        try:
            contacted = URL(normalised, encoded=True).raw_host
        except ValueError:
            raise MediaError("The media URL is not valid.") from None
        if contacted != spec.hostname.strip("[]"):
            raise MediaError("The media URL is not valid.")
        if self._allowed_domains and spec.hostname not in self._allowed_domains:
            raise ForbiddenMediaError(
                f"The domain {spec.hostname} is not among the allowed domains: "
                f"{', '.join(sorted(self._allowed_domains))}."
            )
        return normalised

    def _client(self) -> aiohttp.ClientSession:
        if self._session is None:
            self._session = aiohttp.ClientSession(
                # Cookies of one client's media must not be sent for another's.
                cookie_jar=aiohttp.DummyCookieJar(),
                headers={"User-Agent": self._user_agent, "Accept-Encoding": "identity"},
                timeout=aiohttp.ClientTimeout(total=None),
                trust_env=True,
            )
        return self._session


def _host(spec: Url) -> str:
    return spec.hostname or "the host"


def _announced(response: aiohttp.ClientResponse) -> int | None:
    """Length of the body as it will be read, None where the headers do not tell."""
    if response.headers.get("Content-Encoding", "identity").lower() != "identity":
        return None  # What arrives is decompressed on the way.
    return response.content_length


async def _read(
    response: aiohttp.ClientResponse, limit: int | None, size: int, claim: Claim, lease: Lease
) -> Blob:
    """The body, which holds its bytes of the media budget from then on.

    Args:
        response: Whose headers have arrived.
        limit: On the bytes of the body; None for none.
        size: Bytes to hold before any is read.
        claim: Of the request.
        lease: What the request has for the body already.

    Raises:
        _NoRoomError: There is no room for the body at present.
    """
    if size > lease.num_bytes and not claim.grow(lease, size - lease.num_bytes):
        raise _NoRoomError(size)
    with BlobWriter(limit, _WHAT) as writer:
        async for chunk in response.content.iter_any():
            writer.append(chunk)
            if writer.size > lease.num_bytes and not claim.grow(
                lease, writer.size - lease.num_bytes + _STEP_BYTES
            ):
                raise _NoRoomError(2 * writer.size)
        blob = writer.finish()
    blob.hold(lease.move())
    return blob


def _raise_for_status(status: int, host: str) -> None:
    error = _TransientError if status >= 500 else UnreachableMediaError
    raise error(f"{host} answered HTTP {status}.", value=status)
