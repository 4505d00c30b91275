"""ASGI middleware that adds the key of a request for clients that do not send it."""

from __future__ import annotations

import asyncio
import json
from collections import deque
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any
from urllib.parse import parse_qs

from vllm_mm_ext.fleet.route_key import (
    KEY_HEADER,
    KEY_QUERY,
    SESSION_HEADER,
    named_key,
    route_key,
)

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
ASGIApp = Callable[[Scope, Receive, Send], Awaitable[None]]

_KEY, _SESSION = KEY_HEADER.lower().encode(), SESSION_HEADER.lower().encode()
_JSON = b"json"
# Up to this many bytes, finding the key takes less time than handing the body to a thread.
_INLINE_BYTES = 64 << 10
# Copies of a body while its key is found: in one piece, as text of up to four bytes for a
# character, and parsed.
_COPIES = 6


class RouteKeyMiddleware:
    """Puts the key of each request into its headers, for a gateway that stands before a router.

    Headers that the client sent stay as they are. So a client with a session of its own is routed
    by that where a router looks at ``X-Session-ID``. Bodies are read, up to a limit, and passed on
    byte for byte; answers are not touched. A WebSocket gets the key that its URL names
    (``?mm_key=``). A body that would go past one of the limits is passed on as it comes, without a
    key.

    Args:
        app: The next ASGI application.
        max_body_bytes: Of one body, so that a few slow clients do not take up what all share.
        max_held_bytes: Of all bodies that are held at a time, with the copies that finding a key
            makes: at most seven bytes for each byte of a body.
    """

    def __init__(
        self, app: ASGIApp, max_body_bytes: int = 128 << 20, max_held_bytes: int = 1 << 30
    ) -> None:
        self._app = app
        self._max_body_bytes = max_body_bytes
        self._max_held_bytes = max_held_bytes
        self._held_bytes = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] not in ("http", "websocket"):
            await self._app(scope, receive, send)
            return
        names = {name.lower(): value for name, value in scope["headers"]}
        key = names.get(_KEY)
        if scope["type"] == "websocket":
            key = key or _of_socket(scope["query_string"])
        elif key is None and scope["method"] == "POST" and _JSON in names.get(b"content-type", b""):
            await self._by_body(scope, receive, send)
            return
        await self._app(_with_key(scope, key), receive, send)

    async def _by_body(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on whose key its body tells."""
        # What came of the body and the application has not taken yet.
        messages: deque[Message] = deque()
        held = 0

        def hold(size: int) -> None:
            nonlocal held
            held += size
            self._held_bytes += size

        async def again() -> Message:
            if not messages:
                return await receive()
            message = messages.popleft()
            hold(-len(message.get("body", b"")))
            return message

        try:
            whole = False
            while not whole:
                message = await receive()
                messages.append(message)
                hold(len(message.get("body", b"")))
                if (
                    message["type"] != "http.request"
                    or held > self._max_body_bytes
                    or self._held_bytes > self._max_held_bytes
                ):
                    break
                whole = not message.get("more_body", False)
            key, copies = None, _COPIES * held
            if whole and self._held_bytes + copies <= self._max_held_bytes:
                hold(copies)
                key = await _of_body([one.get("body", b"") for one in messages])
                hold(-copies)
            await self._app(_with_key(scope, key), again, send)
        finally:
            self._held_bytes -= held


def _with_key(scope: Scope, key: bytes | None) -> Scope:
    if key is None:
        return scope
    names = {name.lower() for name, _ in scope["headers"]}
    # A name that the client chose would be a session to vLLM: one of all who ask about a medium.
    session = named_key(key.decode("latin-1")).encode()
    added = [pair for pair in ((_KEY, key), (_SESSION, session)) if pair[0] not in names]
    return {**scope, "headers": [*scope["headers"], *added]}


def _of_socket(query: bytes) -> bytes | None:
    named = parse_qs(query.decode("latin-1")).get(KEY_QUERY)
    return named_key(named[0]).encode() if named else None


async def _of_body(pieces: list[bytes]) -> bytes | None:
    if sum(map(len, pieces)) <= _INLINE_BYTES:
        return _key(pieces)
    return await asyncio.to_thread(_key, pieces)


def _key(pieces: list[bytes]) -> bytes | None:
    try:
        parsed = json.loads(b"".join(pieces))
        key = route_key(parsed) if isinstance(parsed, dict) else None
    except (ValueError, RecursionError):  # The server will say what is wrong with it.
        return None
    return None if key is None else key.encode()
