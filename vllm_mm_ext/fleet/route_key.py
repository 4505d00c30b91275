"""The key by which a router sends requests about one medium to one server.

The key is computed from the request's body alone: nothing is fetched or decoded. Values are the
same in all versions, since clients, routers and servers of a fleet are not updated at once; a test
pins them.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from typing import Any

from blake3 import blake3

from vllm_mm_ext.fleet.media_url import data_name, media_name

KEY_HEADER = "X-MM-Key"
SESSION_HEADER = "X-Session-ID"
KEY_QUERY = "mm_key"
"""Query parameter of a WebSocket's URL: browsers send no headers of one's own with it."""

_CONTEXT = "vllm_mm_ext 2026-11 route key"
_KEY = re.compile(r"mm-[0-9a-f]{32}")
# Fields of a content part that hold media: a URL, base64 text, or embeddings. In an object, the
# text is under the name below.
_URL, _BASE64, _EMBEDDINGS = "url", "data", "embeddings"
_MEDIA_FIELDS = {
    "video_url": _URL,
    "audio_url": _URL,
    "image_url": _URL,
    "input_audio": _BASE64,
    "source": _BASE64,
    "video_embeds": _EMBEDDINGS,
    "audio_embeds": _EMBEDDINGS,
    "image_embeds": _EMBEDDINGS,
}
# Fields of a body that hold content parts, or objects that have some: `messages` of chat and of
# Anthropic's messages, `input` of responses.
_HOLDERS = ("messages", "input")
# Those of scoring and reranking, and Cohere's `inputs`, hold such objects alone. Other objects may
# lie there, such as the documents of a chat, whose `source` is any text.
_OUTER_HOLDERS = (
    *("data_1", "queries", "text_1", "query", "data_2", "documents", "items", "text_2"),
    "inputs",
)
# Fields of a body that hold media by themselves: pictures that Cohere's route is to embed, and what
# a structured decision is about.
_LISTS = {"images": "image_url", "videos": "video_url", "audio": "audio_url"}
# Lists and objects that lie in each other where a route has most of them: a batch, a conversation,
# a message, its content, a tool's result, the content of the result, a part.
_MOST_NESTED = 7


def route_key(body: Mapping[str, Any]) -> str | None:
    """The key of a request: of what the body names, its first medium, or its session.

    What the body names itself (`mm_ext.key`) comes first. Else the first medium of the messages
    counts, so that a conversation keeps its key as it goes on: by the client's `uuid`, else by its
    URL (``media_name``) or its base64 text. A body without media has the key of its session.

    Args:
        body: Parsed JSON of a request to a chat, completions, responses, messages or pooling route.
            It may be anything that a client sends; what it should not be counts as absent.

    Returns:
        ``mm-`` and 32 hex digits, or None for a body with neither media nor session, which any
        server can take.
    """
    block = body.get("mm_ext")
    if isinstance(block, Mapping) and isinstance(named := block.get("key"), str) and named:
        return named_key(named)
    for part in _parts(body):
        if (name := _name(part)) is not None:
            return _key(name)
    session = _session(body)
    return None if session is None else session_route_key(session)


def named_key(name: str) -> str:
    """The key for a name that the client chose; a key stays as it is.

    Args:
        name: For example a content digest, or a key that ``route_key`` computed before.
    """
    return name if is_route_key(name) else _key(f"name:{name}")


def url_route_key(url: str, validator: str = "") -> str:
    """The key of the medium behind a URL.

    Args:
        url: As a request would spell it.
        validator: ETag or the like, where requests about other versions of the content may go to
            another server; empty for the key that ``route_key`` gives a body with this URL.
    """
    name = media_name(url)
    return _key(f"{name}\n{validator}" if validator else name)


def session_route_key(session: str) -> str:
    """The key of a session without media."""
    return _key(f"session:{session}")


def is_route_key(text: str) -> bool:
    """Whether a text has the form of a key, which no client's own id has by chance."""
    return _KEY.fullmatch(text) is not None


def _key(name: str) -> str:
    hasher = blake3(name.encode("utf-8", "surrogatepass"), derive_key_context=_CONTEXT)
    return f"mm-{hasher.hexdigest(length=16)}"


def _parts(body: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    """Content parts of a body in the order of its messages."""
    for field in _HOLDERS:
        yield from _nested(body.get(field), _MOST_NESTED)
    for field in _OUTER_HOLDERS:
        value = body.get(field)
        for one in value if isinstance(value, list | tuple) else (value,):
            if isinstance(one, Mapping):
                yield from _nested(one.get("content"), _MOST_NESTED)
    for field, kind in _LISTS.items():
        value = body.get(field)
        if isinstance(value, list | tuple):
            yield from ({kind: url} for url in value)


def _nested(value: Any, depth: int) -> Iterator[Mapping[str, Any]]:
    """The objects in a value, each before what its `content` or `output` holds."""
    if not depth:
        return
    if isinstance(value, Mapping):
        yield value
        for field in ("content", "output"):
            yield from _nested(value.get(field), depth - 1)
    # A client in Python may have tuples where JSON has lists.
    elif isinstance(value, list | tuple):
        for one in value:
            yield from _nested(one, depth - 1)


def _name(part: Mapping[str, Any]) -> str | None:
    """What names the medium of a part; None if the part has none."""
    for field, kind in _MEDIA_FIELDS.items():
        if field not in part:
            continue
        if field == "source" and not isinstance(part[field], Mapping):
            continue  # A name that many kinds of objects have.
        if (uuid := part.get("uuid")) is not None:
            return f"uuid:{uuid}"
        value = part[field]
        if kind == _EMBEDDINGS and value:
            return data_name(json.dumps(value, sort_keys=True, default=str))
        if isinstance(value, Mapping):
            # Anthropic's `source` has either.
            kind = kind if kind in value else _URL
            value = value.get(kind)
        if isinstance(value, str) and value:
            return data_name(value) if kind == _BASE64 else media_name(value)
    return None


def _session(body: Mapping[str, Any]) -> str | None:
    """The session as vLLM finds it in a body, or as vllm-router does."""
    if isinstance(session := body.get("session_id"), str) and session:
        return session
    for field in ("vllm_xargs", "session_params"):
        block = body.get(field)
        if isinstance(block, Mapping) and isinstance(session := block.get("session_id"), str):
            return session or None
    return None
