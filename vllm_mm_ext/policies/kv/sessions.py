"""Conversations: where their cached prompts end, and which of them are pinned. Pure."""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Hashable, Iterable, Iterator, Set
from dataclasses import dataclass, field
from typing import Generic, TypeVar

from blake3 import blake3

# Sessions remembered at most, and pinned ones besides. Ids come from clients, who may send a new
# one with every request.
MAX_SESSIONS = 1 << 16
# Prompts of one session at most: it may ask several things at a time.
MAX_ENDS = 16

T = TypeVar("T", bound=Hashable)


def session_key(session_id: str, cache_salt: str | None) -> str:
    """The name under which ``Sessions`` knows a session; those of two cache salts never meet.

    Args:
        session_id: As the client names the session.
        cache_salt: vLLM's field that keeps a request's prefix cache apart from others.
    """
    if not cache_salt:
        return session_id
    salted = blake3(len(cache_salt).to_bytes(8, "little"))
    salted.update(cache_salt.encode())
    salted.update(session_id.encode())
    return f"salted:{salted.hexdigest()}"


@dataclass(slots=True)
class _Session(Generic[T]):
    """One conversation: whether it is pinned, and the ends of its prompts that are cached.

    Of an end it is known when the latest prompt came that ends there.
    """

    pinned: bool = False
    ends: dict[T, float] = field(default_factory=dict)


