"""Media over HTTP: allowed hosts on every hop, limits, retries and revalidation."""

from __future__ import annotations

import asyncio
import logging
import math
import socket
import time
from collections.abc import Callable, Collection, Iterable, Sequence
from urllib.parse import urljoin
from weakref import WeakValueDictionary

import aiohttp
from aiohttp.abc import AbstractResolver
from cachetools import LRUCache
from urllib3.exceptions import LocationParseError
from urllib3.util import Url, parse_url
from yarl import URL

from vllm_mm_ext.errors import (
    BusyError,
    ForbiddenDomainError,
    ForbiddenMediaError,
    MediaError,
    OriginError,
    OriginTimeoutError,
    UnreachableMediaError,
    busy_if_short,
)
from vllm_mm_ext.media.fetch.address_rules import AddressRules, is_literal
from vllm_mm_ext.media.fetch.blob import check_size
from vllm_mm_ext.media.fetch.byte_gate import Claim
from vllm_mm_ext.media.fetch.byte_lease import Lease
from vllm_mm_ext.media.fetch.checked_resolver import CheckedResolver
from vllm_mm_ext.media.fetch.freshness import StoredResponse, freshness_fields, judge
from vllm_mm_ext.media.fetch.http_body import NoRoomError, read_body, whole_range
from vllm_mm_ext.media.fetch.source import Fetched, TimeLimit, tighter

logger = logging.getLogger("vllm.mm_ext")

_MAX_REDIRECTS = 10
_REDIRECT_STATUS = frozenset({301, 302, 303, 307, 308})
# These 4xx answers say nothing against the URL: the origin gave up waiting, or sees too many
# requests.
_ORIGIN_IS_BUSY = frozenset({408, 429})
_NO_SUCH_HOST = frozenset({socket.EAI_NONAME, socket.EAI_NODATA})
# Same growth of timeout and pause per retry as vLLM's own media client.
_BACKOFF_FACTOR = 4
# Downloads from one host at a time. Others wait, so that a slow host takes no more connections.
_PER_HOST = 100
_WHAT = "The remote media"


class _TransientError(MediaError):
    """An attempt failed in a way that another attempt may not.

    Attributes:
        lasting: The error that the source raises if the last attempt failed like this.
    """

    lasting: type[MediaError] = OriginError


class _TimedOutError(_TransientError):
    """The origin took longer than the attempt's timeout."""

    lasting = OriginTimeoutError


class _NoSuchHostError(_TransientError):
    """Name servers say that there is no such host. Some say so by mistake, so it is asked again."""

    lasting = UnreachableMediaError


