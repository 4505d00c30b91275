"""A replica's KV cache, counted: the block pool's pieces and its rule of value, without blocks.

Of a conversation there are the pieces of the medium at its beginning, which conversations share,
and one of all that follows, which grows with each turn. Which of them are given up is decided by
the classes that decide it in an engine (``policies.kv``).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

from vllm_mm_ext.policies.kv.pieces import TEXT_CONTENT, Content, Piece, Tree
from vllm_mm_ext.policies.kv.retention import Retention, kind_of
from vllm_mm_ext.policies.kv.sessions import Sessions

# Of so many blocks one is given up before it is needed.
_AHEAD = 256
# Pieces of a medium at most. In an engine each segment is one: its end is given up and comes back
# apart from its beginning, which teaches how soon what was given up is wanted. Where two replicas
# take turns, 3 % less is found with one piece than in an engine, 1.5 % less with three.
_MOST_PIECES = 3


def pieces_of(head: str, tokens: int, items: int) -> tuple[tuple[bytes, int], ...]:
    """The pieces of a medium at the beginning of prompts: what each is known by, and its end.

    Args:
        head: Name of the medium.
        tokens: Its tokens.
        items: Its mm items.
    """
    count = min(items, _MOST_PIECES)
    return tuple(
        (f"{head}/{place}".encode(), tokens * (place + 1) // count) for place in range(count)
    )


class Prompt(NamedTuple):
    """A prompt.

    Attributes:
        head: Name of the medium at its beginning; "" without one.
        head_pieces: Its pieces, as of ``pieces_of``; none without one.
        tokens: All its tokens.
        output: Tokens of its answer.
        kept: Its answer is part of the conversation's later prompts.
        rest_key: What the piece of what follows is known by.
    """

    head: str
    head_pieces: tuple[tuple[bytes, int], ...]
    tokens: int
    output: int
    kept: bool
    rest_key: bytes


@dataclass(slots=True)
class Held:
    """What a request that runs holds of the cache.

    Attributes:
        number: Tells requests apart.
        prompt: The request.
        found: Tokens of the prompt that were cached.
        reserved: Blocks that are part of no piece yet.
        pieces: Those that it uses, in the order of the prompt.
    """

    number: int
    prompt: Prompt
    found: int
    reserved: int
    pieces: list[Piece]


class PromptCache:
    """The KV cache of a replica.

    Args:
        blocks: Its KV blocks.
        block_size: Tokens of a block.
        hidden_size: Of the language model.
    """

    def __init__(self, blocks: int, block_size: int, hidden_size: int) -> None:
        self.blocks = blocks
        self._size = block_size
        self._tree = Tree()
        self.retention = Retention(Sessions(), hidden_size)
        self._pieces: dict[bytes, Piece] = {}
        self._users: dict[Piece, int] = {}
        self._requests = 0
        # Blocks that hold nothing, and those of pieces that no request uses.
        self._free = blocks
        self._idle = 0

    def fits(self, prompt: Prompt) -> bool:
        """Whether a request could ever run."""
        return self._blocks_of(prompt) <= self.blocks

    def found(self, prompt: Prompt) -> int:
        """Tokens of a prompt that are cached."""
        return self._found(prompt)[0]

    def admit(self, prompt: Prompt) -> Held | None:
        """Take room for a request with its answer; None where others use too much of the cache."""
        found, pieces = self._found(prompt)
        # Another request of the conversation may have left a longer answer.
        needed = max(0, self._blocks_of(prompt) - sum(len(piece.blocks) for piece in pieces))
        held = sum(len(piece.blocks) for piece in pieces if piece not in self._users)
        if needed > self._free + self._idle - held:
            return None
        history = self.retention.history
        history.tick()
        for piece in pieces:
            history.use(piece.key)
            self._take(piece)
        if self._free < needed:
            # Some more at once, as the block pool does.
            wanted = min(needed + self.blocks // _AHEAD, self._free + self._idle)
            while self._free < wanted:
                self._give_up(wanted - self._free)
        self._free -= needed
        self._requests += 1
        return Held(self._requests, prompt, found, needed, pieces)

    def computed(self, held: Held) -> None:
        """Note that a request's prompt is computed: others find it from now on."""
        prompt, start = held.prompt, 0
        for key, end in prompt.head_pieces:
            if end > held.found:
                self._extend(held, start, key, end // self._size - start)
            start = end // self._size
        self._extend(held, start, prompt.rest_key, prompt.tokens // self._size - start)

    def release(self, held: Held) -> None:
        """Note that a request has its answer, which is cached as well."""
        prompt = held.prompt
        head = self._head_blocks(prompt)
        # Of its last token no KV is computed.
        filled = (prompt.tokens + prompt.output - 1) // self._size
        if prompt.kept:
            self._extend(held, head, prompt.rest_key, filled - head)
        else:
            begin = prompt.tokens // self._size
            self._extend(held, begin, b"answer %d" % held.number, filled - begin)
        self._free += held.reserved
        for piece in reversed(held.pieces):
            self._leave(piece)

    def check_integrity(self, running: Iterable[Held]) -> None:
        """Raise ``AssertionError`` unless all blocks are accounted for, and no piece is cached
        without all before it; for tests.

        Args:
            running: All that requests hold.
        """
        used = sum(len(piece.blocks) for piece in self._users)
        idle = sum(len(piece.blocks) for piece in self._tree if piece not in self._users)
        assert idle == self._idle
        assert self._free >= 0
        reserved = sum(held.reserved for held in running)
        assert self._free + idle + used + reserved == self.blocks
        assert len(self._tree) == len(self._pieces)
        for piece in self._tree:
            above = piece.parent
            assert piece.start <= (above.start + len(above.blocks) if above is not None else 0)

    def _blocks_of(self, prompt: Prompt) -> int:
        return -(-(prompt.tokens + prompt.output - 1) // self._size)

    def _head_blocks(self, prompt: Prompt) -> int:
        return prompt.head_pieces[-1][1] // self._size if prompt.head_pieces else 0

    def _found(self, prompt: Prompt) -> tuple[int, list[Piece]]:
        """Cached tokens of a prompt, and the pieces with them."""
        blocks, pieces = 0, list[Piece]()
        for key, end in (*prompt.head_pieces, (prompt.rest_key, 0)):
            piece = self._pieces.get(key)
            if piece is not None:
                pieces.append(piece)
                blocks += len(piece.blocks)
            if blocks < end // self._size:
                break
        # vLLM computes the last token in any case.
        return min(blocks, (prompt.tokens - 1) // self._size) * self._size, pieces

    def _take(self, piece: Piece) -> None:
        users = self._users.get(piece, 0)
        self._users[piece] = users + 1
        if not users:
            self._idle -= len(piece.blocks)
            self.retention.lift(piece)
            piece.busy = 1

    def _leave(self, piece: Piece) -> None:
        users = self._users[piece] - 1
        if users:
            self._users[piece] = users
            return
        del self._users[piece]
        piece.busy = 0
        self._idle += len(piece.blocks)
        self.retention.settle(piece)

    def _extend(self, held: Held, start: int, key: bytes, blocks: int) -> None:
        """Make blocks that a request has filled part of a piece."""
        if blocks <= 0:
            return
        piece = self._pieces.get(key)
        parent = held.pieces[-1] if start and held.pieces else None
        if piece is None:
            if not held.reserved:
                return  # No piece is empty.
            piece = self._new(held, key, start, parent)
        if piece not in held.pieces:
            if piece in self._users or len(piece.blocks):
                # Another request has computed the same meanwhile.
                self._take(piece)
            else:
                self._users[piece] = 1
                piece.busy = 1
            held.pieces.append(piece)
        more = min(blocks - len(piece.blocks), held.reserved)
        if more > 0:
            piece.blocks += [0] * more
            piece.whole = len(piece.blocks) >= blocks
            held.reserved -= more

    def _new(self, held: Held, key: bytes, start: int, parent: Piece | None) -> Piece:
        is_media = start < self._head_blocks(held.prompt)
        content = Content(held.prompt.head, "video") if is_media else TEXT_CONTENT
        piece = Piece(key, content, start, self._size, parent, str(held.number))
        # Where nothing had followed, it is the end of a conversation that goes on.
        goes_on = parent is not None and (parent.owner == piece.owner or not parent.followed)
        kind = kind_of(piece, session=True)
        self.retention.history.add(key, kind, parent.key if parent and goes_on else None)
        self._tree.add(piece)
        self._pieces[key] = piece
        return piece

    def _give_up(self, blocks: int) -> None:
        piece = self.retention.victim()
        assert piece is not None
        count = min(blocks, len(piece.blocks))
        self._free += count
        self._idle -= count
        self.retention.lift(piece)
        self._tree.cut(piece, count)
        if piece.blocks:
            piece.whole = False
            self.retention.settle(piece)
            return
        self._tree.remove(piece)
        self.retention.drop(piece)
        del self._pieces[piece.key]
        if piece.parent is not None:
            self.retention.settle(piece.parent)
