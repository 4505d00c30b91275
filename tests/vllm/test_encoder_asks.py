"""Encoder instances are asked one after the other, and the engine is told of every end."""

from __future__ import annotations

import asyncio
import contextvars
import json
import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from types import SimpleNamespace
from typing import Any

import pytest
from aiohttp import web
from starlette.requests import Request
from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest

from vllm_mm_ext.adapters.serving import encoder_asks, encoders_apart
from vllm_mm_ext.adapters.serving.encoder_asks import OUTCOMES, UTILITY, EncoderAsks
from vllm_mm_ext.adapters.serving.encoders_apart import without_answer
from vllm_mm_ext.adapters.serving.middleware import TraceMiddleware
from vllm_mm_ext.adapters.sight.api_server_sight import ApiServerSight
from vllm_mm_ext.fleet.encode_request import (
    ENCODE_HEADER,
    ITEM_TOKENS_HEADER,
    LEVELS_HEADER,
    SEEN,
    item_tokens_in,
)
from vllm_mm_ext.fleet.pairing import differing_parts
from vllm_mm_ext.fleet.rendezvous import ranked
from vllm_mm_ext.fleet.route_key import route_key
from vllm_mm_ext.request.context import current_request

PLAN = {"model": "content 1", "segments": {"tokens": 64}}
VIDEO = {"type": "video_url", "video_url": {"url": "http://host/a.mp4"}}
BODY = {"messages": [{"role": "user", "content": [VIDEO]}], "stream": True, "max_tokens": 9}
SENT = json.dumps(BODY).encode()
HEADERS = {"authorization": "Bearer t", "cookie": "c"}


class Core:
    """Of vLLM's client of the engine, what is told."""

    def __init__(self) -> None:
        self.told: list[tuple[str, str]] = []

    async def call_utility_all_async(self, method: str, job: str) -> list[None]:
        # Asking goes on in no request's context.
        assert current_request() is None
        self.told.append((method, job))
        return [None]


@asynccontextmanager
async def encoder(answer: Callable[[web.Request], Awaitable[web.Response]]) -> AsyncIterator[str]:
    app = web.Application()
    app.router.add_post("/v1/chat/completions", answer)
    runner = web.AppRunner(app, shutdown_timeout=0.1)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    try:
        port = runner.addresses[0][1]
        yield f"http://127.0.0.1:{port}"
    finally:
        await runner.cleanup()


def saying(status: int, seen: list[Any] | None = None) -> Any:
    async def answer(request: web.Request) -> web.Response:
        if seen is not None:
            seen.append((dict(request.headers), await request.json()))
        return web.json_response({"error": {"message": f"status {status}"}}, status=status)

    return answer


async def ask(
    asks: EncoderAsks, core: Core, levels: tuple[int, ...] = (), item_tokens: int = 0
) -> Any:
    job = asks.job(BODY, SENT, HEADERS, core)
    assert job is not None
    job.begin(levels, item_tokens)
    # Once only, whatever renders the conversation again.
    job.begin(levels, item_tokens)
    while asks._tasks:
        await asyncio.sleep(0.01)
    return job


async def test_an_encoder_is_asked_as_the_client_asked_and_told_the_plan() -> None:
    seen: list[Any] = []
    core = Core()
    async with encoder(saying(200, seen)) as url:
        asks = EncoderAsks([url], PLAN, 30.0)
        job = await ask(asks, core, (0, 2), 16384)
    ((headers, body),) = seen
    assert body == BODY
    assert differing_parts(PLAN, headers[ENCODE_HEADER]) == []
    assert headers[LEVELS_HEADER] == "0,2"
    assert item_tokens_in(headers[ITEM_TOKENS_HEADER]) == 16384
    assert headers["Authorization"] == "Bearer t"
    assert "Cookie" not in headers
    assert asks.counts == dict.fromkeys(OUTCOMES, 0) | {"encoded": 1}
    assert core.told == [(UTILITY, job.name)]


