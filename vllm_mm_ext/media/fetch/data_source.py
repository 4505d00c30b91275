"""Media inside the URL itself (RFC 2397), base64 only."""

from __future__ import annotations

import asyncio
import binascii
import threading
from collections.abc import Collection
from dataclasses import dataclass, field

import pybase64
from blake3 import blake3
from cachetools import LRUCache

from vllm_mm_ext.errors import MediaError
from vllm_mm_ext.media.fetch.blob import Blob, BlobWriter, check_size
from vllm_mm_ext.media.fetch.byte_gate import Claim
from vllm_mm_ext.media.fetch.data_url import base64_pieces, data_size, split_data_url
from vllm_mm_ext.media.fetch.source import Fetched, tighter

# Up to this many characters, hashing and decoding take less time than handing them to a thread.
_INLINE_CHARS = 64 << 10
# Characters hashed or decoded at a time, so that the whole is not copied.
_CHUNK_CHARS = 1 << 20


@dataclass(frozen=True)
class DataLocation:
    """A ``data:`` URL. Two locations are equal if their encoded texts are.

    Attributes:
        text_digest: Hex BLAKE3 of the base64 text.
        url: The whole URL. It can be long, so the text is not copied out of it.
        start: Index in ``url`` at which the base64 text begins.
        size: Number of bytes that the text stands for, or a few more; see ``data_size``.
    """

    text_digest: str
    url: str = field(repr=False, compare=False)
    start: int = field(repr=False, compare=False)
    size: int = field(compare=False)


class DataSource:
    """Decodes ``data:`` URLs and remembers digests, so that a known URL is not decoded again.

    Args:
        max_bytes: Limit on the decoded size, None for none.
        max_known: How many URLs are remembered: two hashes and a size each, never the text.

    Attributes:
        counts: How many URLs were known without decoding, and how many were decoded.
    """

    def __init__(self, *, max_bytes: int | None, max_known: int = 4096) -> None:
        self._max_bytes = max_bytes
        # Only touched on the fetcher's event loop, so it needs no lock.
        self._known: LRUCache[str, tuple[str, int]] = LRUCache(max_known)
        self.counts = {"data_known": 0, "data_decodes": 0}

    async def locate(self, url: str, claim: Claim) -> DataLocation:
        """Return the location of a URL after checking its form and hashing its text.

        Raises:
            MediaError: The URL is not a base64 ``data:`` URL.
        """
        del claim
        start = split_data_url(url).start
        if len(url) <= _INLINE_CHARS:
            return _locate(url, start)
        return await asyncio.to_thread(_locate, url, start)

    async def fetch(
        self,
        location: DataLocation,
        *,
        timeout_s: float,
        max_bytes: int | None,
        load: bool,
        claim: Claim,
    ) -> Fetched:
        """See ``Source.fetch``. ``timeout_s`` does not apply."""
        del timeout_s
        check_size(location.size, tighter(self._max_bytes, max_bytes), "The data URL")
        if not load:
            known = self._known.get(location.text_digest)
            if known is not None:
                self.counts["data_known"] += 1
                return Fetched(*known, None)
        lease = await claim.acquire(location.size)
        stop = threading.Event()
        try:
            if len(location.url) <= _INLINE_CHARS:
                blob = _decode(location, stop)
            else:
                blob = await asyncio.to_thread(_decode, location, stop)
            blob.hold(lease)
        except BaseException:
            lease.release()
            raise
        finally:
            stop.set()  # If this task was cancelled, the thread ends at its next chunk.
        self.counts["data_decodes"] += 1
        self._known[location.text_digest] = (blob.digest, blob.size)
        return Fetched.of(blob)

    def forget(self, digests: Collection[str]) -> None:
        """Forget the URLs whose content has one of these digests."""
        for text in [text for text, (digest, _) in self._known.items() if digest in digests]:
            del self._known[text]


def _locate(url: str, start: int) -> DataLocation:
    hasher = blake3()
    try:
        for begin in range(start, len(url), _CHUNK_CHARS):
            hasher.update(url[begin : begin + _CHUNK_CHARS].encode("ascii"))
        return DataLocation(str(hasher.hexdigest()), url, start, data_size(url, start))
    except UnicodeEncodeError:
        raise MediaError("Invalid data URL: the data is not base64.") from None


def _decode(location: DataLocation, stop: threading.Event) -> Blob:
    ended = False
    try:
        with BlobWriter() as writer:
            for text in base64_pieces(location.url, location.start, _CHUNK_CHARS):
                if stop.is_set():
                    raise asyncio.CancelledError
                if ended and text:
                    raise binascii.Error("padding before the end")
                ended = text.endswith("=")
                writer.append(pybase64.b64decode(text, validate=True))
            return writer.finish()
    except (binascii.Error, ValueError):
        raise MediaError("Invalid data URL: the data is not base64.") from None
