"""Messages that a careless or hostile client of a live session might send."""

from __future__ import annotations

import base64
import json
import random
from collections.abc import Callable, Iterator
from typing import Any

from vllm_mm_ext.tools.bench.live_feed import made_feed

_FEED = made_feed(2.0, 2.0, 77)
_SOUND = base64.b64encode(_FEED.sound[:9601]).decode()
_PICTURES = [base64.b64encode(image).decode() for _, image in _FEED.pictures]

Message = tuple[str | bytes, bool]
"""What is sent, and whether it is a valid event (that may still come at a wrong time)."""


def messages(rng: random.Random, count: int) -> Iterator[Message]:
    """So many messages: valid events in random order, and broken ones among them."""
    for _ in range(count):
        kind = rng.choice(_VALID)(rng)
        if rng.random() < 0.5:
            yield json.dumps(kind), True
        else:
            yield rng.choice(_BROKEN)(rng, kind), False


def _event(event_type: str, **fields: Any) -> Callable[[random.Random], dict[str, Any]]:
    return lambda _: {"type": event_type, **fields}


def _item(rng: random.Random) -> dict[str, Any]:
    content = [{"type": "input_text", "text": rng.choice(["what", "", "x" * 500, "\u0000\ud7ff"])}]
    role = rng.choice(["user", "system"])
    return {
        "type": "conversation.item.create",
        "item": {"type": "message", "role": role, "content": content},
    }


def _update(rng: random.Random) -> dict[str, Any]:
    detection = rng.choice([None, {"type": "server_vad", "threshold": rng.random()}])
    kind = rng.choice([{"type": "audio/pcm", "rate": 24000}, {"type": "audio/pcmu"}])
    sound = {"format": kind, "turn_detection": detection}
    session = {"type": "realtime", "max_output_tokens": 4, "audio": {"input": sound}}
    return {"type": "session.update", "session": session}


_VALID: tuple[Callable[[random.Random], dict[str, Any]], ...] = (
    _event("input_audio_buffer.append", audio=_SOUND),
    _event("input_audio_buffer.append", audio=_SOUND),
    lambda rng: {"type": "mm_ext.video.append", "image": rng.choice(_PICTURES)},
    _event("input_audio_buffer.commit"),
    _event("input_audio_buffer.clear"),
    _event("response.create"),
    _event("response.cancel"),
    _item,
    _update,
    lambda rng: {"type": "conversation.item.delete", "item_id": f"item_{rng.randrange(9)}"},
    lambda rng: {"type": "conversation.item.retrieve", "item_id": f"item_{rng.randrange(9)}"},
)


def _changed(rng: random.Random, event: dict[str, Any]) -> str:
    """A field with a value of another kind, or one that does not exist."""
    name = rng.choice([*event, "surprise"])
    wrong: Any = rng.choice([None, 7, -1.5, True, [], {}, [[[]]], {"type": {}}, 1 << 70, "\ud800"])
    # The same value by chance, or an id, which may be any text.
    if event.get(name) == wrong or name == "item_id":
        name = "surprise"
    return json.dumps({**event, name: wrong})


_BROKEN: tuple[Callable[[random.Random, dict[str, Any]], str | bytes], ...] = (
    _changed,
    _changed,
    _changed,
    lambda rng, event: json.dumps(event)[: rng.randrange(1, 12)],
    lambda rng, _: rng.randbytes(rng.randrange(1, 200)),
    lambda _, event: json.dumps(event).encode() + b"\xff",
    lambda rng, _: json.dumps(rng.choice([[], "x", 3, None, {"type": "no.such.event"}, {}])),
    lambda _, __: "[" * 5000,
    lambda _, __: '{"type": "response.create", "response": ' + '{"a":' * 500 + "1" + "}" * 501,
    lambda rng, _: json.dumps(
        {"type": "mm_ext.video.append", "image": base64.b64encode(rng.randbytes(300)).decode()}
    ),
    lambda rng, _: json.dumps(
        {"type": "mm_ext.video.append", "image": _PICTURES[0][: 4 * rng.randrange(1, 40)]}
    ),
    lambda _, __: json.dumps({"type": "input_audio_buffer.append", "audio": "no base64!"}),
    lambda _, __: '{"type": "mm_ext.video.append", "image": "", "time_s": NaN}',
)
