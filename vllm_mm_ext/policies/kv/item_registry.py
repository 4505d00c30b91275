"""The media in the KV cache: their blocks, and what computing them again costs. Pure.

An entry is an mm item *after a certain prefix*: KV depends on all that comes before, so the same
item in another place is another entry. Entries form a tree, in which the parent of an item is the
mm item before it in the prompt.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

# Encoding one media token, in prefills of one text token. Qwen2.5-VL's encoder (0.63B parameters,
# four patches a token, windowed attention) takes 0.4 of a token of its 7B model and 0.8 of its 3B
# model (2 FLOP per parameter and token, Kaplan et al., arXiv:2001.08361, section 2.1).
ENCODE_COST = 0.5


def prefill_cost(start: int, end: int, hidden_size: int) -> float:
    """Cost of prefilling tokens, in prefills of the first token of a prompt.

    A layer spends about ``24 d^2`` FLOP on a token and ``4 d`` more on every token before it
    (``d`` is the hidden size; Kaplan et al., arXiv:2001.08361, table 1 with d_attn = d and
    d_ff = 4 d), so a token at position ``p`` costs ``1 + p / (6 d)``.

    Args:
        start: Position of the first token.
        end: Position after the last token.
        hidden_size: Hidden size of the language model.
    """
    tokens = end - start
    return tokens * (1.0 + (start + end - 1) / 2 / (6 * hidden_size))


@dataclass(slots=True, eq=False)
class CachedItem:
    """One mm item in the KV cache, with the text before it.

    Attributes:
        number: The item's number, unique and ascending.
        key: Block hash at the item's beginning, which names the item and all that comes before.
        identifier: Hash of the item's content, as vLLM names it.
        modality: `video`, `audio`, `image`...
        parent: The mm item before this one, which must be cached as long as this one is.
        children: Items after this one, by number.
        blocks: Ids of the blocks that hold the item's tokens, in prompt order (by KV cache group).
        before: Ids of the blocks with the text between parent and item; other items may share them.
        reached: By KV cache group, the index in a request after the last of ``blocks``.
        tokens: Prompt tokens of ``blocks`` and ``before`` in the first KV cache group.
        modalities: Number of those tokens by modality: `video`, `audio`, `text`...
        cost: Cost of computing those tokens again, in prefills of the first token of a prompt.
        hits: Requests that found the item in the cache.
        last_use_s: When a request last used the item, in seconds on the pool's clock.
        free: How many of ``blocks`` no request uses.
        renewed: Whether a request used the item since the item was last ranked.
    """

    number: int
    key: bytes
    identifier: str
    modality: str
    parent: CachedItem | None
    children: dict[int, CachedItem] = field(default_factory=dict)
    blocks: list[int] = field(default_factory=list)
    before: list[int] = field(default_factory=list)
    reached: dict[int, int] = field(default_factory=dict)
    tokens: int = 0
    modalities: dict[str, float] = field(default_factory=dict)
    cost: float = 0.0
    hits: int = 0
    last_use_s: float = 0.0
    free: int = 0
    renewed: bool = True

    @property
    def size(self) -> int:
        """Number of the item's blocks, those shared with other items included."""
        return len(self.blocks) + len(self.before)

    @property
    def idle(self) -> bool:
        """Whether no request uses any of the item's blocks."""
        return self.free == len(self.blocks)


@dataclass(frozen=True, slots=True)
class CachedMedia:
    """All that is cached of one mm item's content, in all prompts that contain it.

    Attributes:
        identifier: Hash of the content, as vLLM names it.
        modality: `video`, `audio`, `image`...
        places: Number of different prefixes after which the content is cached.
        blocks: Number of KV blocks.
        bytes: Size of these blocks.
        tokens: Prompt tokens in these blocks.
        modalities: Number of those tokens by modality: a video with its sound has `video`, `audio`
            and the `text` of its markers and of what stands before it.
        hits: Requests that found the content in the cache.
        last_use_s: When a request last used the content, in seconds on the pool's clock.
        cost: Cost of computing the content again, in prefills of one token.
        sessions: Conversations for which the content is kept.
    """

    identifier: str
    modality: str
    places: int
    blocks: int
    bytes: int
    tokens: int
    modalities: dict[str, int]
    hits: int
    last_use_s: float
    cost: float
    sessions: tuple[str, ...]


