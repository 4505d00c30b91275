"""Live sessions on a real server within the test's event loop, whose engine is a stand-in."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from dataclasses import replace
from typing import Any

import uvicorn
from starlette.applications import Starlette
from starlette.routing import WebSocketRoute
from starlette.websockets import WebSocket

from vllm_mm_ext.adapters.live.engine import UnknownModelError
from vllm_mm_ext.adapters.live.engine_parts import EngineListener
from vllm_mm_ext.adapters.live.registry import LiveSessions
from vllm_mm_ext.config.live_settings import LiveSettings
from vllm_mm_ext.live.effects import Append, Respond, Usage
from vllm_mm_ext.live.family import FamilyTraits
from vllm_mm_ext.live.prompt import Message, Text
from vllm_mm_ext.media.types import SizeRule

MODEL = "echo"
USAGE = Usage(10, 5, 1, 0, 0)
TRAITS = FamilyTraits(
    hears=True,
    sees=True,
    images=True,
    audio_rate=16_000,
    unit_s=1.0,
    frame_multiple=2,
    fps=1.0,
    size_rule=SizeRule("fixed", height=64, width=64),
    turn_end=False,
)


class EchoEngine:
    """Answers each prompt with the words of its last text, one word a step of the event loop.

    A prompt of the text "endless" is answered without end, of "break" with an error of the engine.

    Attributes:
        sessions: The sessions that are open.
        appended: Number of prompts that were computed ahead.
    """

    traits = TRAITS
    context_tokens = 10_000
    pinned = 0

    def __init__(self) -> None:
        self.sessions: set[EchoSession] = set()
        self.appended = 0

    def measure(self, message: Message) -> int:
        """Words, and two for the role."""
        return sum(len(part.text.split()) for part in message.parts if isinstance(part, Text)) + 2

    async def open(
        self, session_id: str, listener: EngineListener, *, model: str | None = None
    ) -> EchoSession:
        """Begin a session."""
        await asyncio.sleep(0)
        if model not in (None, MODEL):
            raise UnknownModelError(f"The model `{model}` does not exist.")
        session = EchoSession(self, session_id, listener)
        self.sessions.add(session)
        return session


class EchoSession:
    """The engine's side of a session of ``EchoEngine``.

    Attributes:
        hashes: Of its mm items, as a test says.
    """

    def __init__(self, engine: EchoEngine, session_id: str, listener: EngineListener) -> None:
        self.session_id = session_id
        self._engine = engine
        self.listener = listener
        self.hashes: set[str] = set()
        self._responses: dict[str, asyncio.Task[None]] = {}

    def append(self, append: Append) -> None:
        """Say at once that it is done."""
        self._engine.appended += 1
        tokens = sum(map(self._engine.measure, append.prompt.messages))
        asyncio.get_running_loop().call_soon(self.listener.appended, tokens, 1, None)

    def respond(self, respond: Respond) -> None:
        """Begin an answer."""
        self._responses[respond.response_id] = asyncio.create_task(self._answer(respond))

    async def _answer(self, respond: Respond) -> None:
        texts = [
            part.text
            for message in respond.prompt.messages
            for part in message.parts
            if isinstance(part, Text)
        ]
        words = texts[-1].split() if texts else ["nothing"]
        if words == ["break"]:
            self.listener.failed(respond.response_id, "server_error", "engine_error", "It broke.")
            return
        written = 0
        while words == ["endless"]:
            await asyncio.sleep(0)
            self.listener.wrote(respond.response_id, (0,), "on and on " * 1000, USAGE)
        for word in words:
            await asyncio.sleep(0)
            self.listener.wrote(respond.response_id, (written,), f"{word} ", USAGE)
            written += 1
        self.listener.ended(respond.response_id, "stop", replace(USAGE, output_tokens=written))

    def abort(self, response_id: str) -> None:
        """Stop an answer."""
        self._responses.pop(response_id).cancel()

    async def close(self) -> None:
        """Stop all."""
        for task in self._responses.values():
            task.cancel()
        self._engine.sessions.discard(self)
        await asyncio.sleep(0)


@asynccontextmanager
async def live_front(engine: Any = None, **settings: Any) -> AsyncIterator[tuple[str, Any, Any]]:
    """A server on loopback; ``settings`` are those of the section ``live``.

    Yields:
        Its base URL (``http://...``), its engine, and its ``LiveSessions``.
    """
    engine = engine or EchoEngine()
    sessions = LiveSessions(engine, LiveSettings(**settings), MODEL, 1 << 24)

    async def realtime(websocket: WebSocket) -> None:
        await websocket.accept()
        await sessions.serve(websocket, websocket.query_params.get("model"))

    paths = ("/v1/realtime", "/mm_ext/realtime")
    app = Starlette(routes=[WebSocketRoute(path, realtime) for path in paths])
    config = uvicorn.Config(
        app,
        host="127.0.0.1",
        port=0,
        log_level="error",
        lifespan="off",
        ws_per_message_deflate=False,
    )
    # As vLLM does.
    server = app.state.server = uvicorn.Server(config)
    serving = asyncio.create_task(server.serve())
    try:
        while not server.started:
            await asyncio.sleep(0.01)
        port = server.servers[0].sockets[0].getsockname()[1]
        yield f"http://127.0.0.1:{port}", engine, sessions
    finally:
        server.should_exit = True
        with suppress(asyncio.CancelledError):
            await serving
