"""What a client of a live session asks for: the client events of the protocol, read and checked."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

Role = Literal["system", "user", "assistant"]


@dataclass(frozen=True, slots=True)
class SessionUpdate:
    """``session.update``: the fields of the session that change, checked one by one."""

    event_id: str | None
    session: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class AudioAppend:
    """``input_audio_buffer.append``: bytes in the session's input format, of any length."""

    event_id: str | None
    audio: bytes


@dataclass(frozen=True, slots=True)
class AudioCommit:
    """``input_audio_buffer.commit``."""

    event_id: str | None


@dataclass(frozen=True, slots=True)
class AudioClear:
    """``input_audio_buffer.clear``."""

    event_id: str | None


@dataclass(frozen=True, slots=True)
class VideoAppend:
    """``mm_ext.video.append``: one camera frame.

    Attributes:
        event_id: As the client names the event.
        image: The bytes of a JPEG, PNG or WebP file.
        time_s: When the frame was taken, in seconds on a clock of the client's that does not go
            back; None: when it arrives.
    """

    event_id: str | None
    image: bytes
    time_s: float | None


@dataclass(frozen=True, slots=True)
class TextContent:
    """A text part of a new item (``input_text``, ``output_text``, ``text``)."""

    text: str


@dataclass(frozen=True, slots=True)
class ImageContent:
    """An ``input_image`` part of a new item: the bytes of an image file from its data URL."""

    image: bytes


@dataclass(frozen=True, slots=True)
class AudioContent:
    """An ``input_audio`` part of a new item: bytes in the session's input format.

    Attributes:
        audio: As ``input_audio_buffer.append`` has them.
        transcript: What the client says was spoken; kept with the item, not shown to the model.
    """

    audio: bytes
    transcript: str | None


Content = TextContent | ImageContent | AudioContent


@dataclass(frozen=True, slots=True)
class NewItem:
    """A message that a client adds to the conversation; ``item_id`` None: the server names it."""

    item_id: str | None
    role: Role
    content: tuple[Content, ...]


@dataclass(frozen=True, slots=True)
class ItemReference:
    """An item of the conversation, named as input of a response."""

    item_id: str


@dataclass(frozen=True, slots=True)
class ItemCreate:
    """``conversation.item.create``; ``previous_item_id`` None: at the end, "root": at the front."""

    event_id: str | None
    previous_item_id: str | None
    item: NewItem


@dataclass(frozen=True, slots=True)
class ItemRetrieve:
    """``conversation.item.retrieve``."""

    event_id: str | None
    item_id: str


@dataclass(frozen=True, slots=True)
class ItemDelete:
    """``conversation.item.delete``."""

    event_id: str | None
    item_id: str


@dataclass(frozen=True, slots=True)
class ItemTruncate:
    """``conversation.item.truncate``.

    Attributes:
        event_id: As the client names the event.
        item_id: An assistant's message.
        audio_end_ms: Milliseconds that were played.
        text_end: This plugin's field ``mm_ext.text_end``: characters of the text that were shown or
            spoken; None without it.
    """

    event_id: str | None
    item_id: str
    audio_end_ms: int
    text_end: int | None


@dataclass(frozen=True, slots=True)
class ResponseRequest:
    """What a client asks of one response; what it does not say is as the session has it.

    Attributes:
        in_conversation: Whether the answer becomes an item of the conversation.
        input: What to answer, in place of the conversation; None: the conversation.
        instructions: In place of the session's; None: the session's.
        max_output_tokens: "inf": as many as fit; None: the session's.
        temperature: This plugin's field ``mm_ext.temperature``; None: the session's.
        metadata: Given back with the response.
    """

    in_conversation: bool = True
    input: tuple[NewItem | ItemReference, ...] | None = None
    instructions: str | None = None
    max_output_tokens: int | Literal["inf"] | None = None
    temperature: float | None = None
    metadata: Mapping[str, str] | None = None


@dataclass(frozen=True, slots=True)
class ResponseCreate:
    """``response.create``."""

    event_id: str | None
    response: ResponseRequest


@dataclass(frozen=True, slots=True)
class ResponseCancel:
    """``response.cancel``; ``response_id`` None: the response under way."""

    event_id: str | None
    response_id: str | None


ClientEvent = (
    SessionUpdate
    | AudioAppend
    | AudioCommit
    | AudioClear
    | VideoAppend
    | ItemCreate
    | ItemRetrieve
    | ItemDelete
    | ItemTruncate
    | ResponseCreate
    | ResponseCancel
)


def _said(event: ClientEvent) -> Iterator[tuple[str, Role, Content]]:
    """The contents of new items within an event, in order: name of the field, who says it, what."""
    items: tuple[tuple[str, NewItem | ItemReference], ...] = ()
    if isinstance(event, ItemCreate):
        items = (("item", event.item),)
    elif isinstance(event, ResponseCreate):
        given = event.response.input or ()
        items = tuple((f"response.input[{k}]", item) for k, item in enumerate(given))
    for name, item in items:
        if isinstance(item, NewItem):
            for index, content in enumerate(item.content):
                yield f"{name}.content[{index}]", item.role, content


def contents(event: ClientEvent) -> Iterator[tuple[str, Content]]:
    """The contents of the items within an event, in order, each with the name of its field."""
    return ((name, content) for name, _, content in _said(event))


def texts(event: ClientEvent) -> Iterator[tuple[str, Role, str]]:
    """The texts of an event that the model may be shown, in the order in which they are read.

    Each comes with the name of its field, and with who says it.
    """
    instructions: object = None
    if isinstance(event, SessionUpdate):
        instructions = event.session.get("instructions")
        name = "session.instructions"
    elif isinstance(event, ResponseCreate):
        instructions, name = event.response.instructions, "response.instructions"
    if isinstance(instructions, str):
        yield name, "system", instructions
    for name, role, content in _said(event):
        if isinstance(content, TextContent):
            yield f"{name}.text", role, content.text


def media_contents(event: ClientEvent) -> tuple[tuple[str, ImageContent | AudioContent], ...]:
    """The pictures and sounds within the items of an event, in the order they stand there.

    Each comes with the name of its field.
    """
    return tuple(
        (f"{name}.{'image_url' if isinstance(content, ImageContent) else 'audio'}", content)
        for name, content in contents(event)
        if not isinstance(content, TextContent)
    )
