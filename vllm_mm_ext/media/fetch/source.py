"""The interface of media sources: one each for ``http(s):``, ``file:`` and ``data:`` URLs."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass
from http import HTTPStatus
from typing import Protocol, TypeVar

from vllm_mm_ext.errors import BusyError, MediaError
from vllm_mm_ext.media.fetch.blob import Blob
from vllm_mm_ext.media.fetch.byte_gate import Claim

__all__ = ["BusyError", "Fetched", "MediaChangedError", "Source", "TimeLimit", "tighter"]

L = TypeVar("L", bound=Hashable)


class MediaChangedError(MediaError):
    """The content of a URL changed after it was resolved. Resolving it again finds the new one."""

    code = "changed"
    status = HTTPStatus.BAD_GATEWAY


class TimeLimit(float):
    """A limit in seconds that knows its name.

    Attributes:
        setting: The setting or the variable that it comes from, for messages.
    """

    setting: str

    def __new__(cls, seconds: float, setting: str) -> TimeLimit:
        """See the class."""
        limit = super().__new__(cls, seconds)
        limit.setting = setting
        return limit


@dataclass(frozen=True)
class Fetched:
    """What a source found at a location.

    Attributes:
        digest: Hex BLAKE3 of the encoded bytes.
        size: Number of the encoded bytes.
        blob: The encoded bytes, or None if the source knew the digest without reading them.
        storable: False if the origin forbids keeping the content past this use.
    """

    digest: str
    size: int
    blob: Blob | None
    storable: bool = True

    @classmethod
    def of(cls, blob: Blob, *, storable: bool = True) -> Fetched:
        """Make the result for content that was just read."""
        return cls(blob.digest, blob.size, blob, storable)


class Source(Protocol[L]):
    """Finds the content of URLs of one scheme. The fetcher calls it on its own event loop only."""

    async def locate(self, url: str, claim: Claim) -> L:
        """Check access to a URL and return its location. Equal locations have equal content.

        Args:
            url: As the client wrote it.
            claim: Of the request, on the media budget. It tells how long to wait for a thread.

        Raises:
            BusyError: No thread was free for too long.
            MediaError: The URL is malformed or not allowed.
        """

    async def fetch(
        self, location: L, *, timeout_s: float, max_bytes: int | None, load: bool, claim: Claim
    ) -> Fetched:
        """Find out which content a location has.

        Args:
            location: Result of :meth:`locate`.
            timeout_s: Seconds for the first attempt over the network.
            max_bytes: Limit on the encoded size; None for the source's own limit only.
            load: Return the bytes even if the digest is known without them.
            claim: Of the request, on the media budget. Bytes are acquired before they are read; the
                blob holds them.

        Raises:
            BusyError: The media budget had no room for the bytes for too long, or no thread was
                free.
            MediaError: The content is unreachable, too large, or not readable.
        """


def tighter(first: int | None, second: int | None) -> int | None:
    """Return the lower of two limits. None means no limit."""
    limits = [limit for limit in (first, second) if limit is not None]
    return min(limits) if limits else None
