"""Makes items of the conversation from the messages that clients add."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import numpy.typing as npt

from vllm_mm_ext.live.client_events import (
    AudioContent,
    ClientEvent,
    Content,
    ImageContent,
    NewItem,
    TextContent,
    contents,
    texts,
)
from vllm_mm_ext.live.family import FamilyTraits
from vllm_mm_ext.live.listening import Piece
from vllm_mm_ext.live.prompt import Part, Picture, Text
from vllm_mm_ext.live.server_events import Event
from vllm_mm_ext.live.session_items import Item, Scales, Weighed
from vllm_mm_ext.live.units import UnitCutter
from vllm_mm_ext.live.watching import Sight
from vllm_mm_ext.live.wire_error import WireError

#: A picture or a sound of an item, decoded: a sight where the model takes frames but no pictures;
#: sound as float32 at the model's rate.
Media = Picture | Sight | npt.NDArray[np.float32]

# No tokenizer makes fewer tokens of text than one for so many characters, or nearly none.
_MOST_CHARACTERS_PER_TOKEN = 16
# Of all transcripts in an event: half an hour of fast speech. A message of the socket has room for
# less sound.
_MOST_TRANSCRIPT_CHARACTERS = 1 << 16


def check_media(event: ClientEvent, family: FamilyTraits) -> None:
    """Refuse the sounds and pictures of new items that the model cannot take.

    Raises:
        WireError: There is one.
    """
    for name, content in contents(event):
        if isinstance(content, AudioContent) and not family.hears:
            raise no_media(f"{name}.audio", "sound")
        if isinstance(content, ImageContent) and not (family.images or family.sees):
            raise no_media(f"{name}.image_url", "pictures")


def no_media(name: str, media: str) -> WireError:
    """The error of media that the model does not take."""
    return WireError(f"The model takes no {media}.", code="unsupported_parameter", param=name)


def check_lengths(event: ClientEvent, most_tokens: int) -> None:
    """Refuse texts that cannot fit, before they cost the time of a tokenizer, and long transcripts.

    Raises:
        WireError: There is one.
    """
    most = most_tokens * _MOST_CHARACTERS_PER_TOKEN
    for name, _, text in texts(event):
        if len(text) > most:
            raise WireError(
                f"'{name}' has {len(text)} characters; at most {most} can fit.",
                code="string_above_max_length",
                param=name,
            )
    characters = 0
    for name, content in contents(event):
        if not isinstance(content, AudioContent) or content.transcript is None:
            continue
        characters += len(content.transcript)
        if characters > _MOST_TRANSCRIPT_CHARACTERS:
            raise WireError(
                f"With '{name}.transcript', the transcripts have {characters} characters; at most "
                f"{_MOST_TRANSCRIPT_CHARACTERS} of an event are taken.",
                code="string_above_max_length",
                param=f"{name}.transcript",
            )


class ItemReader:
    """Makes items.

    Args:
        family: What the model takes.
        scales: Weighs parts.
        most_tokens: Tokens of an item at most, with what comes before it.
        most_bytes: Bytes of an item at most.
    """

    def __init__(
        self, family: FamilyTraits, scales: Scales, most_tokens: int, most_bytes: int
    ) -> None:
        self._family = family
        self._scales = scales
        self._most_tokens = most_tokens
        self._most_bytes = most_bytes

    def read(
        self, new: NewItem, item_id: str, media: Iterator[Media], name: str, tokens: int = 0
    ) -> Item:
        """Make an item.

        Args:
            new: As the client gave it.
            item_id: Names it.
            media: Gives its pictures and sounds, decoded, in their order.
            name: Of the field that holds the item, for errors.
            tokens: Of what comes before the item.

        Raises:
            WireError: The item takes more than a session may hold.
        """
        parts: list[Weighed] = []
        for index, content in enumerate(new.content):
            for part in self._parts(content, media, f"{item_id}.{index}"):
                try:
                    parts.append(self._scales.weigh(new.role, part))
                except WireError as error:
                    error.param = f"{name}.content[{index}].{error.param}"
                    raise
                tokens += parts[-1].tokens
            # What follows is not weighed for nothing: that takes the event loop's time.
            if tokens > self._most_tokens:
                raise WireError(
                    f"With '{name}', there are more than {self._most_tokens} tokens, the most that "
                    "fit.",
                    code="context_length_exceeded",
                    param=name,
                )
        item = Item(item_id, new.role, tuple(parts), tuple(_shown(new)))
        if item.nbytes > self._most_bytes:
            raise WireError(
                f"'{name}' takes {item.nbytes} bytes; a session holds {self._most_bytes}.",
                code="session_too_large",
                param=name,
            )
        return item

    def _parts(self, content: Content, media: Iterator[Media], name: str) -> tuple[Part, ...]:
        if isinstance(content, TextContent):
            return (Text(content.text),) if content.text else ()
        medium = next(media)
        if isinstance(medium, Picture):
            return (medium,)
        cutter = UnitCutter(self._family, 0.0)
        if isinstance(medium, Sight):
            cutter.see(medium, 0.0)
        else:
            cutter.hear(Piece(0, medium, None), len(medium), 0.0)
        return tuple(
            replace(stretch, stretch_id=f"{name}.{i}") for i, stretch in enumerate(cutter.commit())
        )


def _shown(new: NewItem) -> Iterator[Event]:
    """The contents as events show them: without the bytes of media."""
    for content in new.content:
        match content:
            case TextContent(text):
                kind = "output_text" if new.role == "assistant" else "input_text"
                yield {"type": kind, "text": text}
            case AudioContent():
                yield {"type": "input_audio", "transcript": content.transcript}
            case ImageContent():
                yield {"type": "input_image"}


def shown_media(parts: tuple[Weighed, ...], *, heard: bool) -> tuple[Event, ...]:
    """The contents of a committed message: its sound, and how many frames of a camera it has."""
    content: list[Event] = [{"type": "input_audio", "transcript": None}] if heard else []
    if frames := sum(part.frames for part in parts):
        content.append({"type": "input_image", "mm_ext": {"frames": frames}})
    return tuple(content)
