"""A session's conversation: its items, the open message, and the room that they may take."""

from __future__ import annotations

import uuid
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

from vllm_mm_ext.live import server_events
from vllm_mm_ext.live.client_events import (
    ItemCreate,
    ItemDelete,
    ItemReference,
    ItemRetrieve,
    ItemTruncate,
    NewItem,
    ResponseRequest,
)
from vllm_mm_ext.live.family import FamilyTraits
from vllm_mm_ext.live.new_items import ItemReader, Media, shown_media
from vllm_mm_ext.live.open_message import LEAST_SOUND_MS, OpenMessage
from vllm_mm_ext.live.prompt import Message, Prompt, Text
from vllm_mm_ext.live.server_events import Event
from vllm_mm_ext.live.session_items import Item, Scales, SessionItems, Weighed, cut_text, messages
from vllm_mm_ext.live.session_options import SessionLimits, Truncation, TurnDetection
from vllm_mm_ext.live.truncation import Excess, Removal, byte_excess, latest, removals, token_excess
from vllm_mm_ext.live.wire_error import WireError


def new_id(kind: str) -> str:
    """A name that is not used yet, such as ``item_...``."""
    return f"{kind}_{uuid.uuid4().hex[:24]}"


@dataclass(frozen=True, slots=True)
class Asked:
    """What a response answers.

    Attributes:
        prompt: Closed.
        nbytes: Held for what is not of the conversation in it.
    """

    prompt: Prompt
    nbytes: int


