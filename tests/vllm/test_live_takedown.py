"""Takedowns of what live sessions were sent; the engine is a stand-in."""

from __future__ import annotations

import asyncio
import base64
import io
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, suppress
from types import SimpleNamespace
from typing import Any

import openai
import pytest
from blake3 import blake3
from live_front import MODEL, EchoEngine, EchoSession, live_front
from openai.types.realtime import ConversationItemAdded
from PIL import Image
from websockets.exceptions import ConnectionClosed

from vllm_mm_ext.adapters.live.engine_parts import EngineListener
from vllm_mm_ext.adapters.runtime import attach_runtime, detach_runtime
from vllm_mm_ext.adapters.sight import own_part
from vllm_mm_ext.adapters.sight.own_part import OwnPart
from vllm_mm_ext.config.root import MMExtConfig
from vllm_mm_ext.media.traits import ModelTraits
from vllm_mm_ext.sight.request_log import RequestLog
from vllm_mm_ext.sight.running_requests import RunningRequests


def _picture() -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (32, 32), "teal").save(file, "png")
    return file.getvalue()


PICTURE = _picture()
DIGEST = blake3(PICTURE).hexdigest()


class Slow(EchoEngine):
    """An engine whose sessions end when they may.

    Attributes:
        may_end: They may.
    """

    def __init__(self) -> None:
        super().__init__()
        self.may_end = asyncio.Event()

    async def open(
        self, session_id: str, listener: EngineListener, *, model: str | None = None
    ) -> EchoSession:
        session = await super().open(session_id, listener, model=model)
        close = session.close

        async def later() -> None:
            await self.may_end.wait()
            await close()

        session.close = later  # type: ignore[method-assign]
        session.hashes = {"of the picture"}
        return session


class Renderer:
    """vLLM's renderer, as far as takedowns know it."""

    mm_processor_cache = None
    model_config = SimpleNamespace(runner_type="generate")

    def __init__(self) -> None:
        self._mm_executor = ThreadPoolExecutor(1)
        self._executor = SimpleNamespace(_inner=self._mm_executor)


@asynccontextmanager
async def session_with_picture() -> AsyncIterator[tuple[OwnPart, Slow, Any, Any]]:
    """A session whose client sent ``PICTURE``, and the API server's part of takedowns."""
    renderer, engine = Renderer(), Slow()
    config = MMExtConfig.from_additional_config({"mm_ext": {"sight": {"page": True}}})
    attach_runtime(config, ModelTraits(), renderer)
    try:
        async with live_front(engine) as (url, _, sessions):
            own = OwnPart(0, renderer, RunningRequests(), RequestLog(10), sessions)
            client = openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="none")
            async with client.realtime.connect(model=MODEL) as connection:
                image = f"data:image/png;base64,{base64.b64encode(PICTURE).decode()}"
                content: Any = [{"type": "input_image", "image_url": image}]
                item: Any = {"type": "message", "role": "user", "content": content}
                await connection.conversation.item.create(item=item)
                while not isinstance(await connection.recv(), ConversationItemAdded):
                    pass
                try:
                    yield own, engine, sessions, connection
                finally:
                    engine.may_end.set()
    finally:
        detach_runtime(renderer)
        renderer._mm_executor.shutdown()


async def hashes(own: OwnPart) -> list[str]:
    found: list[str] = (await own.media(None, [DIGEST]))["hashes"]
    return found


async def test_a_session_with_the_file_has_ended_when_the_takedown_goes_on() -> None:
    async with session_with_picture() as (own, engine, sessions, connection):
        ending = asyncio.create_task(own.end([DIGEST], [], []))
        with suppress(ConnectionClosed):
            while True:
                await connection.recv()
        # The session is about to end.
        assert await hashes(own) == ["of the picture"]
        assert not ending.done()
        engine.may_end.set()
        told = await ending
        assert (told["sessions"], told["sessions_left"]) == (1, 0)
        assert not sessions.listing()
        assert await hashes(own) == ["of the picture"]
        await own.forget([DIGEST], before=float("inf"))
        assert not await hashes(own)


async def test_a_session_that_does_not_end_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(own_part, "_END_S", 0.05)
    async with session_with_picture() as (own, _, _, _):
        told = await own.end([DIGEST], [], [])
        assert (told["sessions"], told["sessions_left"]) == (1, 1)


async def test_what_a_session_made_of_a_file_is_known_after_the_client_has_gone() -> None:
    async with session_with_picture() as (own, engine, sessions, connection):
        engine.may_end.set()
        await connection.close()
        while sessions.listing():
            await asyncio.sleep(0.01)
        assert await hashes(own) == ["of the picture"]
        other = (await own.media(None, ["cd" * 32]))["hashes"]
        assert not other