class Registry:
    """The tree of cached items."""

    def __init__(self) -> None:
        self._items: dict[int, CachedItem] = {}
        self._by_key: dict[bytes, CachedItem] = {}
        self._next = 1

    def __len__(self) -> int:
        return len(self._items)

    def __iter__(self) -> Iterator[CachedItem]:
        return iter(self._items.values())

    def get(self, key: bytes) -> CachedItem | None:
        """The item of that key, if it is cached."""
        return self._by_key.get(key)

    def numbered(self, number: int) -> CachedItem | None:
        """The item of that number, if it is cached."""
        return self._items.get(number)

    def add(
        self, key: bytes, identifier: str, modality: str, parent: CachedItem | None
    ) -> CachedItem:
        """Add an item that is not cached, after a parent that is.

        Raises:
            ValueError: The key is known, or the parent is not.
        """
        if key in self._by_key:
            raise ValueError(f"{identifier} is cached at this place already")
        if parent is not None and parent.number not in self._items:
            raise ValueError(f"the item before {identifier} is not cached")
        item = CachedItem(self._next, key, identifier, modality, parent)
        self._next += 1
        self._items[item.number] = item
        self._by_key[key] = item
        if parent is not None:
            parent.children[item.number] = item
        return item

    def remove(self, item: CachedItem) -> None:
        """Drop an item without children.

        Raises:
            ValueError: Items after it are still there.
        """
        if item.children:
            raise ValueError(f"{item.identifier} has {len(item.children)} cached items after it")
        del self._items[item.number]
        del self._by_key[item.key]
        if item.parent is not None:
            del item.parent.children[item.number]

    def clear(self) -> None:
        """Drop everything. Numbers are not used again."""
        self._items.clear()
        self._by_key.clear()

    def descendants(self, item: CachedItem) -> list[CachedItem]:
        """An item and all after it, each behind its own descendants: the order to drop them."""
        found, open_ = [], [item]
        while open_:
            current = open_.pop()
            found.append(current)
            open_ += current.children.values()
        return found[::-1]

    def holding(self, block_id: int) -> list[CachedItem]:
        """Items that hold a block. O(all blocks), so only for what is rare."""
        return [item for item in self if block_id in item.blocks or block_id in item.before]

    def check_integrity(self) -> None:
        """Raise ``AssertionError`` if the items are no tree; for tests."""
        assert len(self._by_key) == len(self._items)
        for number, item in self._items.items():
            assert item.number == number < self._next
            assert self._by_key[item.key] is item
            assert 0 <= item.free <= len(item.blocks)
            if item.parent is not None:
                assert self._items.get(item.parent.number) is item.parent
                assert item.parent.children[number] is item
            for child in item.children.values():
                assert child.parent is item
                assert self._items.get(child.number) is child


def merge(
    items: Iterable[CachedItem], block_bytes: int, sessions: dict[int, tuple[str, ...]]
) -> list[CachedMedia]:
    """Sum the entries of each content up, latest use first.

    Args:
        items: Entries of a registry.
        block_bytes: Size of a KV block.
        sessions: Conversations by item number.
    """
    groups: dict[str, list[CachedItem]] = {}
    for item in items:
        groups.setdefault(item.identifier, []).append(item)
    made = [
        CachedMedia(
            identifier=identifier,
            modality=group[0].modality,
            places=len(group),
            blocks=sum(item.size for item in group),
            bytes=sum(item.size for item in group) * block_bytes,
            tokens=sum(item.tokens for item in group),
            modalities=_added(item.modalities for item in group),
            hits=sum(item.hits for item in group),
            last_use_s=max(item.last_use_s for item in group),
            cost=sum(item.cost for item in group),
            sessions=tuple(sorted({s for item in group for s in sessions.get(item.number, ())})),
        )
        for identifier, group in groups.items()
    ]
    return sorted(made, key=lambda media: -media.last_use_s)


def _added(counts: Iterable[dict[str, float]]) -> dict[str, int]:
    total: dict[str, float] = {}
    for own in counts:
        for name, count in own.items():
            total[name] = total.get(name, 0.0) + count
    return {name: round(count) for name, count in total.items()}
