"""Drives a live session's machine without a socket or an engine, and checks what it does."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
from openai.types.realtime import RealtimeServerEvent
from PIL import Image
from pydantic import BaseModel, TypeAdapter

from vllm_mm_ext.live.client_events import AudioAppend, VideoAppend, media_contents
from vllm_mm_ext.live.effects import Abort, Append, Close, Effect, Respond, Send, Usage
from vllm_mm_ext.live.event_codec import read_event, write_event
from vllm_mm_ext.live.family import FamilyTraits
from vllm_mm_ext.live.listening import Heard, Piece, VoiceWindow
from vllm_mm_ext.live.machine import SessionMachine
from vllm_mm_ext.live.new_items import Media
from vllm_mm_ext.live.prompt import Generated, Message, Picture, Prompt, Stretch, Text
from vllm_mm_ext.live.session_options import SessionLimits
from vllm_mm_ext.live.watching import Sight
from vllm_mm_ext.live.wire_error import WireError
from vllm_mm_ext.media.types import SizeRule

RATE = 16_000
WINDOW = 512
USAGE = Usage(30, 20, 5, 10, 4)
FAMILY = FamilyTraits(
    hears=True,
    sees=True,
    images=True,
    audio_rate=RATE,
    unit_s=2.0,
    frame_multiple=1,
    fps=1.0,
    size_rule=SizeRule(),
    turn_end=True,
)
LIMITS = SessionLimits(
    prompt_tokens=2000,
    context_tokens=2400,
    answer_tokens=400,
    keep_frames=4,
    max_bytes=64 << 20,
    idle_timeout_s=300.0,
    max_session_s=7200.0,
    no_voice=None,
)
_OFFICIAL: TypeAdapter[Any] = TypeAdapter(RealtimeServerEvent)
# What the official API sends too, though the client's models do not have it, and this plugin's own.
_EXTRAS = {"object", "id", "expires_at", "mm_ext"}


def measure(message: Message) -> int:
    """Tokens of a message: 4 around it, 25 a second of sound, 10 a frame, 1 a word."""
    return 4 + sum(_part_tokens(part) for part in message.parts)


def _part_tokens(part: object) -> int:
    match part:
        case Text(text):
            return len(text.split())
        case Generated(token_ids, _):
            return len(token_ids)
        case Picture():
            return 10
        case Stretch():
            frames = sum(len(unit.frames) for unit in part.units)
            return 10 * frames + sum(len(unit.samples) for unit in part.units) * 25 // RATE
    raise AssertionError(part)


def official(event: Mapping[str, Any]) -> BaseModel:
    """A server event as the ``openai`` package's own model, with no field that it does not have.

    Raises:
        ValidationError: It is none.
    """
    written = json.loads(write_event(event))
    model: BaseModel = _OFFICIAL.validate_python(written)
    assert getattr(model, "type", None) == event["type"]
    _check_extras(model)
    return model


def _check_extras(model: BaseModel) -> None:
    assert set(model.model_extra or {}) <= _EXTRAS, (model, model.model_extra)
    for name in type(model).model_fields:
        value = getattr(model, name)
        for inner in value if isinstance(value, list) else [value]:
            if isinstance(inner, BaseModel):
                _check_extras(inner)


class ProtocolCheck:
    """Follows the server events of a session as a careful client would.

    Raises:
        AssertionError: An event is out of order, or names what is not there.
    """

    def __init__(self) -> None:
        self.items: list[str] = []
        self.ever: set[str] = set()
        self.statuses: dict[str, str] = {}
        self._steps: dict[str, list[str]] = {}
        self._texts: dict[str, str] = {}
        self._added: set[str] = set()

    @property
    def active(self) -> list[str]:
        """Responses that were created and are not done."""
        return [x for x in self._steps if x not in self.statuses]

    def take(self, event: Mapping[str, Any]) -> None:
        """The next event."""
        kind = event["type"]
        if kind.startswith("response."):
            self._take_response(kind, event)
        elif kind == "conversation.item.added":
            self._add(event)
        elif kind == "conversation.item.done":
            assert event["item"]["id"] in self._added
            assert event["previous_item_id"] == self._previous(event["item"]["id"])
            self._added.remove(event["item"]["id"])
        elif kind == "conversation.item.deleted":
            self.items.remove(event["item_id"])
        elif kind == "input_audio_buffer.committed":
            assert event["previous_item_id"] == (self.items[-1] if self.items else None)
            assert event["item_id"] not in self.ever

    def _add(self, event: Mapping[str, Any]) -> None:
        item_id, previous = event["item"]["id"], event["previous_item_id"]
        assert item_id not in self.ever
        self.ever.add(item_id)
        self._added.add(item_id)
        self.items.insert(0 if previous is None else self.items.index(previous) + 1, item_id)

    def _previous(self, item_id: str) -> str | None:
        index = self.items.index(item_id)
        return self.items[index - 1] if index else None

    def _take_response(self, kind: str, event: Mapping[str, Any]) -> None:
        response_id = event.get("response_id") or event["response"]["id"]
        steps = self._steps.setdefault(response_id, [])
        last = steps[-1] if steps else None
        assert (last, kind) in _ORDER, (steps, kind)
        steps.append(kind)
        if kind == "response.output_text.delta":
            self._texts[response_id] = self._texts.get(response_id, "") + event["delta"]
        if kind == "response.output_text.done":
            assert event["text"] == self._texts.get(response_id, "")
        if kind == "response.done":
            self.statuses[response_id] = event["response"]["status"]
            output = event["response"]["output"]
            assert len(output) == ("response.output_item.added" in steps)


_STEPS = (
    "response.created",
    "response.output_item.added",
    "response.content_part.added",
    "response.output_text.delta",
    "response.output_text.done",
    "response.content_part.done",
    "response.output_item.done",
    "response.done",
)
_ORDER = {
    (None, "response.created"),
    ("response.created", "response.done"),
    ("response.content_part.added", "response.output_text.done"),
    ("response.output_text.delta", "response.output_text.delta"),
    *pairwise(_STEPS),
}


class LiveDriver:
    """A session's machine with a client and an engine that do as they are told.

    Args:
        family: What the model takes.
        limits: What the session may use.
        strict: Whether every event is checked against the ``openai`` package's models.
    """

    def __init__(
        self,
        family: FamilyTraits = FAMILY,
        limits: SessionLimits = LIMITS,
        *,
        strict: bool = True,
    ) -> None:
        self.now = 100.0
        self.machine = SessionMachine("sess_1", "tiny", family, limits, measure, self.now, 1 << 31)
        self.protocol = ProtocolCheck()
        self.prompts: dict[str, Prompt] = {}
        self.effects: list[Effect] = []
        self.appends = 0
        self.closed = False
        self._strict = strict
        self._family = family
        self._heard = 0
        self._most_tokens = limits.prompt_tokens
        self.take(self.machine.start(self.now))

    def send(self, event: Mapping[str, Any]) -> list[dict[str, Any]]:
        """Send a client event as a connection would, with media decoded to something."""
        try:
            read = read_event(json.dumps(event))
            self.machine.admit(read)
        except WireError as error:
            return self.take(self.machine.refused(error, self.now))
        if isinstance(read, AudioAppend):
            return self.speak(len(read.audio) / 2 / 24_000, 0.0)
        if isinstance(read, VideoAppend):
            return self.show(read.image[0] if read.image else 0)
        media: list[Media] = [
            np.full(RATE // 2, -1.0, np.float32)
            if hasattr(content, "audio")
            else Picture(Image.new("RGB", (8, 8)), "digest")
            for _, content in media_contents(read)
        ]
        return self.take(self.machine.handle(read, self.now, media))

    def update(self, **session: Any) -> list[dict[str, Any]]:
        """Send ``session.update`` with these fields."""
        return self.send({"type": "session.update", "session": {"type": "realtime", **session}})

    def detect(self, detection: Mapping[str, Any] | None) -> list[dict[str, Any]]:
        """Choose how turns are detected."""
        return self.update(audio={"input": {"turn_detection": detection}})

    def say(self, text: str, **event: Any) -> list[dict[str, Any]]:
        """Add a text item of the user."""
        content = [{"type": "input_text", "text": text}]
        item = {"type": "message", "role": "user", "content": content}
        return self.send({"type": "conversation.item.create", "item": item, **event})

    def speak(self, seconds: float, probability: float) -> list[dict[str, Any]]:
        """Append sound whose samples are their own numbers; time goes on."""
        heard = Heard(tuple(self._pieces(round(seconds * RATE), probability)), self._heard)
        self.now += seconds
        return self.take(self.machine.heard(heard, self.now))

    def _pieces(self, samples: int, probability: float) -> Iterator[Piece]:
        end = self._heard + samples
        while self._heard < end:
            start = self._heard
            stop = min(end, (start // WINDOW + 1) * WINDOW)
            window = None
            if stop % WINDOW == 0:
                window = VoiceWindow(stop - WINDOW, stop, probability)
            # Whole numbers up to 2**24 are exact.
            yield Piece(start, np.arange(start, stop, dtype=np.float32), window)
            self._heard = stop

    def show(self, grey: int, *, after_s: float = 0.0) -> list[dict[str, Any]]:
        """Append a camera frame of one grey."""
        self.now += after_s
        pixels = np.full((16, 16, 3), grey, np.uint8)
        sight = Sight(pixels, np.full((32, 32), grey, np.uint8), None)
        return self.take(self.machine.seen(sight, self.now))

    def commit(self) -> list[dict[str, Any]]:
        """Send ``input_audio_buffer.commit``."""
        return self.send({"type": "input_audio_buffer.commit"})

    def respond(self, **response: Any) -> list[dict[str, Any]]:
        """Send ``response.create``."""
        return self.send({"type": "response.create", "response": response})

    def write(self, *texts: str, response_id: str | None = None) -> list[dict[str, Any]]:
        """Let the engine write pieces of the response under way, one token each."""
        name = response_id or self.protocol.active[-1]
        events = []
        for text in texts:
            events += self.take(self.machine.wrote(name, (len(text),), text, USAGE, self.now))
        return events

    def end(self, reason: Any = "stop") -> list[dict[str, Any]]:
        """Let the engine end the response under way."""
        name = self.protocol.active[-1]
        return self.take(self.machine.ended(name, reason, USAGE, self.now))

    def wait(self, seconds: float) -> list[dict[str, Any]]:
        """Let time pass, ticking whenever the machine asks for it."""
        until = self.now + seconds
        events = []
        while (deadline := self.machine.deadline()) is not None and deadline <= until:
            self.now = max(self.now, deadline)
            events += self.take(self.machine.tick(self.now))
        self.now = until
        return events

    def take(self, effects: Sequence[Effect]) -> list[dict[str, Any]]:
        """Carry out effects; return the events sent."""
        self.effects = list(effects)
        events = []
        for effect in effects:
            assert not self.closed
            match effect:
                case Send(event):
                    if self._strict and not event["type"].startswith("mm_ext."):
                        official(event)
                    self.protocol.take(event)
                    events.append(dict(event))
                case Respond(response_id, prompt):
                    assert not prompt.open
                    assert sum(map(measure, prompt.messages)) <= self._most_tokens
                    self.prompts[response_id] = prompt
                case Abort(response_id):
                    del self.prompts[response_id]
                case Append(prompt):
                    self.appends += 1
                    assert prompt.messages[-1].role == "user"
                    assert sum(map(measure, prompt.messages)) <= self._most_tokens
                case Close():
                    self.closed = True
        for response_id in self.protocol.statuses:
            self.prompts.pop(response_id, None)
        return events

    @property
    def appended(self) -> Prompt | None:
        """The prompt that the last call let the engine compute."""
        appends = [effect.prompt for effect in self.effects if isinstance(effect, Append)]
        return appends[-1] if appends else None


def kinds(events: Sequence[Mapping[str, Any]]) -> list[str]:
    """The types of events."""
    return [event["type"] for event in events]


def error_of(events: Sequence[Mapping[str, Any]]) -> Mapping[str, Any]:
    """The one error among events."""
    errors: list[Mapping[str, Any]] = [x["error"] for x in events if x["type"] == "error"]
    (error,) = errors
    return error


def stretches_of(prompt: Prompt) -> list[Stretch]:
    """What is heard and seen in a prompt, in order."""
    parts = [part for message in prompt.messages for part in message.parts]
    return [part for part in parts if isinstance(part, Stretch)]


def samples_of(prompt: Prompt) -> list[int]:
    """The numbers of all samples that the model is shown, in order."""
    units = [unit.samples for stretch in stretches_of(prompt) for unit in stretch.units]
    numbers: list[int] = np.concatenate([np.zeros(0, np.float32), *units]).astype(int).tolist()
    return numbers
