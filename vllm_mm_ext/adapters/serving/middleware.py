"""Response headers: ``Server-Timing`` and ``X-MM-Ext`` tell what the front-end did, ``Retry-After``
tells when a request that met a busy server may be sent again.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, MutableMapping
from http import HTTPStatus
from typing import Any

from vllm_mm_ext.errors import BusyError
from vllm_mm_ext.request.context import RequestContext, enter_request

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
ASGIApp = Callable[[Scope, Receive, Send], Awaitable[None]]


class TraceMiddleware:
    """ASGI middleware: opens a request's context and reports its trace in response headers.

    vLLM renders the prompt before it starts the response, streamed or not. So everything that the
    front-end did is known when the headers are sent. Requests without media get neither
    ``Server-Timing`` nor ``X-MM-Ext``.

    Every 503 gets a ``Retry-After``, vLLM's own 503s too, since a 503 always means that the same
    request may succeed a little later. Only a middleware sees the answers of all routes.

    Args:
        app: The next ASGI application.
    """

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        trace = enter_request(RequestContext()).trace

        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = list(message.get("headers", ()))
                if trace.videos or trace.audios:
                    headers.append((b"server-timing", trace.server_timing().encode("latin-1")))
                    headers.append((b"x-mm-ext", trace.summary().encode("latin-1")))
                if message["status"] == HTTPStatus.SERVICE_UNAVAILABLE and not any(
                    name.lower() == b"retry-after" for name, _ in headers
                ):
                    headers.append((b"retry-after", str(BusyError.retry_after_s).encode()))
                message["headers"] = headers
            await send(message)

        await self.app(scope, receive, send_with_headers)