async def test_the_encoder_plans_by_what_the_server_that_asks_has_decided(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    seen: list[Any] = []
    async with encoder(saying(200, seen)) as url:
        await ask(EncoderAsks([url], PLAN, 30.0), Core(), (0, 2), 16384)
    ((headers, body),) = seen
    planned: list[Any] = []

    async def answer(_: Any, request: ChatCompletionRequest, *__: Any) -> None:
        planned.append((current_request(), request))

    async def receive() -> Any:
        return {"type": "http.request", "body": json.dumps(body).encode()}

    raw = [(name.lower().encode(), value.encode()) for name, value in headers.items()]
    asked = Request(
        {"type": "http", "method": "POST", "path": "/v1/chat/completions", "headers": raw}, receive
    )
    config = SimpleNamespace(
        model_config=SimpleNamespace(mm_ext_plan=PLAN),
        ec_transfer_config=SimpleNamespace(is_ec_producer=True, is_ec_consumer=False),
    )
    chat = SimpleNamespace(engine_client=SimpleNamespace(vllm_config=config, renderer=None))
    # An encoder asks no other one.
    idle = SimpleNamespace(encoder_asks=None)
    monkeypatch.setattr(encoders_apart, "runtime_of", lambda _: idle)
    request = ChatCompletionRequest.model_validate(body)
    await encoders_apart._apart(answer)(chat, request, asked)
    ((context, request),) = planned
    assert (context.levels, context.item_tokens) == ((0, 2), 16384)
    assert not request.stream


@pytest.mark.parametrize("status", [302, 401, 404, 409, 421, 429, 500, 503])
async def test_one_that_cannot_is_not_the_last_that_is_asked(
    status: int, caplog: pytest.LogCaptureFixture
) -> None:
    core = Core()
    async with AsyncExitStack() as stack:
        urls = [await stack.enter_async_context(encoder(saying(status))) for _ in range(2)]
        good = await stack.enter_async_context(encoder(saying(200)))
        # The good one comes last for some request.
        bodies = ({**BODY, "mm_ext": {"key": str(number)}} for number in range(1000))
        last = next(
            body for body in bodies if ranked(str(route_key(body)), [*urls, good])[-1] == good
        )
        asks = EncoderAsks([*urls, good], PLAN, 30.0)
        job = asks.job(last, SENT, {}, core)
        assert job is not None
        with caplog.at_level(logging.WARNING, logger="vllm.mm_ext"):
            job.begin((), 0)
            while asks._tasks:
                await asyncio.sleep(0.01)
    assert asks.counts["encoded"] == 1
    assert len(core.told) == 1
    assert len(caplog.records) == 2


async def test_a_proxy_may_say_in_any_encoding_that_an_encoder_is_gone() -> None:
    async def latin(_: web.Request) -> web.Response:
        return web.Response(status=502, body="\xe9".encode("latin-1") * 10_000)

    core = Core()
    async with AsyncExitStack() as stack:
        urls = [await stack.enter_async_context(encoder(a)) for a in (latin, saying(200))]
        bodies = ({**BODY, "mm_ext": {"key": str(number)}} for number in range(1000))
        first = next(b for b in bodies if ranked(str(route_key(b)), urls)[0] == urls[0])
        asks = EncoderAsks(urls, PLAN, 30.0)
        job = asks.job(first, SENT, {}, core)
        assert job is not None
        job.begin((), 0)
        while asks._tasks:
            await asyncio.sleep(0.01)
        assert asks.counts["encoded"] == 1
        assert asks._choice.candidates(job.key) == [urls[1]]


async def test_what_an_encoder_refuses_for_the_request_is_not_asked_again() -> None:
    core = Core()
    async with encoder(saying(422)) as url:
        asks = EncoderAsks([url], PLAN, 30.0)
        await ask(asks, core)
    assert asks.counts["refused"] == 1
    assert len(core.told) == 1


async def test_an_encoder_that_dies_is_left_alone_for_a_while_and_nobody_waits_for_it(
    caplog: pytest.LogCaptureFixture,
) -> None:
    core = Core()
    async with encoder(saying(200)) as url:
        pass
    asks = EncoderAsks([url], PLAN, 30.0)
    with caplog.at_level(logging.WARNING, logger="vllm.mm_ext"):
        first = await ask(asks, core)
        second = await ask(asks, core)
    assert asks.counts["failed"] == asks.counts["none_up"] == 1
    assert core.told == [(UTILITY, first.name)]
    # The engine is told of no job that nobody was asked for, and so waits for none.
    assert second.name is None
    (warning,) = caplog.records
    assert url in warning.getMessage()


async def test_requests_without_media_ask_nobody() -> None:
    body = {"messages": [{"role": "user", "content": "text"}]}
    assert EncoderAsks(["http://nobody:1"], PLAN, 30.0).job(body, b"{}", {}, Core()) is None


async def never(_: web.Request) -> web.Response:
    await asyncio.sleep(60)
    return web.Response()


async def test_asking_ends_with_the_request() -> None:
    core = Core()
    async with encoder(never) as url:
        asks = EncoderAsks([url], PLAN, 30.0)
        job = asks.job(BODY, SENT, HEADERS, core)
        assert job is not None

        async def app(*_: Any) -> None:
            context = current_request()
            assert context is not None
            context.elsewhere = job
            context.encode_elsewhere(())
            await asyncio.sleep(0.1)
            raise ConnectionError("the client has left")

        async def nothing(*_: Any) -> Any:
            raise AssertionError("nothing is answered")

        middleware = TraceMiddleware(app, ApiServerSight(dict))
        scope = {"type": "http", "path": "/", "method": "GET", "headers": []}
        with pytest.raises(ConnectionError):
            await contextvars.copy_context().run(
                asyncio.create_task, middleware(scope, nothing, nothing)
            )
        while asks._tasks:
            await asyncio.sleep(0.01)
    assert asks.counts["ended"] == 1
    assert core.told == [(UTILITY, job.name)]


async def test_an_encoder_that_hangs_is_left_alone_and_one_that_fails_for_a_request_is_not() -> (
    None
):
    core = Core()
    async with encoder(never) as hangs, encoder(saying(500)) as up:
        asks = EncoderAsks([hangs], PLAN, 0.05)
        job = asks.job(BODY, SENT, {}, core)
        assert job is not None
        job.begin((), 0)
        while asks._choice.candidates(""):
            await asyncio.sleep(0.01)
        job.end()
        asks = EncoderAsks([up], PLAN, 30.0)
        await ask(asks, core)
        assert asks._choice.candidates("") == [up]


async def test_no_more_than_so_many_requests_are_asked_for_at_a_time(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(encoder_asks, "_MOST_ASKS", 2)
    async with encoder(never) as url:
        asks = EncoderAsks([url], PLAN, 30.0)
        jobs = [asks.job(BODY, SENT, HEADERS, Core()) for _ in range(3)]
        for job in jobs:
            assert job is not None
            job.begin((), 0)
        assert [job is not None and job.name is not None for job in jobs] == [True, True, False]
        for job in jobs:
            assert job is not None
            job.end()
        while asks._tasks:
            await asyncio.sleep(0.01)


def test_an_encoder_is_not_asked_how_to_answer() -> None:
    asked = {"use_beam_search": True, "n": 4, "logprobs": True, "echo": True, "max_tokens": 7}
    request = ChatCompletionRequest(**{**BODY, **asked, "mm_ext": {"fps": 1.0}})
    found = without_answer(request)
    assert set(ChatCompletionRequest.model_fields) >= SEEN
    assert found.messages == request.messages
    assert found.max_tokens == 7
    assert found.model_extra == request.model_extra
    plain = ChatCompletionRequest(messages=BODY["messages"], max_tokens=7)
    for name in set(ChatCompletionRequest.model_fields) - SEEN:
        assert getattr(found, name) == getattr(plain, name)
