"""Reads ``data:`` URLs (RFC 2397) as browsers do (WHATWG, Fetch, "data: URLs"), base64 only.

In one respect it reads more than browsers: a comma may stand in the media type without quotes.
Browsers write such URLs, of recordings (``data:video/webm;codecs=vp8,opus;base64,...``).
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import NamedTuple
from urllib.parse import unquote

from vllm_mm_ext.errors import MediaError

# The data is looked for up to here. Base64 text has no semicolon, so the last match is the end of
# the media type, whatever commas and quoted strings its parameters have.
_MAX_HEADER_CHARS = 4096
_BASE64 = re.compile(r"; *base64 *,", re.IGNORECASE)
_WHITE_SPACE = "\t\n\f\r "
_NO_WHITE_SPACE = dict.fromkeys(map(ord, _WHITE_SPACE))
# Most characters of the padding, each of which may be escaped.
_PADDING_CHARS = 2 * len("%3D")


class DataUrl(NamedTuple):
    """The parts of a base64 ``data:`` URL.

    Attributes:
        media_type: In lower case, without parameters; may be empty.
        start: Index in the URL at which the base64 text begins.
    """

    media_type: str
    start: int


def is_data_url(url: str) -> bool:
    """Whether the scheme of a URL is ``data``."""
    return url[:5].lower() == "data:"


def split_data_url(url: str) -> DataUrl:
    """Find the parts of a URL whose scheme is ``data``.

    Raises:
        MediaError: It has no data, or data that is not base64.
    """
    head = url[len("data:") : _MAX_HEADER_CHARS]
    matches = list(_BASE64.finditer(head))
    if matches:
        media_type = head[: matches[-1].start()].partition(";")[0]
        return DataUrl(media_type.strip().lower(), len("data:") + matches[-1].end())
    if "," not in url:
        raise MediaError("Invalid data URL: there is no ',' before the data.")
    raise MediaError("Only base64 data URLs are supported.")


def is_jpeg_sequence(url: str) -> bool:
    """Whether a URL holds the frames of a video as JPEG files, separated by commas."""
    if not is_data_url(url):
        return False
    try:
        return split_data_url(url).media_type == "video/jpeg"
    except MediaError:
        return False


def data_size(url: str, start: int) -> int:
    """Number of bytes that the base64 text of a URL stands for.

    Exact unless white space is written as escapes, which then counts.

    Args:
        url: The whole URL.
        start: Index at which the base64 text begins.
    """
    unused = sum(url.count(char, start) for char in _WHITE_SPACE) + 2 * url.count("%", start)
    end = max(start, len(url.rstrip(_WHITE_SPACE)) - _PADDING_CHARS)
    padding = plain_base64(url[end:]).count("=")
    return (len(url) - start - unused - padding) * 3 // 4


def base64_pieces(url: str, start: int, size: int) -> Iterator[str]:
    """The base64 text of a URL in pieces, without white space and escapes, padded at the end.

    Each piece can be decoded by itself.

    Args:
        url: The whole URL.
        start: Index at which the base64 text begins.
        size: Characters of the URL to a piece.
    """
    held = ""
    for begin in range(start, len(url), size):
        text = held + url[begin : begin + size]
        if begin + size >= len(url):
            yield padded(plain_base64(text))
            return
        # An escape has three characters, and may go on in the next piece.
        cut = text.find("%", max(0, len(text) - 2))
        whole = plain_base64(text if cut < 0 else text[:cut])
        quads = len(whole) // 4 * 4
        held = whole[quads:] + ("" if cut < 0 else text[cut:])
        yield whole[:quads]


def plain_base64(text: str) -> str:
    """Base64 text without white space and without percent escapes."""
    if "%" in text:
        text = unquote(text, "latin-1")
    if any(char in text for char in _WHITE_SPACE):
        text = text.translate(_NO_WHITE_SPACE)
    return text


def padded(text: str) -> str:
    """Base64 text with the padding that it may lack."""
    return text if text.endswith("=") else text + "=" * (-len(text) % 4)
