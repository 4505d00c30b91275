"""A client of one live session: sends sound, pictures and questions, and times the answers."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import json
import time
from collections.abc import AsyncIterator, Callable, Mapping
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlencode, urlsplit, urlunsplit

import aiohttp

RATE = 24_000
"""Samples per second of the sound that is sent, 16 bits each."""

# Until the server has said what is asked of it; answers may take as long as they take.
_REPLY_S = 120.0
_CONNECT_S = 60.0
_NORMAL_CLOSE = 1000


class LiveError(Exception):
    """The server refused or failed, or the connection is gone; the message is for the user."""


class LiveRefusedError(LiveError):
    """The server refused a request; the session goes on."""


@dataclass
class LiveAnswer:
    """One response of the server. Times are those of ``time.perf_counter``.

    Attributes:
        response_id: As the server names it.
        asked: When this client sent ``response.create``; None where the server began by itself.
        first: When the first text came; None before.
        ended: When the response was done; None before.
        text: What was written.
        status: ``in_progress``, ``completed``, ``cancelled``, ``incomplete`` or ``failed``.
        reason: Why it was cut short; empty where it was not.
        usage: Its ``usage``; empty before the end.
    """

    response_id: str
    asked: float | None
    first: float | None = None
    ended: float | None = None
    text: str = ""
    status: str = "in_progress"
    reason: str = ""
    usage: Mapping[str, Any] = field(default_factory=dict)

    @property
    def first_token_s(self) -> float | None:
        """Seconds from asking to the first text; None without either."""
        if self.first is None or self.asked is None:
            return None
        return self.first - self.asked

    @property
    def prompt_tokens(self) -> int:
        """Tokens of the prompt, 0 where the server did not say."""
        return int(self.usage.get("input_tokens") or 0)

    @property
    def cached_tokens(self) -> int:
        """Of these, those found in KV."""
        return int((self.usage.get("input_token_details") or {}).get("cached_tokens") or 0)

    @property
    def output_tokens(self) -> int:
        """Tokens written, 0 where the server did not say."""
        return int(self.usage.get("output_tokens") or 0)


class LiveSession:
    """An open session; made by ``live_session``.

    Attributes:
        session: The ``session`` object that the server sent last.
        answers: Responses, in the order in which they began.
        items: Ids of the conversation's items, in the order in which they were added.
        errors: ``error`` objects that belong to no request of this client.
    """

    def __init__(
        self, socket: aiohttp.ClientWebSocketResponse, listener: Listener | None = None
    ) -> None:
        self.session: Mapping[str, Any] = {}
        self.answers: list[LiveAnswer] = []
        self.items: list[str] = []
        self.errors: list[Mapping[str, Any]] = []
        self._socket = socket
        self._listener = listener
        self._numbers = 0
        self._asked: float | None = None
        # Futures of requests by the id of the event that was sent; the event's type that answers.
        self._waiting: dict[str, tuple[str, asyncio.Future[Mapping[str, Any]]]] = {}
        self._changed = asyncio.Condition()
        self._closed: str | None = None
        self._reader = asyncio.create_task(self._read())

    async def send(self, event_type: str, **fields: Any) -> str:
        """Send an event; its id.

        Raises:
            LiveError: The connection is gone.
        """
        self._numbers += 1
        event_id = f"client-{self._numbers}"
        await self.send_text(json.dumps({"event_id": event_id, "type": event_type, **fields}))
        return event_id

    async def send_text(self, text: str) -> None:
        """Send a message as it is.

        Raises:
            LiveError: The connection is gone.
        """
        if self._closed is not None:
            raise LiveError(self._closed)
        try:
            await self._socket.send_str(text)
        except (aiohttp.ClientError, ConnectionError) as error:
            raise LiveError(f"the connection is gone: {error}") from error

    async def request(self, answered_by: str, event_type: str, **fields: Any) -> Mapping[str, Any]:
        """Send an event and wait for the event that answers it.

        Raises:
            LiveRefusedError: The server answered with an error.
            LiveError: It did not answer in time, or the connection is gone.
        """
        future: asyncio.Future[Mapping[str, Any]] = asyncio.get_running_loop().create_future()
        # The id that `send` will give.
        event_id = f"client-{self._numbers + 1}"
        self._waiting[event_id] = (answered_by, future)
        try:
            await self.send(event_type, **fields)
            return await asyncio.wait_for(future, _REPLY_S)
        except TimeoutError:
            raise LiveError(f"no {answered_by} for {_REPLY_S:g} s after {event_type}") from None
        finally:
            self._waiting.pop(event_id, None)

    async def update(self, **fields: Any) -> None:
        """Change options of the session (``session.update``)."""
        await self.request(
            "session.updated", "session.update", session={"type": "realtime", **fields}
        )

    async def sound(self, pcm: bytes) -> None:
        """Append sound: PCM of 16 bits, mono, ``RATE``."""
        await self.send("input_audio_buffer.append", audio=base64.b64encode(pcm).decode())

    async def picture(self, image: bytes, time_s: float | None = None) -> None:
        """Append a camera frame: a JPEG, PNG or WebP file, and when it was taken."""
        data = base64.b64encode(image).decode()
        timed = {} if time_s is None else {"time_s": time_s}
        await self.send("mm_ext.video.append", image=data, **timed)

    async def commit(self) -> None:
        """End the user's turn (``input_audio_buffer.commit``)."""
        await self.request("input_audio_buffer.committed", "input_audio_buffer.commit")

    async def say(self, text: str) -> None:
        """Add a text of the user's to the conversation."""
        content = [{"type": "input_text", "text": text}]
        item = {"type": "message", "role": "user", "content": content}
        await self.request("conversation.item.done", "conversation.item.create", item=item)

    async def respond(self, **options: Any) -> LiveAnswer:
        """Ask for a response and wait for its end.

        Raises:
            LiveRefusedError: The server refused.
            LiveError: It did not answer in time, or the connection is gone.
        """
        known = len(self.answers)
        self._asked = time.perf_counter()
        fields = {"response": options} if options else {}
        try:
            await self.request("response.created", "response.create", **fields)
        except LiveError:
            # What the server begins by itself was not asked for here.
            self._asked = None
            raise
        answer = self.answers[known]
        await self.until(lambda: answer.ended is not None)
        return answer

    async def until(self, done: Callable[[], bool], timeout_s: float | None = None) -> bool:
        """Wait until something holds, tested after each event; whether it came to hold in time.

        Raises:
            LiveError: The connection is gone.
        """

        def over() -> bool:
            return done() or self._closed is not None

        async with self._changed:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._changed.wait_for(over), timeout_s)
        if done():
            return True
        if self._closed is not None:
            raise LiveError(self._closed)
        return False

    def silence_ms(self) -> int:
        """Milliseconds of silence that a turn's end, as the server tells it, includes."""
        sound = (self.session.get("audio") or {}).get("input") or {}
        return int((sound.get("turn_detection") or {}).get("silence_duration_ms") or 0)

    async def close(self) -> None:
        """Close the connection in the regular way."""
        await self._socket.close()
        await self._reader

    async def _read(self) -> None:
        async for message in self._socket:
            if message.type is aiohttp.WSMsgType.TEXT:
                self._take(json.loads(message.data), time.perf_counter())
            async with self._changed:
                self._changed.notify_all()
        code = self._socket.close_code
        self._closed = "the session is closed"
        if code != _NORMAL_CLOSE:
            told = self.errors[-1].get("message") if self.errors else None
            self._closed = f"the server closed the session with code {code}" + (
                f": {told}" if told else ""
            )
        for _, future in self._waiting.values():
            if not future.done():
                future.set_exception(LiveError(self._closed))
        async with self._changed:
            self._changed.notify_all()

    def _take(self, event: Mapping[str, Any], now: float) -> None:
        match event.get("type"):
            case "session.created" | "session.updated":
                self.session = event["session"]
            case "conversation.item.added":
                self.items.append(event["item"]["id"])
            case "conversation.item.deleted":
                with contextlib.suppress(ValueError):
                    self.items.remove(event["item_id"])
            case "response.created":
                response_id = event["response"]["id"]
                self.answers.append(LiveAnswer(response_id, self._asked))
                self._asked = None
            case "response.output_text.delta":
                answer = self.answer(event["response_id"])
                answer.first = answer.first or now
                answer.text += event["delta"]
            case "response.done":
                response = event["response"]
                answer = self.answer(response["id"])
                answer.ended, answer.status = now, response["status"]
                answer.reason = _reason(response.get("status_details") or {})
                answer.usage = response.get("usage") or {}
            case "error":
                error = event["error"]
                _, future = self._waiting.get(error.get("event_id") or "", (None, None))
                if future is None or future.done():
                    self.errors.append(error)
                else:
                    future.set_exception(LiveRefusedError(_told(error)))
        for answered_by, future in self._waiting.values():
            if answered_by == event.get("type") and not future.done():
                future.set_result(event)
                break
        if self._listener is not None:
            self._listener(self, event, now)

    def answer(self, response_id: str) -> LiveAnswer:
        """The response of an id."""
        return next(one for one in reversed(self.answers) if one.response_id == response_id)


