"""When a remembered HTTP response may be used again (RFC 9111). Pure functions.

The server acts as a *private* cache: the origin sees no client but the server, and the server
remembers a URL that carries credentials under those credentials. So it keeps ``private`` responses
and ignores ``s-maxage``. It uses no heuristic freshness (RFC 9111 section 4.2.2): it asks the
origin every time about a response without an explicit lifetime.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from email.utils import parsedate_to_datetime

# Response fields that tell about freshness. A 304 answer replaces them (RFC 9111 section 3.2).
_FIELDS = ("cache-control", "expires", "date", "age", "etag", "last-modified", "vary")
# RFC 9111 section 1.2.2: larger values of delta-seconds count as 2**31.
_MAX_DELTA_SECONDS = 2**31


@dataclass(frozen=True)
class Freshness:
    """What the headers of a response allow.

    Attributes:
        storable: False if the response must not be remembered at all (``no-store``).
        lifetime_s: Seconds from its arrival in which the response needs no request.
    """

    storable: bool
    lifetime_s: float


@dataclass(frozen=True)
class StoredResponse:
    """What is remembered of one URL.

    Attributes:
        digest: Digest of the body.
        size: Bytes of the body.
        url: The URL that the body came from, after redirects. Validators hold for this URL only.
        headers: Freshness fields of the response, with lower-case names.
        fresh_until: Monotonic seconds up to which no request is needed.
    """

    digest: str
    size: int
    url: str
    headers: Mapping[str, str]
    fresh_until: float

    def is_fresh(self, now: float) -> bool:
        """Return whether the response needs no request yet. ``now`` is in monotonic seconds."""
        return now < self.fresh_until

    def conditional_headers(self, url: str) -> dict[str, str]:
        """Return request headers that allow a 304 answer; none for a URL other than the body's."""
        if url != self.url:
            return {}
        headers = {}
        if etag := self.headers.get("etag"):
            headers["If-None-Match"] = etag
        if last_modified := self.headers.get("last-modified"):
            headers["If-Modified-Since"] = last_modified
        return headers

    def has_validator(self) -> bool:
        """Return whether the origin gave an ETag or a Last-Modified date."""
        return "etag" in self.headers or "last-modified" in self.headers

    def refreshed(self, headers: Mapping[str, str], fresh_until: float) -> StoredResponse:
        """Return this response as a 304 answer with ``headers`` leaves it."""
        return replace(self, headers=headers, fresh_until=fresh_until)


def freshness_fields(headers: Iterable[tuple[str, str]]) -> dict[str, str]:
    """Return the freshness fields of a response. Repeated fields are joined by a comma."""
    fields: dict[str, str] = {}
    for name, value in headers:
        name = name.lower()
        if name in _FIELDS:
            fields[name] = f"{fields[name]}, {value}" if name in fields else value
    return fields


def judge(fields: Mapping[str, str], *, received: float, delay_s: float) -> Freshness:
    """Decide whether a response may be stored, and how long it is fresh (RFC 9111 section 4.2).

    Args:
        fields: Result of :func:`freshness_fields`.
        received: Wall-clock time of the response's arrival, seconds since the epoch.
        delay_s: Seconds between sending the request and the arrival.
    """
    directives = _directives(fields.get("cache-control", ""))
    if "no-store" in directives:
        return Freshness(storable=False, lifetime_s=0.0)
    if "no-cache" in directives or fields.get("vary", "").strip() == "*":
        return Freshness(storable=True, lifetime_s=0.0)

    date = _http_date(fields.get("date"))
    if "max-age" in directives:
        lifetime = _delta_seconds(directives["max-age"])
    elif "expires" in fields:
        expires = _http_date(fields["expires"])
        # An invalid date, "0" above all, means already expired (RFC 9111 section 5.3).
        lifetime = expires - (received if date is None else date) if expires is not None else 0.0
    else:
        lifetime = 0.0

    apparent_age = max(0.0, received - date) if date is not None else 0.0
    corrected_age = _delta_seconds(fields.get("age", "0")) + delay_s
    return Freshness(
        storable=True, lifetime_s=max(0.0, lifetime - max(apparent_age, corrected_age))
    )


def _directives(cache_control: str) -> dict[str, str]:
    directives: dict[str, str] = {}
    for part in cache_control.split(","):
        name, _, value = part.strip().partition("=")
        # The first of contradicting directives counts (RFC 9111 section 4.2.1).
        directives.setdefault(name.strip().lower(), value.strip().strip('"'))
    return directives


def _delta_seconds(text: str) -> float:
    text = text.strip()
    # Not a number: treat as stale, the safe reading (RFC 9111 section 4.2.1).
    if not (text.isascii() and text.isdigit()):
        return 0.0
    # A very long digit string must not reach int(), which limits its input.
    return float(_MAX_DELTA_SECONDS if len(text) > 10 else min(int(text), _MAX_DELTA_SECONDS))


def _http_date(text: str | None) -> float | None:
    if text is None:
        return None
    try:
        timestamp = parsedate_to_datetime(text.strip()).timestamp()
    except (ValueError, TypeError, OverflowError, IndexError):
        return None
    return timestamp if math.isfinite(timestamp) else None
