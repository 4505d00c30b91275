"""Who may open a live session, on a real server without an engine."""

from __future__ import annotations

import asyncio
from argparse import Namespace
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from types import SimpleNamespace
from typing import Any

import pytest
import uvicorn
import websockets
from fastapi import FastAPI, WebSocket
from websockets.exceptions import InvalidStatus

from vllm_mm_ext.adapters.live.live_routes import OPENAI_PATH, OWN_PATH, PAGE_PATH, LiveRoutes

# What a server without an engine answers to those who may connect.
NO_SESSIONS = 404


@asynccontextmanager
async def running(app: FastAPI, engine: Any = None, **args: Any) -> AsyncIterator[str]:
    routes = LiveRoutes()
    routes.attach_to(app)
    state = SimpleNamespace(openai_serving_chat=object())
    args = {"allowed_origins": ["*"], "api_key": None} | args
    await routes.start(engine, state, Namespace(**args))
    assert routes.stats() == {}
    server = uvicorn.Server(uvicorn.Config(app, host="127.0.0.1", port=0, log_level="error"))
    # As vLLM has it.
    app.state.server = server
    serving = asyncio.create_task(server.serve())
    while not server.started:
        await asyncio.sleep(0.01)
    yield f"127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    server.should_exit = True
    await serving


async def status(address: str, path: str = OWN_PATH, **options: Any) -> int:
    with pytest.raises(InvalidStatus) as refused:
        async with websockets.connect(f"ws://{address}{path}", **options):
            pytest.fail("it connected")
    return refused.value.response.status_code


async def test_without_an_engine_the_reason_is_told_and_the_page_is_there() -> None:
    import aiohttp

    async with running(FastAPI()) as address:
        for path in (OWN_PATH, OPENAI_PATH):
            assert await status(address, path) == NO_SESSIONS
        with pytest.raises(InvalidStatus) as refused:
            async with websockets.connect(f"ws://{address}{OWN_PATH}"):
                pytest.fail("it connected")
        assert b"there is no engine" in (refused.value.response.body or b"")
        async with aiohttp.ClientSession() as session:
            answer = await session.get(f"http://{address}{PAGE_PATH}")
            assert answer.content_type == "text/html"
            assert "<html" in await answer.text()


async def test_a_model_that_cannot_be_looked_at_leaves_the_server_its_other_routes() -> None:
    broken = SimpleNamespace(vllm_config=SimpleNamespace(model_config=None))
    async with running(FastAPI(), broken) as address:
        assert await status(address) == NO_SESSIONS


async def test_a_key_is_taken_from_the_header_or_from_a_subprotocol() -> None:
    async with running(FastAPI(), api_key=["one", "two"]) as address:
        assert await status(address) == 401
        for key, expected in (("two", NO_SESSIONS), ("three", 401)):
            header = {"Authorization": f"Bearer {key}"}
            assert await status(address, additional_headers=header) == expected
            protocols = ["realtime", f"openai-insecure-api-key.{key}"]
            assert await status(address, subprotocols=protocols) == expected
        # A header that is wrong is not made good by a subprotocol.
        header = {"Authorization": "Bearer three"}
        protocols = ["openai-insecure-api-key.one"]
        assert await status(address, additional_headers=header, subprotocols=protocols) == 401


async def test_pages_of_other_origins_are_refused_where_origins_are_set() -> None:
    async with running(FastAPI(), allowed_origins=["https://good.example"]) as address:
        assert await status(address) == NO_SESSIONS
        assert await status(address, origin=f"http://{address}") == NO_SESSIONS
        assert await status(address, origin="https://good.example") == NO_SESSIONS
        assert await status(address, origin="https://bad.example") == 403


async def test_a_route_that_vllm_has_already_stays_vllms() -> None:
    app = FastAPI()

    @app.websocket(OPENAI_PATH)
    async def transcribe(websocket: WebSocket) -> None:
        await websocket.accept()
        await websocket.send_text("vLLM's own")
        await websocket.close()

    async with running(app) as address:
        async with websockets.connect(f"ws://{address}{OPENAI_PATH}") as socket:
            assert await socket.recv() == "vLLM's own"
        assert await status(address) == NO_SESSIONS


async def test_messages_are_not_compressed_once_somebody_has_connected() -> None:
    app = FastAPI()

    @app.websocket("/another")
    async def another(websocket: WebSocket) -> None:
        await websocket.accept()
        await websocket.close()

    async with running(app) as address:
        async with websockets.connect(f"ws://{address}/another") as socket:
            assert socket.protocol.extensions, "nothing to be ended"
        await status(address)
        async with websockets.connect(f"ws://{address}/another") as socket:
            assert not socket.protocol.extensions