Listener = Callable[[LiveSession, Mapping[str, Any], float], None]
"""Told of each event of the server once the session has taken it, and of when it came."""


@contextlib.asynccontextmanager
async def live_session(
    url: str,
    model: str | None,
    api_key: str = "none",
    listener: Listener | None = None,
) -> AsyncIterator[LiveSession]:
    """A session with a server, closed when the block ends.

    Args:
        url: Base URL of the server, with or without ``/v1``.
        model: The model's name there; None: the server's own.
        api_key: Sent as a bearer token.
        listener: Told of each event.

    Raises:
        LiveError: The server does not answer, or does not take the session.
    """
    async with aiohttp.ClientSession() as client:
        address = socket_url(url, model)
        headers = {"Authorization": f"Bearer {api_key}"}
        try:
            socket = await asyncio.wait_for(
                client.ws_connect(address, headers=headers, max_msg_size=0), _CONNECT_S
            )
        except aiohttp.WSServerHandshakeError as error:
            raise LiveError(f"{address} answered {error.status} instead of a session") from error
        except (aiohttp.ClientError, TimeoutError, OSError) as error:
            raise LiveError(f"no answer from {address}: {error or 'timeout'}") from error
        session = LiveSession(socket, listener)
        try:
            if not await session.until(lambda: bool(session.session), _REPLY_S):
                raise LiveError(f"{address} began no session within {_REPLY_S:g} s")
            yield session
        finally:
            await session.close()


def socket_url(url: str, model: str | None) -> str:
    """The address of a server's live sessions.

    Args:
        url: Base URL, with or without ``/v1``.
        model: Name of the model; None: the server's own.
    """
    parts = urlsplit(url)
    scheme = {"http": "ws", "https": "wss"}.get(parts.scheme, parts.scheme)
    # Also where vLLM has a route of its own at /v1/realtime.
    path = f"{parts.path.rstrip('/').removesuffix('/v1')}/mm_ext/realtime"
    query = urlencode({"model": model}) if model else ""
    return urlunsplit((scheme, parts.netloc, path, query, ""))


def _reason(details: Mapping[str, Any]) -> str:
    error = details.get("error") or {}
    return str(error.get("message") or details.get("reason") or "")


def _told(error: Mapping[str, Any]) -> str:
    param = f" ({error['param']})" if error.get("param") else ""
    return f"{error.get('message')}{param}"
