"""The socket of a live session, on a real server with real clients; the engine is a stand-in."""

from __future__ import annotations

import asyncio
import base64
import gc
import json
import os
import random
import threading
import weakref
from contextlib import AbstractAsyncContextManager
from typing import Any

import openai
import pytest
import websockets
from live_front import MODEL, EchoEngine, live_front
from openai.types.realtime import RealtimeServerEvent
from pydantic import TypeAdapter
from websockets.exceptions import ConnectionClosed

from vllm_mm_ext.adapters.live import connection as connection_module

SERVER_EVENT: TypeAdapter[Any] = TypeAdapter(RealtimeServerEvent)
NO_TURNS: Any = {"type": "realtime", "audio": {"input": {"turn_detection": None}}}


def connect(url: str, model: str = MODEL) -> AbstractAsyncContextManager[Any]:
    client = openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="none")
    return client.realtime.connect(model=model)


def raw(url: str) -> Any:
    return websockets.connect(f"ws{url.removeprefix('http')}/v1/realtime?model={MODEL}")


async def told(connection: Any, last: str) -> list[Any]:
    """The events up to the first one of a type; each is valid for the client's own models."""
    events: list[Any] = []
    while not events or events[-1].type != last:
        event = SERVER_EVENT.validate_json(await asyncio.wait_for(connection.recv_bytes(), 20))
        events.append(event)
    return events


async def ask(connection: Any, text: str) -> str:
    """The answer to a text, which the stand-in repeats."""
    content = [{"type": "input_text", "text": text}]
    item = {"type": "message", "role": "user", "content": content}
    await connection.conversation.item.create(item=item)
    await connection.response.create()
    done = (await told(connection, "response.done"))[-1]
    answer: str = done.response.output[0].content[0].text
    return answer.strip()


def close_code(closed: ConnectionClosed) -> int:
    assert closed.rcvd is not None
    return closed.rcvd.code


async def released(sessions: Any, engine: EchoEngine) -> None:
    """Wait until the server holds no session."""
    while sessions.stats()["sessions"] or engine.sessions:
        await asyncio.sleep(0.01)


async def test_a_session_answers_the_openai_client_and_ends_when_the_client_closes() -> None:
    async with live_front() as (url, engine, sessions):
        async with connect(url) as connection:
            (created,) = await told(connection, "session.created")
            assert created.session.model == MODEL
            await connection.session.update(session=NO_TURNS)
            await told(connection, "session.updated")
            assert await ask(connection, "one two three") == "one two three"
            assert sessions.stats()["sessions"] == 1
        await released(sessions, engine)
        assert sessions.stats()["closed"] == 1


async def test_every_malformed_message_gets_an_error_event_and_the_session_goes_on() -> None:
    messages = [
        *("", "{", "null", "[]", "7", '"text"', "{}", '{"type": 7}', '{"type": "no.such"}'),
        *('{"type": "session.update"}', '{"type": "session.update", "session": {"x": 1}}'),
        *('{"type": "input_audio_buffer.append", "audio": "*"}', "[" * 100_000, "9" * 10_000),
        '{"type": "response.create", "response": {"tools": [{"type": "function"}]}}',
        '{"type": "mm_ext.video.append", "image": "AAAA"}',
        '{"type": "response.cancel", "event_id": "mine"}',
        *(b"\x00\xff", b"{}", b""),
    ]
    async with live_front() as (url, _, _), raw(url) as socket:
        assert json.loads(await socket.recv())["type"] == "session.created"
        for message in messages:
            await socket.send(message)
            answer = json.loads(await asyncio.wait_for(socket.recv(), 20))
            assert answer["type"] == "error", (message[:80], answer)
            assert answer["error"]["code"], answer
            assert answer["error"]["message"], answer
        await socket.send(json.dumps({"type": "session.update", "session": NO_TURNS}))
        assert json.loads(await socket.recv())["type"] == "session.updated"


async def test_frames_that_are_no_websocket_close_the_socket_and_leave_no_session() -> None:
    chosen = random.Random(0)
    async with live_front() as (url, engine, sessions):
        for _ in range(60):
            async with raw(url) as socket:
                await socket.recv()
                socket.transport.write(chosen.randbytes(chosen.randrange(1, 400)))
                socket.transport.close()
        await released(sessions, engine)
        async with connect(url) as connection:
            assert await ask(connection, "still here") == "still here"


