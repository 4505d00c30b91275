"""Tells which cached piece of a prompt the pool gives up first: one rule of value. Pure.

The value of a piece is what finding it saves (prefill, and encoding where no encoder tier holds the
item's output), per block, times the rate at which pieces like it have come back: of its kind, used
as often, and as long ago (``policies.eviction``). A piece of a conversation that goes on counts as
used as often as the conversation has had turns.

The piece of the lowest value goes first, from its end, and only after all pieces that follow it in
prompts: without what comes before it no request finds a piece. Of a conversation the end goes first
so, and then what is before, as all of it was used as often and at the same time. Pinned pieces go
last.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from vllm_mm_ext.policies.eviction.reuse_history import ReuseHistory
from vllm_mm_ext.policies.eviction.sampled_worst import SampledWorst
from vllm_mm_ext.policies.kv.pieces import Piece
from vllm_mm_ext.policies.kv.sessions import Sessions

# Text, and media with the text after them, each without and with a session: how often such pieces
# come back, relative to each other, as far as is known beforehand. Most text is asked once.
LEVELS = (0.2, 0.2, 1.0, 1.0)

# Pieces that are ranked at a time, as a step of the scheduler waits for them: half of the usual,
# with which the replayed traffic loses nothing (``vllm-mm bench kv-replay``).
_DRAWN = 32


def kind_of(piece: Piece, *, session: bool) -> int:
    """Kind of traffic of a piece.

    Args:
        piece: The piece.
        session: Whether the request names its conversation.
    """
    return 2 * piece.with_media + session


@dataclass
class Idle:
    """What the pool keeps of media, and text after media, that no request uses."""

    items: int = 0
    blocks: int = 0


class Retention:
    """The order in which idle pieces are given up. Every operation takes constant time on average.

    Args:
        sessions: Conversations, of which some are pinned.
        hidden_size: Hidden size of the language model.
        encoded: Tells of an mm item whether the encoder's output for it is there.
    """

    def __init__(
        self,
        sessions: Sessions[Piece],
        hidden_size: int,
        encoded: Callable[[str], bool] = lambda _: False,
    ) -> None:
        self.encoded = encoded
        self._sessions = sessions
        self._hidden_size = hidden_size
        self._random = random.Random(0)
        self.clear()

    def clear(self) -> None:
        """Forget all pieces and their uses."""
        self.history: ReuseHistory[bytes] = ReuseHistory(levels=LEVELS)
        self.idle = Idle()
        self._idle: set[Piece] = set()
        # Idle pieces that no other one follows: by whether they are pinned and have media.
        self._candidates = {
            (pinned, media): SampledWorst(self._rank, self._random, _DRAWN)
            for pinned in (False, True)
            for media in (False, True)
        }
        self._place: dict[Piece, SampledWorst[Piece]] = {}
        # What they save per block, with and without the encoder's work.
        self._saved: dict[Piece, tuple[float, float]] = {}

    def settle(self, piece: Piece) -> None:
        """Place a piece anew: its use, its blocks, what follows it or its sessions changed."""
        self._withdraw(piece)
        if not piece.idle:
            self._count(piece, -1)
            return
        self._count(piece, 1)
        if not piece.children:
            place = self._candidates[self._sessions.pinned(piece), piece.with_media]
            place.add(piece)
            self._place[piece] = place
            size, hidden = len(piece.blocks), self._hidden_size
            self._saved[piece] = (
                piece.saved(hidden, encoded=False) / size,
                piece.saved(hidden, encoded=True) / size,
            )

    def lift(self, piece: Piece) -> None:
        """Take a piece out of the order, until it is placed anew."""
        self._withdraw(piece)
        self._count(piece, -1)

    def drop(self, piece: Piece) -> None:
        """Note that a piece is given up; its uses stay known in case it comes back."""
        self.lift(piece)
        self.history.evict(piece.key)

    def victim(self, *, media: bool = False) -> Piece | None:
        """The piece to give up next; None if there is none. It stays until it is dropped.

        Args:
            media: Only media and what follows media.
        """
        for pinned in (False, True):
            found = [
                piece
                for with_media in ((True,) if media else (False, True))
                if (piece := self._candidates[pinned, with_media].worst()) is not None
            ]
            if found:
                return min(found, key=self._rank)
        return None

    def check_integrity(self, pieces: Iterable[Piece]) -> None:
        """Raise ``AssertionError`` unless exactly the pieces that may go are candidates."""
        known = list(pieces)
        idle = {piece for piece in known if piece.idle}
        assert idle == self._idle
        media = [piece for piece in idle if piece.with_media]
        assert self.idle == Idle(len(media), sum(len(piece.blocks) for piece in media))
        assert {piece for piece in idle if not piece.children} == self._place.keys()
        for piece, place in self._place.items():
            assert piece in place
            assert place is self._candidates[self._sessions.pinned(piece), piece.with_media]
        assert sum(len(some) for some in self._candidates.values()) == len(self._place)
        for candidates in self._candidates.values():
            candidates.check_integrity()
        self.history.check_integrity()
        assert len(self.history) == len(known)
        assert all(piece.key in self.history for piece in known)

    def _count(self, piece: Piece, by: int) -> None:
        if (piece in self._idle) == (by > 0):
            return
        (self._idle.add if by > 0 else self._idle.discard)(piece)
        if piece.with_media:
            self.idle.items += by
            self.idle.blocks += by * len(piece.blocks)

    def _withdraw(self, piece: Piece) -> None:
        place = self._place.pop(piece, None)
        if place is not None:
            place.remove(piece)
            del self._saved[piece]

    def _rank(self, piece: Piece) -> float:
        identifier = piece.content.identifier
        saved = self._saved[piece][identifier is not None and self.encoded(identifier)]
        return saved * self.history.rate(piece.key)
