"""Keys reach routers in headers, whether the client or a gateway puts them there."""

import asyncio
import json
from typing import Any

import pytest

from vllm_mm_ext.adapters.serving.middleware import without_route_key
from vllm_mm_ext.fleet.key_headers import route_headers, with_route_key
from vllm_mm_ext.fleet.key_middleware import RouteKeyMiddleware
from vllm_mm_ext.fleet.route_key import named_key, route_key, url_route_key

URL = "https://media.example.com/a.mp4"
VIDEO = {"type": "video_url", "video_url": {"url": URL}}
BODY = {"model": "m", "messages": [{"role": "user", "content": [VIDEO]}]}
JSON = (b"content-type", b"application/json; charset=utf-8")


class Seen:
    """An application that reads whole requests and answers in two pieces."""

    headers: dict[str, str]
    body: bytes
    disconnected: bool

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        self.headers = {name.decode(): value.decode() for name, value in scope["headers"]}
        self.body, self.disconnected = b"", False
        if scope["type"] == "websocket":
            return
        more = True
        while more:
            message = await receive()
            self.disconnected = message["type"] == "http.disconnect"
            self.body += message.get("body", b"")
            more = not self.disconnected and message.get("more_body", False)
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"a", "more_body": True})
        await send({"type": "http.response.body", "body": b"b"})


async def passed(
    *pieces: bytes,
    headers: list[tuple[bytes, bytes]] | None = None,
    limit: int = 1 << 24,
    **scope: Any,
) -> tuple[Seen, list[Any]]:
    """What the application saw, and what it sent. Without pieces the client disconnects."""
    app, sent = Seen(), []
    messages = [{"type": "http.request", "body": piece, "more_body": True} for piece in pieces]
    if messages:
        messages[-1]["more_body"] = False
    messages.append({"type": "http.disconnect"})

    async def receive() -> Any:
        return messages.pop(0)

    async def send(message: Any) -> None:
        sent.append(message)

    made = {
        "type": "http",
        "method": "POST",
        "query_string": b"",
        "headers": [JSON] if headers is None else headers,
        **scope,
    }
    await RouteKeyMiddleware(app, max_body_bytes=limit)(made, receive, send)
    return app, sent


async def test_a_gateway_adds_the_key_and_passes_the_body_on_byte_for_byte() -> None:
    raw = json.dumps(BODY, indent=3).encode()
    app, sent = await passed(raw[:10], raw[10:])
    assert app.headers["x-mm-key"] == app.headers["x-session-id"] == url_route_key(URL)
    assert app.body == raw
    assert [message.get("body") for message in sent] == [None, b"a", b"b"]


async def test_a_body_past_the_limit_passes_as_it_comes_without_a_key() -> None:
    raw = json.dumps(BODY).encode()
    app, _ = await passed(raw[:10], raw[10:40], raw[40:], limit=20)
    assert "x-mm-key" not in app.headers
    assert app.body == raw


async def test_a_body_of_megabytes_has_a_key() -> None:
    url = "data:video/mp4;base64," + "AAAA" * 500_000
    part = {"type": "video_url", "video_url": {"url": url}}
    raw = json.dumps({"messages": [{"role": "user", "content": [part]}]}).encode()
    app, _ = await passed(raw)
    assert app.headers["x-mm-key"] == url_route_key(url)


async def test_bodies_held_at_a_time_and_their_copies_are_bounded_and_let_go() -> None:
    raw = json.dumps(BODY).encode()
    keys, first = [], asyncio.Event()

    async def app(scope: Any, receive: Any, send: Any) -> None:
        del receive, send
        keys.append(dict(scope["headers"]).get(b"x-mm-key"))
        await first.wait()

    async def receive() -> Any:
        return {"type": "http.request", "body": raw}

    async def send(message: Any) -> None:
        del message

    middleware = RouteKeyMiddleware(app, max_held_bytes=len(raw) * 15 // 2)
    scope = {"type": "http", "method": "POST", "headers": [JSON], "query_string": b""}
    calls = [asyncio.create_task(middleware(scope, receive, send)) for _ in range(2)]
    for _ in range(20):
        await asyncio.sleep(0)
    first.set()
    await asyncio.gather(*calls)
    await middleware(scope, receive, send)
    assert [key is not None for key in keys] == [True, False, True]


@pytest.mark.parametrize("raw", [b"", b"{", b"[1]", b"\xff", b"[" * 100_000, b'{"prompt": "Hi"}'])
async def test_what_has_no_key_passes_unchanged(raw: bytes) -> None:
    app, _ = await passed(raw)
    assert "x-mm-key" not in app.headers
    assert app.body == raw


async def test_a_client_that_goes_while_it_sends_is_gone_for_the_application_too() -> None:
    app, _ = await passed()
    assert app.disconnected


async def test_headers_of_the_client_stay() -> None:
    raw = json.dumps(BODY).encode()
    app, _ = await passed(raw, headers=[JSON, (b"x-session-id", b"mine")])
    assert app.headers["x-session-id"] == "mine"
    assert app.headers["x-mm-key"] == url_route_key(URL)
    app, _ = await passed(raw, headers=[JSON, (b"x-mm-key", b"theirs")])
    assert app.headers["x-mm-key"] == "theirs"
    assert app.headers["x-session-id"] == named_key("theirs")


async def test_a_websocket_has_the_key_that_its_url_names() -> None:
    app, _ = await passed(type="websocket", query_string=b"model=m&mm_key=room%207", headers=[])
    assert app.headers["x-mm-key"] == named_key("room 7")
    app, _ = await passed(type="websocket", headers=[(b"x-session-id", b"s")])
    assert app.headers == {"x-session-id": "s"}
    app, _ = await passed(type="websocket", headers=[])
    assert not app.headers


def test_a_client_sends_the_key_in_both_headers_and_in_the_body() -> None:
    body, headers = with_route_key({**BODY, "mm_ext": {"fps": 2}})
    assert headers == {"X-MM-Key": url_route_key(URL), "X-Session-ID": url_route_key(URL)}
    assert headers == route_headers(body) == route_headers(BODY)
    assert body["mm_ext"] == {"fps": 2, "key": url_route_key(URL)}
    assert route_key({"messages": [], "mm_ext": body["mm_ext"]}) == url_route_key(URL)
    assert with_route_key({"prompt": "Hi"}) == ({"prompt": "Hi"}, {})


def test_arguments_of_the_openai_client_have_the_key_of_the_body_that_it_sends() -> None:
    for extra in ({"mm_ext": {"key": "asset 7"}}, {"session_id": "s"}):
        body = {"model": "m", "messages": []}
        key = route_key({**body, **extra})
        assert key is not None
        assert route_headers({**body, "extra_body": extra})["X-MM-Key"] == key


def test_a_server_does_not_take_the_key_for_a_session() -> None:
    kept = [(b"x-session-id", b"conversation 7"), (b"x-mm-key", url_route_key(URL).encode())]
    keyed = [*kept[1:], (b"X-Session-ID", url_route_key(URL).encode())]
    assert without_route_key({"headers": kept})["headers"] == kept
    assert without_route_key({"headers": keyed})["headers"] == kept[1:]
