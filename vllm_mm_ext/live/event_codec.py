"""Reads client events from the socket's messages, and writes server events."""

from __future__ import annotations

import json
import uuid
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from typing import Any, NoReturn, cast

import pybase64

from vllm_mm_ext.errors import MediaError
from vllm_mm_ext.live.client_events import (
    AudioAppend,
    AudioClear,
    AudioCommit,
    AudioContent,
    ClientEvent,
    Content,
    ImageContent,
    ItemCreate,
    ItemDelete,
    ItemReference,
    ItemRetrieve,
    ItemTruncate,
    NewItem,
    ResponseCancel,
    ResponseCreate,
    ResponseRequest,
    Role,
    SessionUpdate,
    TextContent,
    VideoAppend,
)
from vllm_mm_ext.live.event_fields import EventFields, wrong_type, wrong_value
from vllm_mm_ext.live.session_options import (
    read_max_output_tokens,
    read_temperature,
    refuse_unsupported,
)
from vllm_mm_ext.live.wire_error import WireError
from vllm_mm_ext.media.fetch.data_url import is_data_url, split_data_url

LONGEST_ID = 128
LONGEST_EVENT_ID = 512
# The protocol's limits of response metadata.
_METADATA_PAIRS, _METADATA_KEY, _METADATA_VALUE = 16, 64, 512
# Of the contents of an event's items, a reference to an item counted as one: each takes a little of
# the event loop's time, and a message of the socket has room for half a million.
_MOST_CONTENTS = 1024
# More tokens than any context has; the session checks against its own.
_MOST_TOKENS = 1 << 24
# Which contents a message of each role can have.
_CONTENTS: dict[str, tuple[str, ...]] = {
    "system": ("input_text",),
    "user": ("input_text", "input_audio", "input_image"),
    "assistant": ("output_text",),
}


def read_event(message: str | bytes) -> ClientEvent:
    """Read one message of the socket.

    Args:
        message: JSON; the bytes of a binary message are taken as UTF-8.

    Raises:
        WireError: The message is no event of the protocol, or has a field that is unknown,
            missing, unsupported here or of the wrong type or value.
    """
    fields = EventFields(_json(message))
    event_id = None
    try:
        event_id = fields.text("event_id", longest=LONGEST_EVENT_ID)
        kind = fields.required("type", fields.text("type"))
        if kind == "output_audio_buffer.clear":
            raise WireError(
                f"'{kind}' is not supported here: only text is written. Send 'response.cancel' to "
                "stop a response.",
                code="unsupported_event",
                param="type",
            )
        if (read := _READERS.get(kind)) is None:
            raise wrong_value("type", kind, _READERS)
        event = read(fields, event_id)
        fields.end()
    except WireError as error:
        error.event_id = event_id
        raise
    return event


def write_event(event: Mapping[str, Any]) -> str:
    """Write a server event, with an ``event_id`` of its own."""
    named = {"type": event["type"], "event_id": f"event_{uuid.uuid4().hex[:24]}", **event}
    return json.dumps(named, ensure_ascii=False, separators=(",", ":"))


def _json(message: str | bytes) -> Any:
    try:
        text = message if isinstance(message, str) else message.decode()
        value = json.loads(text, parse_constant=_no_constant)
        if "\\u" in text:
            # Halves of a surrogate pair can be escaped but not written again, nor tokenized.
            json.dumps(value, ensure_ascii=False).encode()
    # UnicodeError and JSONDecodeError are ValueErrors, as is an integer with too many digits.
    except (ValueError, RecursionError) as error:
        reason = str(error)[:200] if isinstance(error, json.JSONDecodeError) else "no valid text"
        if isinstance(error, RecursionError):
            reason = "nested too deeply"
        raise WireError(
            f"The message is not JSON ({reason}). An event is one JSON object in UTF-8; audio "
            "and images stand in it in base64.",
            code="invalid_json",
        ) from None
    return value


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no JSON")