class LiveConversation:
    """The items of a session and the message that is open.

    Args:
        family: What the model takes.
        limits: What the session may use.
        measure: Tokens of a message.
        detection: How turns are detected at first.
        now: Monotonic seconds.
    """

    def __init__(
        self,
        family: FamilyTraits,
        limits: SessionLimits,
        measure: Callable[[Message], int],
        detection: TurnDetection | None,
        now: float,
    ) -> None:
        self.conversation_id = new_id("conv")
        self.items = SessionItems()
        self.scales = Scales(measure)
        # A quarter of the context: then three quarters can stay when a stretch goes.
        self.open = OpenMessage(family, self.scales, limits.prompt_tokens // 4, detection, now)
        self._limits = limits
        self._family = family
        #: Names the item that the open message will be.
        self.speech_item = new_id("item")
        self._instructions = ""
        self._instruction_tokens = 0

    # Items that clients add, ask for, delete and shorten.

    def create(self, event: ItemCreate, media: Sequence[Media]) -> list[Event]:
        """Add a client's item.

        Raises:
            WireError: The item cannot be added.
        """
        item_id = event.item.item_id
        if item_id is not None and (self.items.holds(item_id) or item_id == self.speech_item):
            raise WireError(
                f"An item with the id '{item_id}' exists.",
                code="item_create_duplicate_item_id",
                param="item.id",
            )
        item = self._reader().read(event.item, item_id or new_id("item"), iter(media), "item")
        if item.role == "system":
            taken = self._instruction_tokens + self.items.system_tokens
            self._check_system(taken + item.tokens, "item")
        if event.previous_item_id is None:
            events = self.commit_frames()
            self.items.append(item)
            return events + self._told(item)
        after = None
        if event.previous_item_id != "root":
            after = self._find(
                event.previous_item_id,
                "item_create_invalid_previous_item_id",
                "previous_item_id",
            )
        self.items.insert(item, after)
        return self._told(item)

    def retrieve(self, event: ItemRetrieve) -> list[Event]:
        """Show an item."""
        item = self._find(event.item_id, "item_retrieve_invalid_item_id")
        return [server_events.item_retrieved(item.shown())]

    def delete(self, event: ItemDelete) -> list[Event]:
        """Drop an item."""
        item = self._find(event.item_id, "item_delete_invalid_item_id")
        _check_written(item)
        self.items.remove(item)
        return [server_events.item_deleted(item.item_id)]

    def truncate(self, event: ItemTruncate) -> list[Event]:
        """Shorten an answer to what was heard or read of it."""
        item = self._find(event.item_id, "item_truncate_invalid_item_id")
        if item.role != "assistant":
            raise WireError(
                "Only messages of the assistant can be truncated.",
                code="item_truncate_invalid_item_id",
                param="item_id",
            )
        _check_written(item)
        text_end = event.text_end
        if text_end is None and event.audio_end_ms > 0:
            raise WireError(
                "The item has text and no audio, so its milliseconds are not known here. Give "
                "'mm_ext.text_end', the characters that were spoken or shown, beside "
                "'audio_end_ms'.",
                code="missing_required_parameter",
                param="mm_ext.text_end",
            )
        with self.items.changing(item):
            cut_text(item, text_end or 0, self.scales)
        return [server_events.item_truncated(item.item_id, event.audio_end_ms)]

    # The open message becomes an item.

    def check_commit(self) -> None:
        """Look whether there is something to commit.

        Raises:
            WireError: There is not.
        """
        if self.open.sound_ms < LEAST_SOUND_MS and not self.open.frames:
            raise WireError(
                "Error committing input audio buffer: buffer too small. Expected at least "
                f"{LEAST_SOUND_MS}ms of audio, but buffer only has {self.open.sound_ms:.2f}ms of "
                "audio.",
                code="input_audio_buffer_commit_empty",
            )

    def commit(self) -> list[Event]:
        """Make the open message an item, as the protocol tells of a committed buffer."""
        item = self._close_open()
        previous = self.items.previous_id(item)
        return [server_events.committed(previous, item.item_id), *self._told(item)]

    def clear(self) -> list[Event]:
        """Drop the open message."""
        self.open.clear()
        self.speech_item = new_id("item")
        return [server_events.cleared()]

    def commit_frames(self) -> list[Event]:
        """Make the open message an item if frames are all that it has: they came before."""
        if self.open.speaking or self.open.sound_ms or not self.open.frames:
            return []
        return self._told(self._close_open())

    # What the model is shown.

    def open_prompt(self, *, paused: bool, goes_on: bool) -> Prompt | None:
        """The conversation with what is open of it; None: it is too much, or has nothing to ask.

        Args:
            paused: As it would be committed if the turn ended with the pause in speech.
            goes_on: Whether more of the message is to come.
        """
        parts = self.open.paused_parts() if paused else self.open.parts()
        if self._tokens_with(parts) > self._limits.prompt_tokens:
            return None
        shown = messages(self._instructions, self.items, parts)
        if not shown or shown[-1].role != "user":
            return None
        return Prompt(shown, open=goes_on)

    def asked(
        self, request: ResponseRequest, media: Sequence[Media], truncation: Truncation
    ) -> Asked:
        """What a response answers. Its own instructions can leave no room for the oldest turns.

        Raises:
            WireError: It is too long, or there is nothing to answer.
        """
        instructions, tokens = self._instructions, self._instruction_tokens
        if request.instructions is not None:
            instructions = request.instructions
            tokens = self._system_tokens(instructions)
        nbytes = 0
        if request.input is None:
            most, keep_frames = self._limits.prompt_tokens, self._limits.keep_frames
            items = latest(list(self.items), tokens, truncation, most, keep_frames)
        else:
            items = self._input_items(request.input, iter(media), tokens)
            nbytes = sum(item.nbytes for item in items if not self.items.holds(item.item_id))
        tokens += sum(item.tokens for item in items if item.status != "in_progress")
        self._check_room(tokens)
        shown = messages(instructions, items)
        if not shown:
            raise WireError("There is nothing to answer.", code="conversation_empty")
        return Asked(Prompt(shown, open=False), nbytes)

    def set_instructions(self, instructions: str) -> None:
        """Show the model these instructions from now on.

        Raises:
            WireError: They leave too little of the context; nothing changed.
        """
        tokens = self._system_tokens(instructions)
        self._check_system(tokens + self.items.system_tokens, "session.instructions")
        self._instructions, self._instruction_tokens = instructions, tokens

    # The room that the conversation takes.

    @property
    def tokens(self) -> int:
        """Tokens of the conversation and of what is open, or a few more."""
        return self._tokens_with(self.open.parts())

    @property
    def nbytes(self) -> int:
        """Bytes held for the conversation and for what is open."""
        return self.open.nbytes + self.items.nbytes

    def make_room(self, truncation: Truncation, others: int) -> list[Event]:
        """Let the oldest turns go if the conversation takes more than it may.

        Args:
            truncation: The session's option.
            others: Bytes that the session holds beside the conversation.
        """
        if truncation == "disabled":
            return []
        fixed = self._instruction_tokens + self.items.system_tokens
        events: list[Event] = []
        over = token_excess(truncation, self.tokens, fixed, self._limits.prompt_tokens)
        if over is not None:
            events += self._remove_oldest(over, lambda removal: removal.tokens)
        over = byte_excess(self.nbytes + others, self._limits.max_bytes)
        if over is not None:
            events += self._remove_oldest(over, lambda removal: removal.nbytes)
        return events

    def check_bytes(self, others: int) -> None:
        """Refuse what makes the session hold too much.

        Args:
            others: As for ``make_room``.

        Raises:
            WireError: The session holds too much.
        """
        if self.nbytes + others > self._limits.max_bytes:
            raise WireError(
                f"The session holds more than {self._limits.max_bytes >> 20} MiB of messages, "
                "sound and frames (mm_ext.live.session_mb).",
                code="session_too_large",
            )

    def forget(self) -> None:
        """Drop everything."""
        self.items.clear()
        self.open.clear()

    def _tokens_with(self, parts: Iterable[Weighed]) -> int:
        return self._instruction_tokens + self.items.tokens + sum(part.tokens for part in parts)

    def _remove_oldest(self, over: Excess, size: Callable[[Removal], int]) -> list[Event]:
        gone = removals(list(self.items), self.open.parts(), over, size, self._limits.keep_frames)
        if not gone:
            return []
        self.open.drop_first(sum(removal.item is None for removal in gone))
        deleted: list[str] = []
        for removal in gone:
            if removal.item is None:
                continue
            if removal.part is None:
                self.items.remove(removal.item)
                deleted.append(removal.item.item_id)
                continue
            with self.items.changing(removal.item):
                removal.item.parts = tuple(
                    part for part in removal.item.parts if part is not removal.part
                )
        tokens = sum(removal.tokens for removal in gone)
        return [
            *(server_events.item_deleted(item_id) for item_id in deleted),
            server_events.conversation_truncated(deleted, tokens),
        ]

    def _close_open(self) -> Item:
        heard = bool(self.open.sound_ms) or not self.open.frames
        parts = self.open.commit()
        item = Item(self.speech_item, "user", parts, shown_media(parts, heard=heard))
        self.speech_item = new_id("item")
        self.items.append(item)
        return item

    def _told(self, item: Item) -> list[Event]:
        """The events of an item that is complete as it is added."""
        previous, shown = self.items.previous_id(item), item.shown()
        return [
            server_events.item_event("conversation.item.added", previous, shown),
            server_events.item_event("conversation.item.done", previous, shown),
        ]

    def _reader(self) -> ItemReader:
        return ItemReader(
            self._family, self.scales, self._limits.prompt_tokens, self._limits.max_bytes
        )

    def _input_items(
        self, given: Sequence[NewItem | ItemReference], media: Iterator[Media], tokens: int
    ) -> list[Item]:
        """Items that a response answers, behind so many tokens of instructions."""
        reader = self._reader()
        items = []
        for index, new in enumerate(given):
            # Items that come after too many are not read for nothing.
            self._check_room(tokens)
            name = f"response.input[{index}]"
            if isinstance(new, NewItem):
                items.append(reader.read(new, new_id("item"), media, name, tokens))
            else:
                items.append(self._find(new.item_id, "item_reference_invalid_item_id", name))
            tokens += items[-1].tokens
        return items

    def _check_room(self, tokens: int) -> None:
        most = self._limits.prompt_tokens
        if tokens > most:
            raise WireError(
                f"The conversation has {tokens} tokens; at most {most} leave room for an answer.",
                code="context_length_exceeded",
            )

    def _find(self, item_id: str, code: str, param: str = "item_id") -> Item:
        if (item := self.items.find(item_id)) is None:
            raise WireError(
                f"The item with the id '{item_id}' does not exist.", code=code, param=param
            )
        return item

    def _system_tokens(self, instructions: str) -> int:
        if not instructions.strip():
            return 0
        return self.scales.weigh("system", Text(instructions)).tokens

    def _check_system(self, tokens: int, name: str) -> None:
        """Instructions and messages of the system never go, so they must leave room."""
        most = self._limits.prompt_tokens // 2
        if tokens > most:
            raise WireError(
                f"With '{name}', instructions and messages of the system have {tokens} tokens; at "
                f"most {most} leave room for the conversation.",
                code="context_length_exceeded",
                param=name,
            )


def _check_written(item: Item) -> None:
    if item.status == "in_progress":
        raise WireError(
            "The item is being written; cancel its response first.",
            code="item_in_progress",
            param="item_id",
        )