async def test_one_session_too_many_is_told_so_and_the_others_go_on() -> None:
    async with live_front(max_sessions=1) as (url, engine, sessions):
        async with connect(url) as first:
            await told(first, "session.created")
            async with connect(url) as second:
                (error,) = await told(second, "error")
                assert error.error.code == "too_many_sessions"
                assert "mm_ext.live.max_sessions" in error.error.message
                with pytest.raises(ConnectionClosed) as closed:
                    await second.recv()
                assert close_code(closed.value) == 1013
            assert await ask(first, "one") == "one"
        await released(sessions, engine)
        async with connect(url) as third:
            assert await ask(third, "two") == "two"
        assert sessions.stats()["refused"] == 1


async def test_a_unit_that_waits_while_something_else_is_answered_is_still_counted(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async with live_front() as (url, engine, sessions), connect(url) as connection:
        await connection.session.update(session=NO_TURNS)
        await told(connection, "session.updated")
        (session,) = engine.sessions
        # The engine takes its time with the first unit, so the second one waits.
        monkeypatch.setattr(session, "append", lambda _: None)
        for _ in range(2):
            sound = base64.b64encode(bytes(2 * 24_000 * 6 // 5)).decode()
            await connection.input_audio_buffer.append(audio=sound)
        content = [{"type": "input_text", "text": "one"}]
        item = {"type": "message", "role": "user", "content": content}
        await connection.response.create(response={"conversation": "none", "input": [item]})
        await told(connection, "response.done")
        for _ in range(2):
            session.listener.appended(10, 1, None)
        assert sessions.stats()["units"] == 2


@pytest.mark.parametrize(
    ("error_type", "code"), [("server_error", 1011), ("invalid_request_error", 1008)]
)
async def test_a_session_whose_engine_or_model_is_gone_ends(error_type: str, code: int) -> None:
    async with live_front() as (url, engine, sessions), connect(url) as connection:
        await told(connection, "session.created")
        (session,) = engine.sessions
        session.listener.failed(None, error_type, "gone", "It is gone.")
        (error,) = await told(connection, "error")
        assert (error.error.type, error.error.code) == (error_type, "gone")
        with pytest.raises(ConnectionClosed) as closed:
            await connection.recv()
        assert close_code(closed.value) == code
        await released(sessions, engine)


# A close frame has room for a reason of 123 bytes.
@pytest.mark.parametrize("model", ["another", "f\xfcr " * 40])
async def test_an_unknown_model_is_told_so(model: str) -> None:
    async with live_front() as (url, engine, sessions):
        async with connect(url, model=model) as connection:
            (error,) = await told(connection, "error")
            assert error.error.code == "model_not_found"
            with pytest.raises(ConnectionClosed) as closed:
                await connection.recv()
            assert close_code(closed.value) == 1008
        await released(sessions, engine)


async def test_a_session_that_holds_too_much_ends_with_an_error_and_others_go_on() -> None:
    async with live_front(session_mb=1) as (url, engine, sessions), connect(url) as other:
        async with connect(url) as connection:
            await connection.session.update(session=NO_TURNS)
            sound = base64.b64encode(bytes(4 << 20)).decode()
            await connection.input_audio_buffer.append(audio=sound)
            error = (await told(connection, "error"))[-1]
            assert error.error.code == "session_too_large"
            assert "1 MiB" in error.error.message
            with pytest.raises(ConnectionClosed) as closed:
                await connection.recv()
            assert close_code(closed.value) == 1008
        assert await ask(other, "one") == "one"
        assert len(engine.sessions) == sessions.stats()["sessions"] == 1


async def test_sessions_that_are_dropped_without_a_close_leave_nothing() -> None:
    async with live_front(max_sessions=1000) as (url, engine, sessions):

        async def opened() -> Any:
            socket = await raw(url)
            await socket.recv()
            await socket.send(json.dumps({"type": "session.update", "session": NO_TURNS}))
            await socket.recv()
            await socket.send('{"type": "input_audio_buffer.append", "audio": "AAAAAAAA"}')
            await socket.send('{"type": "response.create"}')
            return socket

        async def dropped(count: int) -> None:
            for socket in await asyncio.gather(*(opened() for _ in range(count))):
                socket.transport.abort()
            await released(sessions, engine)

        await dropped(5)
        gc.collect()
        descriptors = len(os.listdir("/proc/self/fd"))
        tasks = len(asyncio.all_tasks())
        await dropped(200)
        while len(asyncio.all_tasks()) > tasks or len(os.listdir("/proc/self/fd")) > descriptors:
            await asyncio.sleep(0.01)


async def test_a_session_that_ended_is_freed_without_the_garbage_collector() -> None:
    async with live_front() as (url, engine, sessions):
        watched: list[weakref.ref[Any]] = []
        async with connect(url) as connection:
            await ask(connection, "one")
            (session,) = engine.sessions
            listener = session.listener
            watched = [weakref.ref(session), weakref.ref(listener)]
            del session, listener
            gc.collect()
            gc.disable()
        try:
            await released(sessions, engine)
            while any(watch() is not None for watch in watched):
                await asyncio.sleep(0.01)
        finally:
            gc.enable()


async def all_of(socket: Any) -> None:
    """Read until the connection closes."""
    while True:
        await socket.recv()


async def reads_no_more(url: str) -> Any:
    """A client that does not read what it is sent, which has no end."""
    slow = await raw(url)
    await slow.recv()
    content = [{"type": "input_text", "text": "endless"}]
    item = {"type": "message", "role": "user", "content": content}
    slow.transport.pause_reading()
    await slow.send(json.dumps({"type": "conversation.item.create", "item": item}))
    await slow.send('{"type": "response.create"}')
    return slow


async def test_a_client_that_does_not_read_ends_its_own_session_only_and_keeps_no_socket(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(connection_module, "_LAST_WORDS_S", 0.1)
    async with live_front() as (url, engine, sessions), connect(url) as other:
        await told(other, "session.created")
        descriptors = len(os.listdir("/proc/self/fd"))
        slow = await reads_no_more(url)
        while sessions.stats()["sessions"] > 1 or len(engine.sessions) > 1:
            await asyncio.sleep(0.01)
        assert await ask(other, "one") == "one"
        # The client's own end is open, and the server's is not.
        while len(os.listdir("/proc/self/fd")) > descriptors + 1:
            await asyncio.sleep(0.01)
        slow.transport.abort()


async def test_a_client_that_reads_again_learns_why_its_session_ended() -> None:
    async with live_front() as (url, engine, sessions):
        slow = await reads_no_more(url)
        while not engine.sessions:
            await asyncio.sleep(0.01)
        while engine.sessions:
            await asyncio.sleep(0.01)
        slow.transport.resume_reading()
        with pytest.raises(ConnectionClosed) as closed:
            await asyncio.wait_for(all_of(slow), 20)
        assert close_code(closed.value) == 1013
        await released(sessions, engine)


async def test_a_client_that_floods_does_not_keep_others_waiting() -> None:
    flood = 3000
    async with live_front() as (url, _, _), raw(url) as flooding, connect(url) as other:
        await flooding.recv()
        answered = 0

        async def send() -> None:
            for _ in range(flood):
                await flooding.send('{"type": "input_audio_buffer.clear"}')

        async def receive() -> None:
            nonlocal answered
            while answered < flood:
                await flooding.recv()
                answered += 1

        work = asyncio.gather(send(), receive())
        assert await ask(other, "one two") == "one two"
        assert answered < flood
        await work


async def test_many_texts_of_one_event_are_tokenized_away_from_the_event_loop() -> None:
    on_loop: list[str] = []

    class Watched(EchoEngine):
        def measure(self, message: Any) -> int:
            if threading.current_thread() is threading.main_thread():
                on_loop.extend(part.text for part in message.parts if hasattr(part, "text"))
            return super().measure(message)

    texts = ["word " * 300 + str(k) for k in range(20)]
    async with live_front(Watched()) as (url, _, _), connect(url) as connection:
        await connection.conversation.item.create(
            item={
                "type": "message",
                "role": "user",
                "content": [{"type": "input_text", "text": text} for text in texts],
            }
        )
        await told(connection, "conversation.item.done")
    assert not set(on_loop).intersection(texts)


async def test_a_fault_of_the_server_ends_the_session_with_an_error_and_others_go_on() -> None:
    class Faulty(EchoEngine):
        def measure(self, message: Any) -> int:
            if any("fault" in getattr(part, "text", "") for part in message.parts):
                raise RuntimeError("a fault of this test")
            return super().measure(message)

    async with live_front(Faulty()) as (url, engine, sessions), connect(url) as other:
        async with connect(url) as connection:
            item = {
                "type": "message",
                "role": "user",
                "content": [{"type": "input_text", "text": "fault"}],
            }
            await connection.conversation.item.create(item=item)
            await connection.response.create()
            error = (await told(connection, "error"))[-1]
            assert (error.error.type, error.error.code) == ("server_error", "internal_error")
            with pytest.raises(ConnectionClosed) as closed:
                await connection.recv()
            assert close_code(closed.value) == 1011
        assert await ask(other, "one") == "one"
        assert len(engine.sessions) == sessions.stats()["sessions"] == 1
