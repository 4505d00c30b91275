"""What is in the KV cache: pieces of prompts, and what computing them again costs. Pure.

A piece is an mm item, or text, *after a certain prefix*: KV depends on all that comes before, so
the same content in another place is another piece. Pieces form a tree, in which the parent of a
piece is the piece before it in the prompt. Text is cut where requests went on differently.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field

from vllm_mm_ext.base.apportion import apportion

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


@dataclass(frozen=True, slots=True)
class Content:
    """What a piece holds.

    Attributes:
        identifier: Hash of an mm item's content, as vLLM names it; None: text.
        modality: `video`, `audio`, `image`...; `text`.
        offset: First position of the item's placeholder; 0 for text.
    """

    identifier: str | None = None
    modality: str = "text"
    offset: int = 0


TEXT_CONTENT = Content()


@dataclass(slots=True, eq=False)
class Piece:
    """Neighbouring KV blocks of one mm item, or of text, in the cache.

    Attributes:
        key: Hash of the first block, which names the piece and all that comes before it.
        content: What the piece holds.
        start: Index of the first block in the prompt.
        block_size: Tokens per block.
        parent: The piece before this one, which must be cached as long as this one is.
        owner: The request that made the piece, which may add blocks at its end.
        children: Pieces after this one.
        blocks: Ids of the blocks, in prompt order.
        busy: How many of the blocks requests use.
        followed: Whether a piece has ever come after this one.
        whole: Whether no block was given up since the piece was made.
        modalities: Tokens of an mm item by modality: `video`, `audio`, `text` of markers...
        hits: Requests that found the piece in the cache.
        last_use_s: When a request last used the piece, in seconds on the pool's clock.
        last_user: What is alike in all the answers that the request asked for which used it last.
        with_media: Whether the piece is an mm item or comes after one.
    """

    key: bytes
    content: Content
    start: int
    block_size: int
    parent: Piece | None
    owner: str
    children: dict[Piece, None] = field(default_factory=dict)
    blocks: list[int] = field(default_factory=list)
    busy: int = 0
    followed: bool = False
    whole: bool = True
    modalities: dict[str, int] = field(default_factory=dict)
    hits: int = 0
    last_use_s: float = 0.0
    last_user: tuple[float, str] | None = None
    with_media: bool = field(init=False)

    def __post_init__(self) -> None:
        above = self.parent is not None and self.parent.with_media
        self.with_media = above or self.content.identifier is not None

    @property
    def idle(self) -> bool:
        """Whether no request uses any of the blocks."""
        return not self.busy

    @property
    def tokens(self) -> int:
        """Prompt tokens in the blocks."""
        return len(self.blocks) * self.block_size

    @property
    def begins_item(self) -> bool:
        """Whether the piece is an mm item, or the first part of one that was cut."""
        above = self.parent.content if self.parent is not None else None
        return self.content.identifier is not None and above != self.content

    def saved(self, hidden_size: int, *, encoded: bool) -> float:
        """Cost that finding the piece saves, in prefills of the first token of a prompt.

        Args:
            hidden_size: Hidden size of the language model.
            encoded: Whether the encoder's output for the item is there anyway.
        """
        begin = self.start * self.block_size
        cost = prefill_cost(begin, begin + self.tokens, hidden_size)
        # Of an item that has lost its end the encoder's output is needed in any case.
        if self.content.identifier is not None and self.whole and not encoded:
            cost += ENCODE_COST * self.tokens
        return cost


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
            and the `text` of its markers.
        hits: Requests that found the content in the cache.
        last_use_s: When a request last used the content, in seconds on the pool's clock.
        cost: Cost of computing the content again, in prefills of one token.
        sessions: Number of conversations for which the content is kept.
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
    sessions: int


class Tree:
    """The cached pieces. Reading the sums costs nothing, however many pieces there are.

    Attributes:
        items: By the identifiers of the mm items of which something is cached, numbers of pieces.
        modalities: Tokens of these items by modality.
    """

    def __init__(self) -> None:
        self._pieces: dict[Piece, None] = {}
        self.items: dict[str, int] = {}
        self.modalities: dict[str, int] = {}

    def __len__(self) -> int:
        return len(self._pieces)

    def __iter__(self) -> Iterator[Piece]:
        return iter(self._pieces)

    def __contains__(self, piece: object) -> bool:
        return piece in self._pieces

    def add(self, piece: Piece) -> None:
        """Add a piece after its parent.

        Raises:
            ValueError: The parent is not cached.
        """
        if piece.parent is not None:
            if piece.parent not in self._pieces:
                raise ValueError("the piece before this one is not cached")
            piece.parent.children[piece] = None
            piece.parent.followed = True
        self._pieces[piece] = None
        if (identifier := piece.content.identifier) is not None:
            _add(self.items, {identifier: 1})
        _add(self.modalities, piece.modalities)

    def count(self, piece: Piece, modalities: Mapping[str, int]) -> None:
        """Note the tokens, by modality, of blocks that a piece of an mm item got."""
        _add(piece.modalities, modalities)
        _add(self.modalities, modalities)

    def split(self, piece: Piece, blocks: int, key: bytes) -> Piece:
        """Make the first blocks of a piece a piece of their own, of which the rest is the child.

        Args:
            piece: The piece, which keeps the rest.
            blocks: How many.
            key: Hash of the first block of the rest.

        Returns:
            The new piece, whose key is the old one; its ``busy`` is to be set by the caller.
        """
        head = Piece(
            piece.key,
            piece.content,
            piece.start,
            piece.block_size,
            piece.parent,
            piece.owner,
            blocks=piece.blocks[:blocks],
            hits=piece.hits,
            last_use_s=piece.last_use_s,
            last_user=piece.last_user,
            whole=False,
        )
        if piece.parent is not None:
            del piece.parent.children[piece]
        self.add(head)
        # Together the two are what was there before, so the sums stay.
        head.modalities = _share(piece, blocks)
        _subtract(piece.modalities, head.modalities)
        del piece.blocks[:blocks]
        piece.key, piece.start, piece.parent = key, piece.start + blocks, head
        head.children[piece] = None
        head.followed = True
        return head

    def cut(self, piece: Piece, blocks: int) -> None:
        """Take the last blocks of a piece away.

        Args:
            piece: The piece; one that has no blocks left is to be removed.
            blocks: How many.
        """
        kept = _share(piece, len(piece.blocks) - blocks)
        _subtract(piece.modalities, kept)
        _subtract(self.modalities, piece.modalities)
        piece.modalities = kept
        del piece.blocks[-blocks:]

    def remove(self, piece: Piece) -> None:
        """Drop a piece without children.

        Raises:
            ValueError: Pieces after it are still there.
        """
        if piece.children:
            raise ValueError(f"{len(piece.children)} cached pieces come after this one")
        del self._pieces[piece]
        if piece.parent is not None:
            del piece.parent.children[piece]
        if (identifier := piece.content.identifier) is not None:
            _subtract(self.items, {identifier: 1})
        _subtract(self.modalities, piece.modalities)

    def clear(self) -> None:
        """Drop everything."""
        self._pieces.clear()
        self.items.clear()
        self.modalities.clear()

    def descendants(self, piece: Piece) -> list[Piece]:
        """A piece and all after it, each behind its own descendants: the order to drop them."""
        found, open_ = [], [piece]
        while open_:
            current = open_.pop()
            found.append(current)
            open_ += current.children
        return found[::-1]

    def check_integrity(self) -> None:
        """Raise ``AssertionError`` if the pieces are no tree, or the sums are wrong; for tests."""
        items: dict[str, int] = {}
        for piece in self._pieces:
            if (identifier := piece.content.identifier) is not None:
                _add(items, {identifier: 1})
        assert items == self.items
        assert _sum(piece.modalities for piece in self._pieces) == self.modalities
        for piece in self._pieces:
            assert piece.blocks
            assert 0 <= piece.busy <= len(piece.blocks)
            if piece.parent is not None:
                assert piece.parent in self._pieces
                assert piece in piece.parent.children
            for child in piece.children:
                assert child.parent is piece
                assert child in self._pieces


def paths(ends: Iterable[Piece]) -> set[Piece]:
    """Some pieces and all before them."""
    found: set[Piece] = set()
    for end in ends:
        above: Piece | None = end
        while above is not None and above not in found:
            found.add(above)
            above = above.parent
    return found


def merge(
    pieces: Iterable[Piece],
    block_bytes: int,
    hidden_size: int,
    sessions: Mapping[str | None, int],
) -> list[CachedMedia]:
    """Sum the pieces of each mm item up, latest use first.

    Args:
        pieces: Pieces of a tree; text does not count.
        block_bytes: Size of a KV block.
        hidden_size: Hidden size of the language model.
        sessions: Number of conversations whose prompts contain an item, by its identifier.
    """
    groups: dict[str, list[Piece]] = {}
    for piece in pieces:
        if piece.content.identifier is not None:
            groups.setdefault(piece.content.identifier, []).append(piece)
    # Of an item that was cut, the first piece stands for its place.
    firsts = {
        identifier: [piece for piece in group if piece.begins_item]
        for identifier, group in groups.items()
    }
    made = [
        CachedMedia(
            identifier=identifier,
            modality=group[0].content.modality,
            places=len(firsts[identifier]),
            blocks=sum(len(piece.blocks) for piece in group),
            bytes=sum(len(piece.blocks) for piece in group) * block_bytes,
            tokens=sum(piece.tokens for piece in group),
            modalities=_sum(piece.modalities for piece in group),
            hits=sum(piece.hits for piece in firsts[identifier]),
            last_use_s=max(piece.last_use_s for piece in group),
            cost=sum(piece.saved(hidden_size, encoded=False) for piece in group),
            sessions=sessions.get(identifier, 0),
        )
        for identifier, group in groups.items()
    ]
    return sorted(made, key=lambda media: -media.last_use_s)


def _share(piece: Piece, blocks: int) -> dict[str, int]:
    """Tokens by modality of some of a piece's blocks, as if modalities were spread evenly."""
    part = blocks / len(piece.blocks)
    quotas = {name: part * count for name, count in piece.modalities.items()}
    found = apportion(blocks * piece.block_size, quotas, piece.modalities)
    return {name: count for name, count in found.items() if count}


def _sum(counts: Iterable[Mapping[str, int]]) -> dict[str, int]:
    total: dict[str, int] = {}
    for own in counts:
        _add(total, own)
    return total


def _add(counts: dict[str, int], more: Mapping[str, int]) -> None:
    for name, count in more.items():
        counts[name] = counts.get(name, 0) + count


def _subtract(counts: dict[str, int], less: Mapping[str, int]) -> None:
    """Subtract counts, and drop those that come to 0."""
    for name, count in less.items():
        counts[name] -= count
        if not counts[name]:
            del counts[name]
