"""What every place media can come from offers: ``http(s):``, ``file:`` and ``data:`` URLs."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass
from typing import Protocol, TypeVar

from vllm_mm_ext.errors import BusyError, MediaError
from vllm_mm_ext.media.fetch.blob import Blob
from vllm_mm_ext.media.fetch.byte_gate import Claim

__all__ = ["BusyError", "Fetched", "MediaChangedError", "Source", "tighter"]

L = TypeVar("L", bound=Hashable)


class MediaChangedError(MediaError):
    """The content behind a URL is no longer what was resolved; resolving again sees the new one."""

    code = "changed"


@dataclass(frozen=True)
class Fetched:
    """Content a source found.

    Attributes:
        digest: Hex BLAKE3 of the encoded bytes.
        size: Their number.
        blob: The bytes, or None when the source knew the digest without reading them.
        storable: False if the origin forbids keeping the content past this use.
    """

    digest: str
    size: int
    blob: Blob | None
    storable: bool = True

    @classmethod
    def of(cls, blob: Blob, *, storable: bool = True) -> Fetched:
        """Content that was just read."""
        return cls(blob.digest, blob.size, blob, storable)


class Source(Protocol[L]):
    """One URL scheme. All methods run on the fetcher's own event loop."""

    async def locate(self, url: str) -> L:
        """What ``url`` names, after access checks; equal locations have the same content.

        Raises:
            MediaError: The URL is malformed or not allowed.
        """

    async def fetch(
        self, location: L, *, timeout_s: float, max_bytes: int | None, load: bool, claim: Claim
    ) -> Fetched:
        """Content at ``location``.

        Args:
            location: Result of :meth:`locate`.
            timeout_s: Seconds for one attempt over the network.
            max_bytes: Limit on the encoded size; None for the source's own limit only.
            load: Return the bytes even if the digest is known without them.
            claim: Of the request, on the media budget. Bytes are acquired before they are read; the
                blob holds them.

        Raises:
            BusyError: The media budget had no room for the bytes for too long.
            MediaError: Unreachable, too large, or not readable.
        """


def tighter(first: int | None, second: int | None) -> int | None:
    """The lower of two limits, None meaning no limit."""
    limits = [limit for limit in (first, second) if limit is not None]
    return min(limits) if limits else None
