"""Live sessions of a real server, with OpenAI's own client."""

from __future__ import annotations

import asyncio
import base64
import io
import json
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import numpy as np
import openai
import pytest
import websockets
from openai.types.realtime import RealtimeServerEvent
from PIL import Image
from pydantic import TypeAdapter

from vllm_mm_ext.testing.checkpoints import checkpoint
from vllm_mm_ext.testing.server import Server, serve
from vllm_mm_ext.tools.bench.live_load import live_stats

pytestmark = pytest.mark.engine

CONFIG = Path(__file__).parents[2] / "configs" / "tiny-cpu.yaml"
KEY = "secret"
SERVER_EVENT: TypeAdapter[Any] = TypeAdapter(RealtimeServerEvent)
# The plugin's own event is not among the client's models.
EXTENSION = "mm_ext."
MANUAL: Any = {"type": "realtime", "audio": {"input": {"turn_detection": None}}}


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    args = ["--config", str(CONFIG), "--api-key", KEY]
    with serve(checkpoint("qwen2_5_omni"), plugin=True, args=args) as running:
        yield running


@asynccontextmanager
async def connected(server: Server) -> AsyncIterator[Any]:
    client = openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key=KEY)
    async with client.realtime.connect(model=server.model) as connection:
        await told(connection, "session.created")
        await connection.session.update(session=MANUAL)
        await told(connection, "session.updated")
        yield connection


async def told(connection: Any, last: str) -> list[Any]:
    """The events up to the first one of a type, valid for the client's own models."""
    events: list[Any] = []
    while not events or events[-1].type != last:
        data = await asyncio.wait_for(connection.recv_bytes(), 60)
        if json.loads(data)["type"].startswith(EXTENSION):
            continue
        event = SERVER_EVENT.validate_json(data)
        assert event.type != "error", event
        events.append(event)
    return events


async def answered(connection: Any, **response: Any) -> tuple[str, Any]:
    """Text and usage of a response."""
    await connection.response.create(response={"max_output_tokens": 8, **response})
    events = await told(connection, "response.done")
    done = events[-1].response
    text = "".join(event.delta for event in events if event.type == "response.output_text.delta")
    assert done.output[0].content[0].text == text
    assert done.status in ("completed", "incomplete")
    return text, done.usage


def tone(seconds: float) -> bytes:
    """PCM16 of a rising tone at 24 kHz."""
    at = np.arange(round(24_000 * seconds)) / 24_000
    return (np.sin(2 * np.pi * (300 + 40 * at) * at) * 12_000).astype("<i2").tobytes()


def picture(shade: int) -> bytes:
    """A JPEG file."""
    file = io.BytesIO()
    gradient = np.linspace(0, 255, 96, dtype=np.uint8)
    pixels = np.stack([np.tile(gradient, (64, 1))] * 3, axis=-1)
    pixels[:, :, 0] = shade
    Image.fromarray(pixels).save(file, "JPEG")
    return file.getvalue()


async def stream(connection: Any, sound: bytes, frames: int = 0) -> None:
    """Send sound in appends of 100 ms, with frames spread over it."""
    step = 4800
    count = max(len(sound) // step, 1)
    shown = 0
    for number in range(count):
        if shown < frames and number * frames >= shown * count:
            image = base64.b64encode(picture(25 * shown)).decode()
            event = {"type": "mm_ext.video.append", "image": image, "time_s": number / 10}
            await connection.send_raw(json.dumps(event))
            shown += 1
        piece = base64.b64encode(sound[number * step : (number + 1) * step]).decode()
        await connection.input_audio_buffer.append(audio=piece)


async def test_what_was_heard_and_seen_is_in_kv_when_the_response_begins(server: Server) -> None:
    async with connected(server) as connection:
        await connection.conversation.item.create(
            item={
                "type": "message",
                "role": "user",
                "content": [{"type": "input_text", "text": "What do you hear and see?"}],
            }
        )
        _, usage = await answered(connection)
        assert usage.output_tokens > 0
        before = live_stats(server)["units"]
        await stream(connection, tone(10), frames=10)
        # All whole units of 2 s but the last, of which the resampler may hold the end.
        while live_stats(server)["units"] < before + 4:
            await asyncio.sleep(0.1)
        await connection.input_audio_buffer.commit()
        await told(connection, "input_audio_buffer.committed")
        _, usage = await answered(connection)
        assert usage.input_token_details.audio_tokens > 0
        assert usage.input_token_details.image_tokens > 0
        # All but the last unit, what closes the message, and a part of a block.
        left = usage.input_tokens - usage.input_token_details.cached_tokens
        assert left < usage.input_tokens / 2


async def test_a_key_is_asked_for_in_a_header_or_as_browsers_name_it(server: Server) -> None:
    address = server.url.replace("http", "ws")
    for path in ("/v1/realtime", "/mm_ext/realtime"):
        with pytest.raises(websockets.exceptions.InvalidStatus) as refused:
            async with websockets.connect(address + path):
                pytest.fail("it connected")
        assert refused.value.response.status_code == 401
    protocols: Any = ["realtime", f"openai-insecure-api-key.{KEY}"]
    async with websockets.connect(f"{address}/mm_ext/realtime", subprotocols=protocols) as socket:
        assert socket.subprotocol == "realtime"
        assert json.loads(await socket.recv())["type"] == "session.created"
    assert "<html" in server.get("/mm_ext/live")


async def test_sessions_that_are_dropped_leave_nothing_in_the_engine(server: Server) -> None:
    async def used() -> None:
        headers = {"Authorization": f"Bearer {KEY}"}
        address = f"{server.url.replace('http', 'ws')}/mm_ext/realtime"
        socket = await websockets.connect(address, additional_headers=headers)
        await socket.recv()
        await socket.send(json.dumps({"type": "session.update", "session": MANUAL}))
        sound = base64.b64encode(tone(5)).decode()
        await socket.send(json.dumps({"type": "input_audio_buffer.append", "audio": sound}))
        await socket.send(json.dumps({"type": "input_audio_buffer.commit"}))
        await socket.send(json.dumps({"type": "response.create"}))
        await socket.recv()
        socket.transport.abort()

    await asyncio.gather(*(used() for _ in range(16)))
    while (now := live_stats(server))["sessions"] or now["pinned"]:
        await asyncio.sleep(0.1)
    metrics = server.get("/metrics")
    running = [line for line in metrics.splitlines() if line.startswith("vllm:num_requests_")]
    assert running
    assert all(float(line.split()[-1]) == 0 for line in running), running
