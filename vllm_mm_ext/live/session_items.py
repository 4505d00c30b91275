"""The items of a session's conversation, and the messages that the model is shown of them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from vllm_mm_ext.live.client_events import Role
from vllm_mm_ext.live.prompt import Generated, Message, Part, Picture, Stretch, Text
from vllm_mm_ext.live.server_events import Event, ItemStatus, item

#: Bytes of an item beside its contents, so that a crowd of empty ones is bounded too.
ITEM_BYTES = 1024
# Tokens of an item at least, for the same reason: about what a template puts around a message.
_ITEM_TOKENS = 4
# Bytes of a content beside its text, for the same reason.
_CONTENT_BYTES = 256
#: How often media that came over time are held: as units, and by the engine's side as they grow.
COPIES = 2


@dataclass(frozen=True, slots=True, eq=False)
class Weighed:
    """A part of a message, and what it takes.

    Attributes:
        part: The part.
        tokens: Of a message with this part alone: a little more than its share of a longer one.
        nbytes: Held for it.
        frames: Of a camera, in it.
    """

    part: Part
    tokens: int
    nbytes: int
    frames: int


class Scales:
    """Weighs parts.

    Args:
        measure: Tokens of a message.
    """

    def __init__(self, measure: Callable[[Message], int]) -> None:
        self._measure = measure

    def weigh(self, role: Role, part: Part) -> Weighed:
        """What a part takes in a message of this role."""
        tokens = self._measure(Message(role, (part,)))
        return Weighed(part, tokens, _nbytes(part), _frames(part))


def _nbytes(part: Part) -> int:
    match part:
        case Text(text):
            return 4 * len(text)
        case Generated(token_ids, text):
            return 8 * len(token_ids) + 4 * len(text)
        case Picture():
            return part.nbytes
        case Stretch():
            return COPIES * sum(
                unit.samples.nbytes + sum(frame.pixels.nbytes for frame in unit.frames)
                for unit in part.units
            )


def _content_nbytes(content: Event) -> int:
    """Of what events show: a transcript is held for them alone, a text is a part too."""
    return _CONTENT_BYTES + 4 * len(content.get("transcript") or "")


def _frames(part: Part) -> int:
    return sum(len(unit.frames) for unit in part.units) if isinstance(part, Stretch) else 0


@dataclass(slots=True, eq=False)
class Item:
    """An item of the conversation.

    Attributes:
        item_id: Names it.
        role: Who says it.
        parts: What the model is shown of it.
        content: What events show of it.
        status: As events show it; the model is shown nothing of an item that is ``in_progress``.
        added: Whether the client was told of it: an answer has its place before it has any text.
        chunks: Of a generated answer: tokens and characters of each piece that the engine wrote.
    """

    item_id: str
    role: Role
    parts: tuple[Weighed, ...] = ()
    content: tuple[Event, ...] = ()
    status: ItemStatus = "completed"
    added: bool = True
    chunks: tuple[tuple[int, int], ...] = ()

    def shown(self) -> Event:
        """The item as events show it."""
        return item(self.item_id, self.role, self.status, self.content)

    @property
    def tokens(self) -> int:
        """Tokens of the item, or a few more."""
        return max(_ITEM_TOKENS, sum(part.tokens for part in self.parts))

    @property
    def nbytes(self) -> int:
        """Bytes held for the item."""
        return (
            ITEM_BYTES
            + sum(part.nbytes for part in self.parts)
            + sum(map(_content_nbytes, self.content))
        )

    @property
    def text(self) -> str:
        """The text of an answer."""
        return "".join(
            weighed.part.text
            for weighed in self.parts
            if isinstance(weighed.part, Text | Generated)
        )


class SessionItems:
    """The items of a conversation, in order.

    Attributes:
        tokens: Of all items.
        system_tokens: Of the system's items.
        nbytes: Held for all items.
    """

    def __init__(self) -> None:
        self._items: list[Item] = []
        self._by_id: dict[str, Item] = {}
        self.tokens = self.system_tokens = self.nbytes = 0

    def __iter__(self) -> Iterator[Item]:
        return iter(self._items)

    def __len__(self) -> int:
        return len(self._items)

    def find(self, item_id: str) -> Item | None:
        """The item of this name that the client was told of."""
        found = self._by_id.get(item_id)
        return found if found is not None and found.added else None

    def holds(self, item_id: str) -> bool:
        """Whether the name is taken."""
        return item_id in self._by_id

    def previous_id(self, before: Item | None = None) -> str | None:
        """The item before this one, as the client knows the order; None: this one is the first.

        Args:
            before: An item; None: one that is added at the end.
        """
        end = len(self._items) if before is None else self._items.index(before)
        return next(
            (self._items[i].item_id for i in reversed(range(end)) if self._items[i].added), None
        )

    def append(self, new: Item) -> None:
        """Add an item at the end."""
        self._items.append(new)
        self._by_id[new.item_id] = new
        self._count(new, 1)

    def insert(self, new: Item, after: Item | None) -> None:
        """Add an item behind another one; None: at the front."""
        self._items.insert(0 if after is None else self._items.index(after) + 1, new)
        self._by_id[new.item_id] = new
        self._count(new, 1)

    def remove(self, old: Item) -> None:
        """Drop an item."""
        self._items.remove(old)
        del self._by_id[old.item_id]
        self._count(old, -1)

    @contextmanager
    def changing(self, item: Item) -> Iterator[None]:
        """Within this, an item's parts may be changed."""
        self._count(item, -1)
        yield
        self._count(item, 1)

    def clear(self) -> None:
        """Drop all items."""
        self._items.clear()
        self._by_id.clear()
        self.tokens = self.system_tokens = self.nbytes = 0

    def _count(self, item: Item, sign: int) -> None:
        self.tokens += sign * item.tokens
        self.nbytes += sign * item.nbytes
        if item.role == "system":
            self.system_tokens += sign * item.tokens


