"""One live session: its socket, and the way of its events through the session's parts."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Collection, Iterable, Mapping
from contextlib import suppress
from functools import partial
from typing import Any, Literal

from vllm_mm_ext.adapters.live.engine import EngineSession
from vllm_mm_ext.adapters.live.outbox import Outbox, SlowReaderError
from vllm_mm_ext.adapters.live.punctuality import AppendClock
from vllm_mm_ext.adapters.live.senses import Senses
from vllm_mm_ext.live.client_events import (
    AudioAppend,
    AudioClear,
    AudioCommit,
    ClientEvent,
    SessionUpdate,
    VideoAppend,
    media_contents,
    texts,
)
from vllm_mm_ext.live.effects import Abort, Append, Close, Effect, Respond, Send, TurnEnd, Usage
from vllm_mm_ext.live.event_codec import read_event, write_event
from vllm_mm_ext.live.machine import SessionMachine
from vllm_mm_ext.live.server_events import error_event
from vllm_mm_ext.live.text_counts import TextCounts
from vllm_mm_ext.live.wire_error import WireError

logger = logging.getLogger("vllm.mm_ext")

# Close codes of RFC 6455 and of its registry.
NORMAL = 1000
POLICY = 1008
OUR_FAULT = 1011
TRY_LATER = 1013

# Characters of a message from which on it is read in a thread; reading fewer takes under 1 ms.
_LONG_MESSAGE = 1 << 18
# Characters of an event's texts from which on they are tokenized in a thread; each text counts for
# some more. Fewer take about a millisecond.
_LONG_TEXTS = 1 << 12
_EACH_TEXT = 1 << 7
# Seconds for the last events to reach the client of a session that ends.
_LAST_WORDS_S = 5.0


class Connection:
    """A client's socket and its session, from ``session.created`` to the close.

    The machine, the codec and the queue are used on the event loop alone, so nothing is locked. A
    message is dealt with before the next one is read: a client that floods is slowed by TCP.

    Args:
        websocket: Starlette's, accepted.
        machine: The state of the session.
        senses: Hear and see for the session.
        clock: Follows the session's appends.
        counts: Tokens of texts, as the machine measures them.
    """

    def __init__(
        self,
        websocket: Any,
        machine: SessionMachine,
        senses: Senses,
        clock: AppendClock,
        counts: TextCounts,
    ) -> None:
        self._counts = counts
        self._websocket = websocket
        self._machine = machine
        self._senses = senses
        self._clock = clock
        self._outbox = Outbox()
        self._loop = asyncio.get_running_loop()
        self._began = self._loop.time()
        self._timer: asyncio.TimerHandle | None = None
        self._engine: EngineSession | None = None
        self._reader: asyncio.Task[None] | None = None

    async def run(self, engine: EngineSession) -> None:
        """Serve the session until the client goes, a limit is met, or something fails.

        Args:
            engine: The engine's side of the session, which tells this object what it does.
        """
        self._engine = engine
        writer = asyncio.create_task(self._write())
        self._reader = reader = asyncio.create_task(self._read())
        try:
            self._step(self._machine.start)
            # Whatever ends the session ends the reader.
            await asyncio.wait((reader,))
        finally:
            reader.cancel()
            await self._end(writer)

    # What the operator asks.

    def facts(self) -> dict[str, Any]:
        """What the operator's page shows of the session."""
        return {
            "seconds": round(self._loop.time() - self._began, 1),
            "model": self._machine.options.model,
            "files": self._senses.files_seen,
        }

    def holds(self, digests: Collection[str]) -> bool:
        """Whether the client sent one of these files."""
        return self._senses.has_seen(digests)

    @property
    def files(self) -> frozenset[bytes]:
        """The first halves of the digests of the files that the client sent."""
        return self._senses.files

    def end(self, reason: str) -> None:
        """End the session, which the client is told."""
        self._send_error("invalid_request_error", "session_ended", reason)
        self._close(Close(POLICY, reason))

    # What the engine tells: the machine's methods without the time.

    def wrote(self, response_id: str, token_ids: tuple[int, ...], text: str, usage: Usage) -> None:
        """As ``SessionMachine.wrote``."""
        self._step(lambda now: self._machine.wrote(response_id, token_ids, text, usage, now))

    def ended(self, response_id: str, reason: Literal["stop", "length"], usage: Usage) -> None:
        """As ``SessionMachine.ended``."""
        self._step(lambda now: self._machine.ended(response_id, reason, usage, now))

    def failed(self, response_id: str | None, error_type: str, code: str, message: str) -> None:
        """As ``SessionMachine.failed``; without a response, the session ends."""
        if response_id is None:
            self._send_error(error_type, code, message)
            self._close(Close(OUR_FAULT if error_type == "server_error" else POLICY, message))
            return
        self._step(lambda now: self._machine.failed(response_id, error_type, code, message, now))

    def appended(self, tokens: int | None, computed: int, turn_end: TurnEnd | None) -> None:
        """As ``SessionMachine.appended``; a prompt that was refused has no tokens."""
        self._clock.ended(self._loop.time(), 0 if tokens is None else computed)
        self._step(lambda now: self._machine.appended(turn_end, now))

    # Reading

    async def _read(self) -> None:
        # No variable holds a message, of up to 16 MiB, while the next one is waited for.
        while await self._take(await self._websocket.receive()):
            # A message that is there already does not suspend this task; others want their turn.
            await asyncio.sleep(0)

    async def _take(self, message: Mapping[str, Any]) -> bool:
        """Deal with one message of the socket's; False: the client has gone."""
        if message["type"] == "websocket.disconnect":
            return False
        text = message.get("text")
        data: str | bytes = message["bytes"] if text is None else text
        event_id = None
        try:
            if len(data) < _LONG_MESSAGE:
                event = read_event(data)
            else:
                event = await self._senses.lane.run(read_event, data)
            event_id = event.event_id
            await self._handle(event)
        except WireError as error:
            error.event_id = error.event_id or event_id
            self._step(partial(self._machine.refused, error))
        except Exception:
            self._fail()
        return True

    async def _handle(self, event: ClientEvent) -> None:
        """Decode the media of an event, then let the machine handle it."""
        machine, senses = self._machine, self._senses
        machine.admit(event)
        if isinstance(event, AudioAppend):
            async for heard in senses.hear(event.audio):
                self._step(partial(machine.heard, heard))
        elif isinstance(event, VideoAppend):
            sight = await senses.see(event)
            self._step(partial(machine.seen, sight))
        else:
            if isinstance(event, AudioCommit):
                rest = await senses.flush()
                self._step(partial(machine.heard, rest))
            elif isinstance(event, AudioClear):
                senses.clear()
            said = [(role, text) for _, role, text in texts(event)]
            try:
                if sum(len(text) + _EACH_TEXT for _, text in said) > _LONG_TEXTS:
                    await senses.lane.run(self._counts.count, said)
                media = await senses.read(media_contents(event))
                self._step(lambda now: machine.handle(event, now, media))
            finally:
                self._counts.forget()
            if isinstance(event, SessionUpdate):
                senses.follow(machine.options)

    # Acting

    def _step(self, advance: Callable[[float], Iterable[Effect]]) -> None:
        """Let the machine go on, and carry out what it wants done."""
        if self._outbox.closed:
            return
        try:
            for effect in advance(self._loop.time()):
                self._carry_out(effect)
            self._arm()
        except SlowReaderError:
            self._outbox.drop()
            self._close(Close(TRY_LATER, "The client does not read what it is sent."))
        except Exception:
            self._fail()

    def _carry_out(self, effect: Effect) -> None:
        assert self._engine is not None
        match effect:
            case Send(event):
                self._outbox.put(write_event(event))
            case Append():
                self._clock.asked(self._loop.time())
                self._engine.append(effect)
            case Respond():
                if effect.in_conversation:
                    self._clock.overtaken()
                self._engine.respond(effect)
            case Abort(response_id):
                self._engine.abort(response_id)
            case Close():
                self._close(effect)

    def _arm(self) -> None:
        """Set the timer to the machine's deadline."""
        deadline = self._machine.deadline()
        if self._timer is not None:
            if self._timer.when() == deadline:
                return
            self._timer.cancel()
        self._timer = None if deadline is None else self._loop.call_at(deadline, self._tick)

    def _tick(self) -> None:
        self._timer = None
        self._step(self._machine.tick)

    # Ending

    def _fail(self) -> None:
        """End the session because of an error of the plugin's, which is being handled."""
        logger.exception("A live session failed by a fault of the plugin")
        self._send_error("server_error", "internal_error", "The server failed.")
        self._close(Close(OUR_FAULT, "The server failed."))

    def _send_error(self, error_type: str, code: str, message: str) -> None:
        with suppress(SlowReaderError):
            event = error_event(message, error_type=error_type, code=code)
            self._outbox.put(write_event(event))

    def _close(self, close: Close) -> None:
        self._outbox.close(close)
        if self._reader is not None:
            self._reader.cancel()

    async def _write(self) -> None:
        try:
            close = await self._outbox.send_all(self._websocket.send_text)
            await close_socket(self._websocket, close)
        except Exception:
            # The client has gone, which the reader may learn later.
            if self._reader is not None:
                self._reader.cancel()

    async def _end(self, writer: asyncio.Task[None]) -> None:
        """Let go of everything, with some time for the client to get what waits for it."""
        if self._timer is not None:
            self._timer.cancel()
        self._outbox.close(Close(NORMAL, ""))
        # What the session holds goes now; the engine may take its time.
        self._machine.closed()
        engine, self._engine, self._reader = self._engine, None, None
        assert engine is not None
        try:
            for failure in await asyncio.gather(
                engine.close(),
                self._senses.close(),
                asyncio.wait((writer,), timeout=_LAST_WORDS_S),
                return_exceptions=True,
            ):
                if isinstance(failure, BaseException):
                    logger.error("A live session did not end well", exc_info=failure)
        finally:
            if not writer.done():
                writer.cancel()
                _abort_socket(self._websocket)


def _abort_socket(websocket: Any) -> None:
    """Cut a connection whose client does not read: uvicorn would keep it until all is read.

    Args:
        websocket: Starlette's, accepted.
    """
    server = getattr(websocket.app.state, "server", None)
    for protocol in () if server is None else tuple(server.server_state.connections):
        if getattr(protocol, "scope", None) is websocket.scope:
            protocol.transport.abort()


async def close_socket(websocket: Any, close: Close) -> None:
    """Close a socket; of the reason, the client gets what a close frame has room for: 123 bytes.

    Args:
        websocket: Starlette's, accepted.
        close: Code and reason.
    """
    await websocket.close(close.code, close.reason.encode()[:123].decode(errors="ignore"))
