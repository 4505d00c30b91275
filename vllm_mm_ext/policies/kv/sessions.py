"""Conversations that are alive or pinned, whose media the pool gives up last. Pure."""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field
from enum import IntEnum

from blake3 import blake3

# Sessions remembered at most. Ids come from clients, who may send a new one with every request.
MAX_SESSIONS = 1 << 16
# Sessions that a use drops at most: more than it adds, so that they get fewer without a long halt.
_DROPS_PER_USE = 2


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


class Protection(IntEnum):
    """How an item is protected; items of a lower value are given up first."""

    NONE = 0
    SESSION = 1
    PINNED = 2


@dataclass(slots=True)
class Session:
    """One conversation.

    Attributes:
        last_use_s: When the session last had a request, in seconds on the clock of ``Sessions``.
        pinned: Whether the session is kept until it is unpinned or released.
        items: Numbers of the session's cached items.
    """

    last_use_s: float
    pinned: bool = False
    items: set[int] = field(default_factory=set)


@dataclass(slots=True)
class _Users:
    """Sessions that use one item; ``pinned`` counts the pinned ones among them."""

    ids: set[str] = field(default_factory=set)
    pinned: int = 0


class Sessions:
    """Sessions by key, in the order of last use; ``MAX_SESSIONS`` of them besides pinned ones.

    What protects an item is told in O(1); the rest is O(1) per session and item that changes.

    Args:
        ttl_s: Seconds after its last use for which a session protects its items; 0: never.
        clock: Seconds, never going back.
    """

    def __init__(self, ttl_s: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._ttl_s = ttl_s
        self._clock = clock
        self._live: OrderedDict[str, Session] = OrderedDict()
        self._pinned: dict[str, Session] = {}
        self._of_item: dict[int, _Users] = {}

    def __contains__(self, session_id: object) -> bool:
        return session_id in self._live or session_id in self._pinned

    def __len__(self) -> int:
        return len(self._live) + len(self._pinned)

    def now(self) -> float:
        """The clock, in seconds."""
        return self._clock()

    def use(self, session_id: str, item: int) -> set[int]:
        """Note that a request of a session uses an item, and drop a few sessions that are over.

        Returns:
            Items that may have lost protection because of the dropped sessions.
        """
        session = self._pinned.get(session_id)
        if session is None:
            if self._ttl_s <= 0:
                return set()
            session = self._live.setdefault(session_id, Session(0.0))
            self._live.move_to_end(session_id)
        session.last_use_s = self._clock()
        if item not in session.items:
            session.items.add(item)
            users = self._of_item.setdefault(item, _Users())
            users.ids.add(session_id)
            users.pinned += session.pinned
        return self.expire(_DROPS_PER_USE)

    def pin(self, session_id: str) -> set[int]:
        """Keep a session's items, present and future, until an unpin; returns the present items."""
        session = self._pinned.get(session_id)
        if session is None:
            session = self._live.pop(session_id, None) or Session(self._clock())
            session.pinned = True
            self._pinned[session_id] = session
            for item in session.items:
                self._of_item[item].pinned += 1
        return set(session.items)

    def unpin(self, session_id: str) -> set[int]:
        """End a pin; the TTL counts from now. Returns the session's items."""
        session = self._pinned.pop(session_id, None)
        if session is None:
            return set()
        if self._ttl_s <= 0:
            return self._dropped(session_id, session)
        session.pinned = False
        for item in session.items:
            self._of_item[item].pinned -= 1
        session.last_use_s = self._clock()
        self._live[session_id] = session
        return set(session.items)

    def release(self, session_id: str) -> set[int]:
        """Forget a session, pinned or not; returns the items that the session used."""
        session = self._pinned.pop(session_id, None) or self._live.pop(session_id, None)
        return self._dropped(session_id, session) if session is not None else set()

    def expire(self, most: int = MAX_SESSIONS) -> set[int]:
        """Forget sessions past their TTL, and the oldest where there are too many.

        Args:
            most: Sessions to forget at most.

        Returns:
            Items that may have lost protection.
        """
        items: set[int] = set()
        now = self._clock()
        for _ in range(min(most, len(self._live))):
            session_id, session = next(iter(self._live.items()))
            if session.last_use_s + self._ttl_s > now and len(self._live) <= MAX_SESSIONS:
                break
            del self._live[session_id]
            items |= self._dropped(session_id, session)
        return items

    def forget_item(self, item: int) -> None:
        """Note that an item is no longer cached; its sessions go on."""
        users = self._of_item.pop(item, None)
        for session_id in users.ids if users is not None else ():
            self._session(session_id).items.discard(item)

    def clear_items(self) -> None:
        """Note that nothing is cached any more; sessions and pins go on."""
        self._of_item.clear()
        for session in (*self._live.values(), *self._pinned.values()):
            session.items.clear()

    def protection(self, item: int) -> Protection:
        """How the sessions that use an item protect it."""
        users = self._of_item.get(item)
        if users is None:
            return Protection.NONE
        return Protection.PINNED if users.pinned else Protection.SESSION

    def protected(self, item: int) -> bool:
        """Whether any session protects an item."""
        return item in self._of_item

    def ids(self, item: int) -> tuple[str, ...]:
        """Sessions that use an item."""
        users = self._of_item.get(item)
        return tuple(sorted(users.ids)) if users is not None else ()

    def items(self, session_id: str) -> set[int]:
        """Items of a session; none for an unknown session."""
        return set(self._session(session_id).items) if session_id in self else set()

    def check_integrity(self) -> None:
        """Raise ``AssertionError`` if sessions and items disagree; for tests."""
        assert not set(self._live) & set(self._pinned)
        uses = [session.last_use_s for session in self._live.values()]
        assert uses == sorted(uses)
        found: dict[int, _Users] = {}
        for session_id, session in (*self._live.items(), *self._pinned.items()):
            assert session.pinned == (session_id in self._pinned)
            for item in session.items:
                users = found.setdefault(item, _Users())
                users.ids.add(session_id)
                users.pinned += session.pinned
        assert found == self._of_item

    def _session(self, session_id: str) -> Session:
        return self._pinned.get(session_id) or self._live[session_id]

    def _dropped(self, session_id: str, session: Session) -> set[int]:
        for item in session.items:
            users = self._of_item[item]
            users.ids.discard(session_id)
            users.pinned -= session.pinned
            if not users.ids:
                del self._of_item[item]
        return session.items