def messages(
    instructions: str, items: Iterable[Item], open_parts: Sequence[Weighed] = ()
) -> tuple[Message, ...]:
    """What the model is shown.

    Messages of the user that follow each other become one, as models know them: a video, then the
    question about it.

    Args:
        instructions: The system's message; without letters there is none.
        items: Of the conversation.
        open_parts: Of the user's message that is not committed yet.
    """
    spoken = [(x.role, x.parts) for x in items if x.parts and x.status != "in_progress"]
    if open_parts:
        spoken.append(("user", tuple(open_parts)))
    shown: list[tuple[Role, list[Part]]] = []
    if instructions.strip():
        shown.append(("system", [Text(instructions)]))
    for role, weighed in spoken:
        if role != "user" or not shown or shown[-1][0] != "user":
            shown.append((role, []))
        shown[-1][1].extend(x.part for x in weighed)
    return tuple(Message(role, tuple(parts)) for role, parts in shown)


def say(answer: Item, chunks: Sequence[tuple[tuple[int, ...], str]], scales: Scales) -> None:
    """Give an item what the engine wrote: the tokens and the text of each piece."""
    token_ids = tuple(token for tokens, _ in chunks for token in tokens)
    text = "".join(text for _, text in chunks)
    answer.chunks = tuple((len(tokens), len(text)) for tokens, text in chunks)
    _say(answer, [Generated(token_ids, text)] if token_ids else [], scales)


def cut_text(answer: Item, text_end: int, scales: Scales) -> None:
    """Let an answer end after ``text_end`` characters.

    The tokens of the pieces that stay whole stay as they are, so that their KV is found again.
    """
    text = answer.text[:text_end]
    tokens = characters = kept_tokens = kept_characters = 0
    for token_count, character_count in answer.chunks:
        tokens += token_count
        characters += character_count
        # A piece without text is the beginning of the next one's first character.
        if character_count and characters <= text_end:
            kept_tokens, kept_characters = tokens, characters
    parts: list[Part] = []
    if kept_tokens:
        first = answer.parts[0].part
        assert isinstance(first, Generated)
        parts.append(Generated(first.token_ids[:kept_tokens], text[:kept_characters]))
    if text[kept_characters:]:
        parts.append(Text(text[kept_characters:]))
    answer.chunks = tuple(_first_chunks(answer.chunks, kept_tokens))
    _say(answer, parts, scales)


def _first_chunks(chunks: Iterable[tuple[int, int]], token_count: int) -> Iterator[tuple[int, int]]:
    for chunk in chunks:
        token_count -= chunk[0]
        if token_count < 0:
            return
        yield chunk


def _say(answer: Item, parts: Sequence[Part], scales: Scales) -> None:
    answer.parts = tuple(scales.weigh("assistant", part) for part in parts)
    answer.content = ({"type": "output_text", "text": answer.text},)
