"""What a media URL names, as far as its text tells: the same name for the same media, unfetched."""

from __future__ import annotations

from urllib.parse import unquote

from blake3 import blake3
from urllib3.exceptions import LocationParseError
from urllib3.util import parse_url

from vllm_mm_ext.errors import MediaError
from vllm_mm_ext.media.fetch.data_url import is_data_url, split_data_url

# Longer texts are not read as URLs, which takes far more time than to hash them.
_MOST_URL_CHARS = 8 << 10
# Characters hashed at a time, so that a long text is not copied as a whole.
_CHUNK_CHARS = 1 << 20
_DEFAULT_PORTS = {"http": 80, "https": 443}
# Stores of objects sign URLs for some minutes, so the next request has another signature. Under the
# parameter that holds the signature: all parameters that come with it. In lower case; "-" ends a
# prefix.
_SIGNED_BY = {
    "x-amz-signature": ("x-amz-",),
    "x-goog-signature": ("x-goog-",),
    "signature": (
        *("signature", "expires", "policy", "key-pair-id"),
        *("awsaccesskeyid", "googleaccessid", "ossaccesskeyid"),
    ),
    "sig": (
        *("sig", "sv", "ss", "srt", "sr", "sp", "st", "se", "spr", "sip"),
        *("skoid", "sktid", "skt", "ske", "sks", "skv"),
    ),
}


def media_name(url: str) -> str:
    """A name for what a URL leads to; equal for spellings of one URL that mean the same.

    Of a data URL, the name is the digest of its base64 text, as the front-end has it. Of others,
    what does not reach the origin, or only signs the request, is left out: the fragment, a default
    port, the case of scheme and host, the parameters of a signature. Names need not be exact: two
    media of one name cost nothing but balance. So a URL that cannot be read, or has more
    than 8,192 characters, is named by the digest of its text.

    Args:
        url: Any text in the place of a media URL.
    """
    if is_data_url(url):
        return data_name(url, _data_start(url))
    if len(url) > _MOST_URL_CHARS:
        return f"text:{text_digest(url)}"
    try:
        parts = parse_url(url)
    except LocationParseError:
        return f"text:{text_digest(url)}"
    if parts.scheme == "file":
        host = "" if parts.host in (None, "localhost") else parts.host
        return f"file://{host}{unquote(parts.path or '')}"
    port = None if parts.port == _DEFAULT_PORTS.get(parts.scheme or "") else parts.port
    query = None if parts.query is None else _unsigned(parts.query)
    path = parts.path or "/"
    return str(parts._replace(fragment=None, port=port, path=path, query=query or None).url)


def data_name(text: str, start: int = 0) -> str:
    """The name of media whose base64 text begins at an index of ``text``."""
    return f"data:{text_digest(text, start)}"


def text_digest(text: str, start: int = 0) -> str:
    """Hex BLAKE3 of a text from an index on."""
    hasher = blake3()
    for begin in range(start, len(text), _CHUNK_CHARS):
        piece = text[begin : begin + _CHUNK_CHARS]
        # Text from JSON may have half of a surrogate pair, which plain UTF-8 cannot encode.
        hasher.update(piece.encode("utf-8", "surrogatepass"))
    return str(hasher.hexdigest())


def _data_start(url: str) -> int:
    try:
        return split_data_url(url).start
    except MediaError:  # No media, which the server will say.
        return 0


def _unsigned(query: str) -> str:
    """A query without the parameters of a signature; the others keep their order."""
    parameters = query.split("&")
    names = [parameter.partition("=")[0].lower() for parameter in parameters]
    dropped = tuple(name for held, all_of in _SIGNED_BY.items() if held in names for name in all_of)
    prefixes = tuple(name for name in dropped if name.endswith("-"))
    return "&".join(
        parameter
        for parameter, name in zip(parameters, names, strict=True)
        if name not in dropped and not (prefixes and name.startswith(prefixes))
    )
