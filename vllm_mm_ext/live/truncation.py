"""Which of a conversation's oldest turns go when it takes more than it may."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from vllm_mm_ext.live.prompt import Stretch
from vllm_mm_ext.live.session_items import Item, Weighed


@dataclass(frozen=True, slots=True, eq=False)
class Removal:
    """A piece of the conversation that goes.

    Attributes:
        item: The item that goes, or that loses a part; None: the open message loses one.
        part: The part that goes; None: the item goes whole.
    """

    item: Item | None
    part: Weighed | None

    @property
    def tokens(self) -> int:
        """Tokens of what goes."""
        if self.part is not None:
            return self.part.tokens
        return self.item.tokens if self.item is not None else 0

    @property
    def nbytes(self) -> int:
        """Bytes of what goes."""
        if self.part is not None:
            return self.part.nbytes
        return self.item.nbytes if self.item is not None else 0


def removals(
    items: Sequence[Item],
    open_parts: Sequence[Weighed],
    excess: int,
    size: Callable[[Removal], int],
    keep_frames: int,
) -> list[Removal]:
    """What goes, oldest first, so that at least ``excess`` goes if so much can.

    Messages go whole, answers with what they answer. The last turn stays, which is the open
    message, or the user's last item if nothing is open, and what follows it. So does the item that
    is being answered, and the user's last item while no answer follows it. Of their media the
    oldest stretches can go, never the last one. Messages of the system stay, as do the stretches
    with the latest frames, unless there is no other way.

    Args:
        items: The conversation.
        open_parts: The stretches of the open message.
        excess: How much has to go.
        size: Tokens or bytes of a removal.
        keep_frames: How many of the latest frames stay.
    """
    for kept in (_latest_frames(items, open_parts, keep_frames), frozenset[int]()):
        chosen: list[Removal] = []
        left = excess
        for removal in _oldest_first(items, open_parts, kept):
            if left <= 0 and not _is_answer(removal):
                break
            chosen.append(removal)
            left -= size(removal)
        if left <= 0:
            break
    return chosen


def _is_answer(removal: Removal) -> bool:
    return removal.item is not None and removal.item.role == "assistant"


def _latest_frames(
    items: Sequence[Item], open_parts: Sequence[Weighed], keep_frames: int
) -> frozenset[int]:
    """Identities of the parts with the latest frames."""
    kept = set()
    parts = [part for item in items for part in item.parts]
    for part in reversed([*parts, *open_parts]):
        if keep_frames <= 0:
            break
        if part.frames:
            kept.add(id(part))
            keep_frames -= part.frames
    return frozenset(kept)


def _oldest_first(
    items: Sequence[Item], open_parts: Sequence[Weighed], kept: frozenset[int]
) -> Iterator[Removal]:
    users = [i for i, item in enumerate(items) if item.role == "user"]
    last_turn = users[-1] if users and not open_parts else len(items)
    answers = [i for i, item in enumerate(items) if item.role == "assistant"]
    # An answer has no place yet when room is made for it.
    place = len(items) if users[-1:] > answers[-1:] else 0
    answer = next((i for i in answers if items[i].status == "in_progress"), place)
    answered = next((i for i in reversed(users) if i < answer), None)
    for index, item in enumerate(items):
        if item.role == "system" or item.status == "in_progress":
            continue
        goes = index < last_turn and index != answered
        if goes and not any(id(part) in kept for part in item.parts):
            yield Removal(item, None)
        elif item.role == "user":
            yield from _old_stretches(item, item.parts, kept, whole=goes)
    yield from _old_stretches(None, open_parts, kept, whole=False)


def _old_stretches(
    item: Item | None, parts: Sequence[Weighed], kept: frozenset[int], *, whole: bool
) -> Iterator[Removal]:
    """The stretches that can go of a message that stays; ``whole``: its last one and text too."""
    removable = [part for part in parts if whole or isinstance(part.part, Stretch)]
    for part in removable if whole else removable[:-1]:
        if id(part) not in kept:
            yield Removal(item, part)
        elif item is None:
            # Of the open message, only the first stretches can go.
            return
