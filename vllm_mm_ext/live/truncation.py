"""Which of a conversation's oldest turns go when it takes more than it may."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

from vllm_mm_ext.live.prompt import Stretch
from vllm_mm_ext.live.session_items import Item, Weighed
from vllm_mm_ext.live.session_options import RetentionRatio, Truncation

# The part of the limit that stays when old turns go: each time costs a prefill of what stays.
_RETENTION = 0.75


@dataclass(frozen=True, slots=True)
class Excess:
    """How much of a conversation is too much.

    Attributes:
        least: So much has to go.
        wanted: So much is to go, so that it will be a while until more has to.
    """

    least: int
    wanted: int


def token_excess(truncation: Truncation, tokens: int, fixed: int, most: int) -> Excess | None:
    """How many tokens are too many; None: they fit, or the client wants none to go.

    Args:
        truncation: The session's option.
        tokens: Of the conversation.
        fixed: Of these, the system's, which stay.
        most: Of a prompt.
    """
    if truncation == "disabled":
        return None
    ratio = _RETENTION
    if isinstance(truncation, RetentionRatio):
        ratio = truncation.ratio
        if truncation.token_limit is not None:
            most = min(most, fixed + truncation.token_limit)
    if tokens <= most:
        return None
    return Excess(tokens - most, tokens - fixed - int(ratio * (most - fixed)))


def byte_excess(nbytes: int, most: int) -> Excess | None:
    """How many bytes are too many; None: they fit.

    Args:
        nbytes: That the session holds.
        most: That it may hold.
    """
    if nbytes <= most:
        return None
    return Excess(nbytes - most, nbytes - int(_RETENTION * most))


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
    over: Excess,
    size: Callable[[Removal], int],
    keep_frames: int,
) -> list[Removal]:
    """What goes, oldest first, so that as much goes as is wanted if so much can.

    Messages go whole, answers with what they answer. The last turn stays, which is the open
    message, or the user's last item if nothing is open, and what follows it. So does the item that
    is being answered, and the user's last item while no answer follows it. Of their media the
    oldest stretches can go, never the last one. Messages of the system stay. Unless there is no
    other way, so do the stretches with the latest frames, and as much of the user's items right
    before one that stays: the model is shown them as one message with it.

    Args:
        items: The conversation.
        open_parts: The stretches of the open message.
        over: How much has to go, and how much is to go.
        size: Tokens or bytes of a removal.
        keep_frames: How many of the latest frames stay.
    """
    frames, none = _latest_frames(items, open_parts, keep_frames), frozenset[int]()
    # What is wanted beyond the least is no reason to cut a message in two.
    ways = ((frames, True, over.least), (frames, False, over.wanted), (none, False, 0))
    for kept, runs, enough in ways:
        chosen: list[Removal] = []
        gone = 0
        for removal in _oldest_first(items, open_parts, kept, runs=runs):
            if gone >= over.wanted and not _is_answer(removal):
                break
            chosen.append(removal)
            gone += size(removal)
        if gone >= enough:
            break
    return chosen


def latest(
    items: Sequence[Item],
    instruction_tokens: int,
    truncation: Truncation,
    most: int,
    keep_frames: int,
) -> Sequence[Item]:
    """What fits of a conversation into one prompt. The items themselves stay as they are.

    Args:
        items: The conversation.
        instruction_tokens: Tokens of the prompt's instructions.
        truncation: The session's option.
        most: Tokens of a prompt at most.
        keep_frames: As for ``removals``.
    """
    written = [item for item in items if item.status != "in_progress"]
    tokens = instruction_tokens + sum(item.tokens for item in written)
    system = sum(item.tokens for item in items if item.role == "system")
    over = token_excess(truncation, tokens, instruction_tokens + system, most)
    if over is None:
        return items
    # The next prompt has all items again, so no more is left out than has to be.
    least = Excess(over.least, over.least)
    gone = removals(items, (), least, lambda removal: removal.tokens, keep_frames)
    whole = {id(removal.item) for removal in gone if removal.part is None}
    parts = {id(removal.part) for removal in gone}
    return [
        replace(item, parts=tuple(part for part in item.parts if id(part) not in parts))
        for item in items
        if id(item) not in whole
    ]


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
    items: Sequence[Item], open_parts: Sequence[Weighed], kept: frozenset[int], *, runs: bool
) -> Iterator[Removal]:
    """What can go; ``runs``: nothing of the user's items right before one that stays."""
    users = [i for i, item in enumerate(items) if item.role == "user"]
    answers = [i for i, item in enumerate(items) if item.role == "assistant"]
    # An answer has no place yet when room is made for it.
    place = len(items) if users[-1:] > answers[-1:] else 0
    answer = next((i for i in answers if items[i].status == "in_progress"), place)
    answered = next((i for i in reversed(users) if i < answer), None)
    staying: set[int] = set()
    if users and not open_parts:
        staying.update(range(_first(items, users[-1], runs), len(items)))
    if answered is not None:
        staying.update(range(_first(items, answered, runs), answered + 1))
    for index, item in enumerate(items):
        if item.role == "system" or item.status == "in_progress":
            continue
        goes = index not in staying
        if goes and not any(id(part) in kept for part in item.parts):
            yield Removal(item, None)
        elif item.role == "user":
            yield from _old_stretches(item, item.parts, kept, whole=goes)
    yield from _old_stretches(None, open_parts, kept, whole=False)


def _first(items: Sequence[Item], index: int, runs: bool) -> int:
    """The first of the user's items that end with this one, where runs of them are one."""
    while runs and index and items[index - 1].role == "user":
        index -= 1
    return index


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
