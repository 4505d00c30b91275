"""The body of an HTTP response, read as far as the media budget has room for it."""

from __future__ import annotations

import aiohttp

from vllm_mm_ext.media.fetch.blob import Blob, BlobWriter
from vllm_mm_ext.media.fetch.byte_gate import Claim, Lease
from vllm_mm_ext.media.fetch.source import tighter

# Bytes that a body of unknown length acquires at a time.
_STEP_BYTES = 8 << 20


class NoRoomError(Exception):
    """The media budget has no room for a body at present.

    Attributes:
        num_bytes: Bytes to wait for before the body is requested again.
    """

    def __init__(self, num_bytes: int) -> None:
        super().__init__(num_bytes)
        self.num_bytes = num_bytes


async def read_body(
    response: aiohttp.ClientResponse, limit: int | None, claim: Claim, lease: Lease, what: str
) -> Blob:
    """The body, which holds its bytes of the media budget from then on.

    Args:
        response: Whose headers have arrived.
        limit: On the bytes of the body; None for none.
        claim: Of the request.
        lease: What the request has for the body already.
        what: What error messages call the body.

    Raises:
        NoRoomError: There is no room for the body at present.
        MediaTooLargeError: It is past ``limit``.
    """
    size = _announced(response)
    if size is None:
        size = tighter(limit, _STEP_BYTES) or _STEP_BYTES
    if size > lease.num_bytes and not claim.grow(lease, size - lease.num_bytes):
        raise NoRoomError(size)
    with BlobWriter(limit, what) as writer:
        async for chunk in response.content.iter_any():
            writer.append(chunk)
            if writer.size > lease.num_bytes and not claim.grow(
                lease, writer.size - lease.num_bytes + _STEP_BYTES
            ):
                raise NoRoomError(2 * writer.size)
        blob = writer.finish()
    blob.hold(lease.move())
    return blob


def _announced(response: aiohttp.ClientResponse) -> int | None:
    """Length of the body as it will be read, None where the headers do not tell."""
    if response.headers.get("Content-Encoding", "identity").lower() != "identity":
        return None  # What arrives is decompressed on the way.
    return response.content_length
