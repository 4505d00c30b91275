"""The body of an HTTP response, read as far as the media budget has room for it."""

from __future__ import annotations

import re

import aiohttp

from vllm_mm_ext.media.fetch.blob import Blob, BlobWriter
from vllm_mm_ext.media.fetch.byte_gate import Claim
from vllm_mm_ext.media.fetch.byte_lease import Lease
from vllm_mm_ext.media.fetch.source import tighter

# Bytes that a body may hold before they have arrived. Few: an origin may take minutes to send them.
_STEP_BYTES = 1 << 20
# A range that begins with the first byte (RFC 9110, section 14.4).
_RANGE = re.compile(r"\s*bytes\s+0-(?P<last>\d{1,18})/(?P<all>\d{1,18})\s*", re.IGNORECASE)


class NoRoomError(Exception):
    """The media budget has no room for a body at present.

    Attributes:
        num_bytes: Bytes to wait for before the body is requested again.
        sure: Those of them that the body has in any case.
        arrived: Those that have arrived once, to hold until they arrive again.
    """

    def __init__(self, num_bytes: int, sure: int, arrived: int) -> None:
        super().__init__(num_bytes, sure, arrived)
        self.num_bytes = num_bytes
        self.sure = sure
        self.arrived = arrived


async def read_body(
    response: aiohttp.ClientResponse, limit: int | None, claim: Claim, lease: Lease, what: str
) -> Blob:
    """The body, which holds its bytes of the media budget from then on.

    Bytes are acquired as they arrive, a step ahead: what an origin announces and does not send
    holds nothing.

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
    announced = _announced(response)
    most = tighter(announced, limit)
    with BlobWriter(limit, what) as writer:
        async for chunk in response.content.iter_any():
            writer.append(chunk)
            missing = writer.size - lease.num_bytes
            if missing <= 0:
                continue
            spare = _at_most(most, writer.size + _STEP_BYTES) - writer.size
            if not claim.grow(lease, missing, spare):
                guess = _at_most(most, max(2 * writer.size, _STEP_BYTES))
                raise NoRoomError(announced or guess, announced or writer.size, writer.size)
        blob = writer.finish()
    blob.hold(lease.move())
    return blob


def whole_range(response: aiohttp.ClientResponse) -> int | None:
    """Length of the content if a 206 has all of it, else None.

    Some servers and proxies answer a request without a range as if it had asked for all bytes.
    """
    found = _RANGE.fullmatch(response.headers.get("Content-Range", ""))
    if found is None or int(found["last"]) + 1 != int(found["all"]):
        return None
    return int(found["all"])


def _at_most(most: int | None, num_bytes: int) -> int:
    return num_bytes if most is None else min(most, num_bytes)


def _announced(response: aiohttp.ClientResponse) -> int | None:
    """Length of the body as it will be read, None where the headers do not tell."""
    if response.headers.get("Content-Encoding", "identity").lower() != "identity":
        return None  # What arrives is decompressed on the way.
    return response.content_length