def _session_update(fields: EventFields, event_id: str | None) -> SessionUpdate:
    session = fields.required("session", fields.take("session"))
    if not isinstance(session, Mapping):
        raise wrong_type("session", "an object", session)
    return SessionUpdate(event_id, session)


def _audio_append(fields: EventFields, event_id: str | None) -> AudioAppend:
    return AudioAppend(event_id, _required_bytes(fields, "audio"))


def _video_append(fields: EventFields, event_id: str | None) -> VideoAppend:
    image = _required_bytes(fields, "image")
    # Seconds since 1970 fit; beyond 2**40 floats no longer tell milliseconds apart.
    return VideoAppend(event_id, image, fields.number("time_s", 0.0, float(1 << 40)))


def _item_create(fields: EventFields, event_id: str | None) -> ItemCreate:
    previous = fields.text("previous_item_id", longest=LONGEST_ID)
    item = fields.required("item", fields.object("item"))
    return ItemCreate(event_id, previous, _new_item(item))


def _item_retrieve(fields: EventFields, event_id: str | None) -> ItemRetrieve:
    return ItemRetrieve(event_id, _item_id(fields))


def _item_delete(fields: EventFields, event_id: str | None) -> ItemDelete:
    return ItemDelete(event_id, _item_id(fields))


def _item_truncate(fields: EventFields, event_id: str | None) -> ItemTruncate:
    text_end = None
    if (extension := fields.object("mm_ext")) is not None:
        text_end = extension.integer("text_end", 0, 1 << 31)
        extension.end()
    # An answer has one content.
    fields.required("content_index", fields.integer("content_index", 0, 0))
    return ItemTruncate(
        event_id,
        _item_id(fields),
        fields.required("audio_end_ms", fields.integer("audio_end_ms", 0, 1 << 31)),
        text_end,
    )


def _response_create(fields: EventFields, event_id: str | None) -> ResponseCreate:
    response = fields.object("response")
    request = ResponseRequest() if response is None else _response_request(response)
    return ResponseCreate(event_id, request)


def _response_cancel(fields: EventFields, event_id: str | None) -> ResponseCancel:
    return ResponseCancel(event_id, fields.text("response_id", longest=LONGEST_ID))


_READERS: dict[str, Callable[[EventFields, str | None], ClientEvent]] = {
    "session.update": _session_update,
    "input_audio_buffer.append": _audio_append,
    "input_audio_buffer.commit": lambda _, event_id: AudioCommit(event_id),
    "input_audio_buffer.clear": lambda _, event_id: AudioClear(event_id),
    "conversation.item.create": _item_create,
    "conversation.item.retrieve": _item_retrieve,
    "conversation.item.delete": _item_delete,
    "conversation.item.truncate": _item_truncate,
    "response.create": _response_create,
    "response.cancel": _response_cancel,
    "mm_ext.video.append": _video_append,
}


def _response_request(fields: EventFields) -> ResponseRequest:
    refuse_unsupported(fields)
    fields.unsupported("audio", "Only text is written here.")
    conversation = fields.text("conversation", choices=("auto", "none"))
    given = fields.array("input")
    request = ResponseRequest(
        in_conversation=conversation != "none",
        input=None if given is None else _input(given, fields.name("input")),
        instructions=fields.text("instructions"),
        max_output_tokens=read_max_output_tokens(fields, _MOST_TOKENS),
        temperature=read_temperature(fields),
        metadata=_metadata(fields),
    )
    fields.end()
    return request