class HttpSource:
    """Downloads ``http:`` and ``https:`` URLs and remembers digests for as long as HTTP allows.

    A location is the normalised URL with its credentials and without its fragment.

    Args:
        allowed_domains: Host names that may be contacted, redirects included; empty allows all.
        allow_redirects: False makes a redirect an error.
        allow_private_addresses: Contact loopback and private addresses too; see ``AddressRules``.
            Link-local addresses and the metadata services of clouds are never contacted.
        make_resolver: Called on the event loop for what resolves host names.
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
        allow_private_addresses: bool = True,
        make_resolver: Callable[[], AbstractResolver] = aiohttp.ThreadedResolver,
        retry_pause_s: float = 1.0,
        max_known: int = 4096,
    ) -> None:
        self._domains_as_given = list(allowed_domains)
        self._allowed_domains = frozenset(domain.lower() for domain in allowed_domains)
        self._rules = AddressRules(allow_private_addresses)
        self._make_resolver = make_resolver
        self._allow_redirects = allow_redirects
        self._user_agent = user_agent
        self._max_bytes = max_bytes
        self._max_attempts = max(max_retries, 1)
        self._retry_pause_s = retry_pause_s
        # Only touched on the fetcher's event loop, so it needs no lock.
        self._known: LRUCache[str, StoredResponse] = LRUCache(max_known)
        # By host, for as long as somebody downloads from it or waits to.
        self._slots: WeakValueDictionary[str, asyncio.Semaphore] = WeakValueDictionary()
        self._session: aiohttp.ClientSession | None = None
        self.counts = {
            "http_requests": 0,
            "http_fresh": 0,
            "http_not_modified": 0,
            "http_bodies": 0,
            "http_body_bytes": 0,
        }

    async def locate(self, url: str, claim: Claim) -> str:
        """Return the normalised URL, if its scheme, its domain and its address are allowed.

        The address of a host given by name is checked when the name is resolved.
        """
        del claim
        return self._check(url)

    async def fetch(
        self, location: str, *, timeout_s: float, max_bytes: int | None, load: bool, claim: Claim
    ) -> Fetched:
        """See ``Source.fetch``.

        A remembered response that is still fresh costs no request. One that the origin confirms
        (304) costs a request without a body.
        """
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
                    message = error.message
                    if isinstance(error, _TimedOutError) and isinstance(timeout_s, TimeLimit):
                        message += f" {timeout_s.setting} is the time of the first attempt."
                    raise error.lasting(message, value=error.value) from None
                logger.info("%s Trying again.", error.message)
            await asyncio.sleep(self._retry_pause_s * _BACKOFF_FACTOR**attempt)
        raise AssertionError("unreachable")

    def forget(self, digests: Collection[str]) -> None:
        """Forget the URLs whose content had one of these digests."""
        known = self._known.items()
        self.forget_urls([url for url, stored in known if stored.digest in digests])

    def forget_urls(self, locations: Iterable[str]) -> None:
        """Forget what is known of some locations."""
        for location in locations:
            self._known.pop(location, None)

    async def close(self) -> None:
        """Close all connections. The source can be used again afterwards."""
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

        A body acquires bytes as it arrives. If there is no room for more, the connection is closed
        and what arrived is dropped: a request that waits for bytes holds none for the same body.
        Once there is room for the announced length, or for twice what arrived where none is
        announced, the URL is requested again. The body then holds what arrived before, so each
        request gets further than the one before it.
        """
        lease = claim.lease()
        try:
            while True:
                try:
                    return await self._attempt(location, known, limit, timeout_s, claim, lease)
                except NoRoomError as error:
                    num_bytes, sure, arrived = error.num_bytes, error.sure, error.arrived
                lease.release()
                lease = await claim.acquire(num_bytes, sure=sure)
                lease.resize(arrived)
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
        slots = self._slots.setdefault(host, asyncio.Semaphore(_PER_HOST))
        try:
            # Not within the attempt's own timeout: this wait is not the origin's fault.
            async with asyncio.timeout(claim.max_wait_s):
                await slots.acquire()
        except TimeoutError:
            raise BusyError(
                f"The server downloads {_PER_HOST} media from {host}, and none was done within "
                f"{claim.max_wait_s:g} s (media.cache.max_wait_s). Try again later."
            ) from None
        try:
            async with asyncio.timeout(timeout_s):
                with busy_if_short():
                    return await self._follow(location, known, limit, claim, lease)
        except TimeoutError:
            raise _TimedOutError(f"{host} did not deliver the media in {timeout_s:g} s.") from None
        except aiohttp.ClientConnectorDNSError as error:
            failure = _NoSuchHostError if error.errno in _NO_SUCH_HOST else _TransientError
            raise failure(f"The host name {host} cannot be resolved.") from None
        except aiohttp.ClientPayloadError:
            raise _TransientError(f"{host} broke off in the middle of the media.") from None
        except (aiohttp.ClientConnectionError, OSError):
            raise _TransientError(f"The connection to {host} failed.") from None
        except (aiohttp.ClientError, ValueError) as error:
            if isinstance(error, MediaError):
                raise
            # Not the error's own text: it may quote the URL with its credentials.
            raise OriginError(f"{host} did not answer with valid HTTP.") from None
        finally:
            slots.release()

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
                # A chain of redirects is as fresh as its stalest hop.
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
                whole = whole_range(response) if response.status == 206 else None
                if response.status not in (200, 203) and whole is None:
                    _raise_for_status(response.status, _host(parse_url(url)))
                check_size(response.content_length or 0, limit, _WHAT)
                blob = await read_body(response, limit, claim, lease, _WHAT)
                if whole is not None and blob.size != whole:
                    raise aiohttp.ClientPayloadError
            self.counts["http_bodies"] += 1
            self.counts["http_body_bytes"] += blob.size
            stored = StoredResponse(blob.digest, blob.size, url, fields, fresh_until)
            self._remember(location, stored, storable)
            return Fetched.of(blob, storable=storable)
        raise UnreachableMediaError(
            f"{_host(parse_url(location))} redirects more than {_MAX_REDIRECTS} times."
        )

    def _remember(self, location: str, stored: StoredResponse, storable: bool) -> None:
        # A response with neither a lifetime nor a validator could never be used again.
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
        # urllib3's parser finds the host that is checked here, yarl's the host that aiohttp
        # contacts: both must find the same.
        normalised = spec._replace(fragment=None).url
        try:
            target = URL(normalised, encoded=True)
            # As whoever looks the name up, and whoever sends the credentials, will encode them.
            spec.hostname.encode("idna")
            f"{target.user}{target.password}".encode("latin-1")
        except ValueError:
            raise MediaError("The media URL is not valid.") from None
        contacted = target.raw_host
        if contacted != spec.hostname.strip("[]") or ":" in (target.user or ""):
            raise MediaError("The media URL is not valid.")
        if self._allowed_domains and spec.hostname not in self._allowed_domains:
            # Word for word vLLM's own message.
            raise ForbiddenDomainError(
                f"The URL must be from one of the allowed domains: {self._domains_as_given}. "
                f"Input URL domain: {spec.hostname}"
            )
        self._check_literal(contacted)
        return normalised

    def _check_literal(self, host: str) -> None:
        """Check a host that is written as an IP address, which no resolver is asked about."""
        if not is_literal(host):
            return
        try:
            allowed = self._rules.allows(host)
        except ValueError:  # 127.1, 2130706433 and the like
            raise MediaError("The host of the media URL is not a valid IP address.") from None
        if not allowed:
            raise ForbiddenMediaError(f"This server does not download media from {host}.")

    def _client(self) -> aiohttp.ClientSession:
        if self._session is None:
            resolver = CheckedResolver(self._rules, self._make_resolver())
            self._session = aiohttp.ClientSession(
                connector=aiohttp.TCPConnector(resolver=resolver, limit=0),  # See _PER_HOST.
                # A cookie that came with one client's media must not go out with another's.
                cookie_jar=aiohttp.DummyCookieJar(),
                headers={"User-Agent": self._user_agent, "Accept-Encoding": "identity"},
                timeout=aiohttp.ClientTimeout(total=None),
                # The server's own credentials (netrc) are not for hosts that clients name, and a
                # proxy would connect to addresses that nobody checked.
                trust_env=False,
            )
        return self._session


def _host(spec: Url) -> str:
    return spec.hostname or "the host"


def _raise_for_status(status: int, host: str) -> None:
    error: type[MediaError] = UnreachableMediaError
    if status >= 500:
        error = _TransientError
    elif status in _ORIGIN_IS_BUSY:
        error = OriginError
    raise error(f"{host} answered HTTP {status}.", value=status)
