"""Response headers: ``Server-Timing`` and ``X-MM-Ext`` tell what the front-end did, ``Retry-After``
tells when a request that met a busy server may be sent again.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable, MutableMapping
from http import HTTPStatus
from typing import Any

from vllm_mm_ext.adapters.sight.api_server_sight import ApiServerSight
from vllm_mm_ext.errors import BusyError, MediaError, TakenDownError
from vllm_mm_ext.fleet.route_key import SESSION_HEADER, is_route_key
from vllm_mm_ext.request.context import RequestContext, enter_request
from vllm_mm_ext.sight.running_requests import Running, RunningRequests

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

    A request whose media the operator takes down is cancelled, and answered with a 410 unless its
    answer has begun.

    Args:
        app: The next ASGI application.
        sight: Is told of requests that end, and of scrapes.
        running: Follows the requests, where an operator wants to see them.
    """

    def __init__(
        self, app: ASGIApp, sight: ApiServerSight, running: RunningRequests | None = None
    ) -> None:
        self.app = app
        self._sight = sight
        self._running = running or RunningRequests()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        if scope["path"].rstrip("/").endswith("/metrics"):
            self._sight.before_scrape()
        scope = without_route_key(scope)
        context = enter_request(RequestContext())
        trace = context.trace
        status, left = 0, False

        followed = self._running.begin(scope["path"], trace) if scope["method"] == "POST" else None

        async def heard() -> Message:
            nonlocal left
            message = await receive()
            if message["type"] == "http.disconnect" and not status:
                # vLLM ends the request, and answers nobody with a 200.
                left = True
            return message

        async def send_with_headers(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
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

        async def answer(message: Message) -> None:
            # What else vLLM may answer to a request that is cancelled says nothing to the client.
            if status or followed is None or not followed.taken_down:
                await send_with_headers(message)

        try:
            try:
                await self.app(scope, heard, answer)
            except (asyncio.CancelledError, Exception):
                if followed is None or not followed.taken_down:
                    raise
            if followed is not None and followed.taken_down:
                await _end(followed)
                trace.refused = TakenDownError.code
                if not status:
                    await answer_error(send_with_headers, TakenDownError())
        finally:
            context.end_claim()  # Where media were fetched and never rendered.
            if context.elsewhere is not None:
                context.elsewhere.end()
            self._sight.ended(trace)
            if followed is not None:
                self._running.end(followed, 0 if left else status)


def without_route_key(scope: Scope) -> Scope:
    """A request without the session header, if that holds the key of a medium for routers.

    vLLM would take all conversations about the medium for one session.
    """
    name = SESSION_HEADER.lower().encode()
    kept = [
        (header, value)
        for header, value in scope["headers"]
        if header.lower() != name or not is_route_key(value.decode("latin-1"))
    ]
    return scope if len(kept) == len(scope["headers"]) else {**scope, "headers": kept}


async def _end(request: Running) -> None:
    """Wait until nothing is done any more for a request that was cancelled."""
    while request.task is not None and request.task.cancelling():
        request.task.uncancel()
    await request.left()


async def answer_error(send: Send, error: MediaError) -> None:
    """Answer a request that vLLM does not answer with an error, in the form of OpenAI's."""
    told = {
        "message": error.message,
        "type": error.status.phrase,
        "param": error.parameter,
        "code": error.status.value,
    }
    headers = [(b"content-type", b"application/json")]
    await send({"type": "http.response.start", "status": error.status, "headers": headers})
    body = json.dumps({"error": told}).encode()
    await send({"type": "http.response.body", "body": body})