class Sessions(Generic[T]):
    """Sessions by key, in the order of last use; ``MAX_SESSIONS`` of them, and as many pinned ones.

    A session is known by the last cached pieces of its prompts; what comes before a piece stays as
    long as the piece. Every operation is O(1) per piece that changes.
    """

    def __init__(self) -> None:
        self._live: OrderedDict[str, _Session[T]] = OrderedDict()
        self._pinned: dict[str, _Session[T]] = {}
        self._of_piece: dict[T, set[str]] = {}
        # Pinned sessions by piece, where there are any.
        self._pins: Counter[T] = Counter()

    def __contains__(self, session_id: object) -> bool:
        return session_id in self._live or session_id in self._pinned

    def __len__(self) -> int:
        return len(self._live) + len(self._pinned)

    def use(
        self, session_id: str, end: T, passed: Iterable[T] = (), came_s: float = 0.0
    ) -> T | None:
        """Note that a session's prompt reaches a piece.

        Args:
            session_id: The session.
            end: The piece.
            passed: Pieces of the prompt, where the session's prompt may have ended until now.
            came_s: When the prompt came, in seconds on any clock.

        Returns:
            Another piece, if one of the session's other prompts is forgotten that ended there.
        """
        session = self._pinned.get(session_id)
        if session is None:
            session = self._live.setdefault(session_id, _Session())
            self._live.move_to_end(session_id)
            self._forget_oldest()
        for piece in passed:
            # A later prompt may be part of this one.
            came_s = max(came_s, session.ends.get(piece, came_s))
            self._unlink(session_id, session, piece)
        self._link(session_id, session, end, came_s)
        if len(session.ends) <= MAX_ENDS:
            return None
        oldest = min(session.ends, key=session.ends.__getitem__)
        self._unlink(session_id, session, oldest)
        return oldest

    def pin(self, session_id: str) -> list[T]:
        """Keep a session's pieces, present and future, until an unpin.

        Returns:
            The pieces where the session's prompts end; and where there are too many pins, so that
            the oldest one ends, those of the session that it kept.
        """
        session = self._pinned.get(session_id)
        if session is None:
            session = self._live.pop(session_id, None) or _Session()
            self._set_pinned(session, True)
            self._pinned[session_id] = session
        ends = list(session.ends)
        if len(self._pinned) > MAX_SESSIONS:
            ends += self.unpin(next(iter(self._pinned)))
        return ends

    def unpin(self, session_id: str) -> list[T]:
        """End a pin; returns the session's ends."""
        session = self._pinned.pop(session_id, None)
        if session is None:
            return []
        self._set_pinned(session, False)
        self._live[session_id] = session
        ends = list(session.ends)
        self._forget_oldest()
        return ends

    def release(self, session_id: str) -> list[T]:
        """Forget a session, pinned or not; returns its ends."""
        session = self._pinned.pop(session_id, None) or self._live.pop(session_id, None)
        if session is None:
            return []
        ends = list(session.ends)
        self._unlink_all(session_id, session)
        return ends

    def trim(self, session_id: str) -> list[T]:
        """Forget where a session's prompts end, but for the latest; returns what is forgotten.

        A prompt has several ends where groups of layers have KV blocks of their own.
        """
        session = self._pinned.get(session_id) or self._live.get(session_id)
        if session is None:
            return []
        latest_s = max(session.ends.values(), default=0.0)
        forgotten = [end for end, came_s in session.ends.items() if came_s < latest_s]
        for end in forgotten:
            self._unlink(session_id, session, end)
        return forgotten

    def replace(self, piece: T, before: T | None) -> None:
        """Note that a piece is no longer cached; prompts that ended there end before it."""
        for session_id in list(self._of_piece.get(piece, ())):
            session = self._pinned.get(session_id) or self._live[session_id]
            came_s = session.ends[piece]
            self._unlink(session_id, session, piece)
            if before is not None:
                self._link(session_id, session, before, came_s)

    def clear_pieces(self) -> None:
        """Note that nothing is cached any more; sessions and pins go on."""
        self._of_piece.clear()
        self._pins.clear()
        for session in (*self._live.values(), *self._pinned.values()):
            session.ends.clear()

    def latest(self) -> Iterator[tuple[str, bool, list[T]]]:
        """Key, whether it is pinned, and ends of each session: pinned ones, then the last used."""
        for key, session in (*self._pinned.items(), *reversed(self._live.items())):
            yield key, session.pinned, list(session.ends)

    def ends(self, session_id: str) -> list[T]:
        """Where a session's prompts end; none if it is not known."""
        session = self._pinned.get(session_id) or self._live.get(session_id)
        return list(session.ends) if session is not None else []

    def pinned(self, piece: T) -> bool:
        """Whether the prompt of a pinned session ends in a piece."""
        return piece in self._pins

    def ending(self, piece: T) -> Set[str]:
        """Sessions whose prompts end in a piece."""
        return self._of_piece.get(piece, frozenset())

    def check_integrity(self) -> None:
        """Raise ``AssertionError`` if sessions and pieces disagree; for tests."""
        assert not set(self._live) & set(self._pinned)
        assert max(len(self._live), len(self._pinned)) <= MAX_SESSIONS
        found: dict[T, set[str]] = {}
        pins: Counter[T] = Counter()
        for session_id, session in (*self._live.items(), *self._pinned.items()):
            assert session.pinned == (session_id in self._pinned)
            assert len(session.ends) <= MAX_ENDS
            for end in session.ends:
                found.setdefault(end, set()).add(session_id)
                if session.pinned:
                    pins[end] += 1
        assert found == self._of_piece
        assert pins == self._pins

    def _forget_oldest(self) -> None:
        if len(self._live) > MAX_SESSIONS:
            self._unlink_all(*self._live.popitem(last=False))

    def _set_pinned(self, session: _Session[T], pinned: bool) -> None:
        session.pinned = pinned
        for end in session.ends:
            self._count_pin(end, 1 if pinned else -1)

    def _count_pin(self, end: T, by: int) -> None:
        self._pins[end] += by
        if not self._pins[end]:
            del self._pins[end]

    def _link(self, session_id: str, session: _Session[T], end: T, came_s: float) -> None:
        known_s = session.ends.get(end)
        session.ends[end] = came_s if known_s is None else max(known_s, came_s)
        if known_s is None:
            self._of_piece.setdefault(end, set()).add(session_id)
            if session.pinned:
                self._count_pin(end, 1)

    def _unlink(self, session_id: str, session: _Session[T], end: T) -> None:
        if end in session.ends:
            del session.ends[end]
            users = self._of_piece[end]
            users.discard(session_id)
            if not users:
                del self._of_piece[end]
            if session.pinned:
                self._count_pin(end, -1)

    def _unlink_all(self, session_id: str, session: _Session[T]) -> None:
        for end in list(session.ends):
            self._unlink(session_id, session, end)