def _metadata(fields: EventFields) -> dict[str, str] | None:
    name = fields.name("metadata")
    given = fields.take("metadata")
    if given is None:
        return None
    if not isinstance(given, Mapping):
        raise wrong_type(name, "an object", given)
    for key, value in given.items():
        if not isinstance(value, str):
            raise wrong_type(f"{name}.{key[:_METADATA_KEY]}", "a string", value)
        if len(key) > _METADATA_KEY or len(value) > _METADATA_VALUE:
            raise WireError(
                f"Keys of '{name}' have at most {_METADATA_KEY} characters, values "
                f"{_METADATA_VALUE}.",
                code="string_above_max_length",
                param=name,
            )
    if len(given) > _METADATA_PAIRS:
        raise WireError(
            f"'{name}' has {len(given)} pairs; at most {_METADATA_PAIRS} are taken.", param=name
        )
    return dict(given)


def _input(given: Sequence[Any], name: str) -> tuple[NewItem | ItemReference, ...]:
    _check_count(len(given), name)
    items = tuple(_input_item(EventFields(x, f"{name}[{i}]")) for i, x in enumerate(given))
    _check_count(sum(len(x.content) if isinstance(x, NewItem) else 1 for x in items), name)
    return items


def _check_count(count: int, name: str) -> None:
    if count > _MOST_CONTENTS:
        raise WireError(
            f"'{name}' has {count} contents; at most {_MOST_CONTENTS} are taken.",
            code="array_above_max_length",
            param=name,
        )


def _input_item(fields: EventFields) -> NewItem | ItemReference:
    if fields.peek("type") != "item_reference":
        return _new_item(fields)
    fields.take("type")
    reference = fields.required("id", fields.text("id", longest=LONGEST_ID))
    fields.end()
    return ItemReference(reference)


def _new_item(fields: EventFields) -> NewItem:
    kind = fields.required("type", fields.text("type"))
    if kind != "message":
        raise WireError(
            f"Items of type '{kind[:100]}' are not supported here; only 'message' is.",
            code="unsupported_parameter",
            param=fields.name("type"),
        )
    item_id = fields.text("id", longest=LONGEST_ID)
    fields.text("object", choices=("realtime.item",))
    # The protocol's status of a new item has no effect.
    fields.text("status", choices=("completed", "incomplete", "in_progress"))
    role = cast("Role", fields.required("role", fields.text("role", choices=tuple(_CONTENTS))))
    contents = fields.required("content", fields.array("content"))
    name = fields.name("content")
    if not contents:
        raise WireError(f"'{name}' is empty.", param=name)
    _check_count(len(contents), name)
    item = NewItem(
        item_id,
        role,
        tuple(_content(EventFields(x, f"{name}[{i}]"), role) for i, x in enumerate(contents)),
    )
    fields.end()
    return item


def _content(fields: EventFields, role: Role) -> Content:
    kind = fields.required("type", fields.text("type", choices=_CONTENTS[role]))
    content: Content
    if kind == "input_audio":
        transcript = fields.text("transcript")
        content = AudioContent(_required_bytes(fields, "audio"), transcript)
    elif kind == "input_image":
        # The model's own size rule decides; "auto" and "high" ask for no other.
        fields.text("detail", choices=("auto", "high"))
        content = ImageContent(_image(fields))
    else:
        content = TextContent(fields.required("text", fields.text("text")))
    fields.end()
    return content


def _image(fields: EventFields) -> bytes:
    name = fields.name("image_url")
    url = fields.required("image_url", fields.text("image_url"))
    with suppress(MediaError):
        if is_data_url(url) and (found := split_data_url(url)).media_type.startswith("image/"):
            return _base64(url[found.start :], name)
    raise WireError(
        f"'{name}' must be a data URL of an image in base64 (data:image/jpeg;base64,...).",
        param=name,
    )


def _required_bytes(fields: EventFields, field: str) -> bytes:
    return _base64(fields.required(field, fields.text(field)), fields.name(field))


def _base64(text: str, name: str) -> bytes:
    try:
        return pybase64.b64decode(text, validate=True)
    except ValueError:
        raise WireError(f"'{name}' is not base64.", param=name) from None


def _item_id(fields: EventFields) -> str:
    return fields.required("item_id", fields.text("item_id", longest=LONGEST_ID))
