"""Keeps and drops a conversation's media on request: the engine's side and the API server's."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict
from typing import Any, Protocol

from vllm_mm_ext.base.client_ids import short_id
from vllm_mm_ext.policies.kv.pieces import CachedMedia, Piece, paths
from vllm_mm_ext.policies.kv.sessions import Sessions, session_key

# The method of vLLM's ``EngineCore`` that API processes call.
UTILITY = "mm_ext_kv"


class _Pool(Protocol):
    @property
    def sessions(self) -> Sessions[Piece]: ...
    def settle(self, pieces: Iterable[Piece]) -> None: ...
    def end(self, pieces: Iterable[Piece]) -> None: ...
    def media(self) -> list[CachedMedia]: ...


class KVControl:
    """Controls the block pool of one engine, between the engine's steps.

    Args:
        pool: The block pool.
    """

    def __init__(self, pool: _Pool) -> None:
        self._pool = pool

    def pin(self, session_id: str) -> int:
        """Give up a session's media, those cached now and later, after all others.

        The media count towards the quota, and a request that needs their memory still gets it. Of
        more than ``MAX_SESSIONS`` pins the oldest one ends.

        Args:
            session_id: Key of the session (``session_key`` of its short id); the session may have
                had no request yet.

        Returns:
            Number of mm items that the pool keeps for the session now.
        """
        sessions = self._pool.sessions
        self._pool.settle(sessions.pin(session_id))
        return _items(sessions.ends(session_id))

    def unpin(self, session_id: str) -> int:
        """End a pin. Returns the number of the session's items."""
        ends = self._pool.sessions.unpin(session_id)
        self._pool.settle(ends)
        return _items(ends)

    def release(self, session_id: str) -> int:
        """End a session; the pool stops keeping what only its prompts end with.

        Returns:
            Number of the session's items.
        """
        ends = self._pool.sessions.release(session_id)
        count = _items(ends)
        self._pool.settle(ends)
        self._pool.end(ends)
        return count

    def trim(self, session_id: str) -> int:
        """Go by a session's latest prompt alone; a pin goes on.

        The pool stops keeping what only earlier prompts end with.

        Returns:
            Number of the session's items that are left.
        """
        ends = self._pool.sessions.trim(session_id)
        self._pool.settle(ends)
        self._pool.end(ends)
        return _items(self._pool.sessions.ends(session_id))

    def media(self) -> list[CachedMedia]:
        """The media that are cached, latest use first."""
        return self._pool.media()


def _items(ends: Iterable[Piece]) -> int:
    """Number of mm items in prompts that end in some pieces."""
    return sum(piece.begins_item for piece in paths(ends))


class NoBlockPoolError(RuntimeError):
    """No KV can be kept or let go: the engine has vLLM's own block pool."""

    def __init__(self) -> None:
        super().__init__(
            "The engine keeps no KV of media: it has no vllm_mm_ext block pool (mm_ext.kv.enabled)."
        )


class KVClient:
    """``KVControl`` for API processes.

    A session is named as its requests name it, with their ``cache_salt`` if they have one. All
    methods raise ``NoBlockPoolError`` where the engine runs without the plugin's block pool.

    Args:
        engine_client: vLLM's ``AsyncLLM``.
    """

    def __init__(self, engine_client: Any) -> None:
        self._core = engine_client.engine_core

    async def pin(self, session_id: str, cache_salt: str | None = None) -> None:
        """As ``KVControl.pin``, on all engines: requests of the session may go to any engine."""
        await self.act("pin", key_of(session_id, cache_salt))

    async def unpin(self, session_id: str, cache_salt: str | None = None) -> None:
        """As ``KVControl.unpin``, on all engines."""
        await self.act("unpin", key_of(session_id, cache_salt))

    async def release(self, session_id: str, cache_salt: str | None = None) -> None:
        """As ``KVControl.release``, on all engines."""
        await self.act("release", key_of(session_id, cache_salt))

    async def trim(self, session_id: str, cache_salt: str | None = None) -> None:
        """As ``KVControl.trim``, on all engines."""
        await self.act("trim", key_of(session_id, cache_salt))

    async def act(self, action: str, key: str) -> None:
        """Do something with a session on all engines.

        Args:
            action: ``pin``, ``unpin``, ``release`` or ``trim``.
            key: Of the session, as the engines list it.
        """
        await self._call(action, key)

    async def media(self) -> list[dict[str, Any]]:
        """As ``KVControl.media``, as plain values. Of several engines the first one answers."""
        found: list[dict[str, Any]] = await self._call("media", "")
        return found

    async def _call(self, action: str, key: str) -> Any:
        answered = await self._core.call_utility_async(UTILITY, action, key)
        if answered is None:
            raise NoBlockPoolError
        return answered


def answer(control: KVControl | None, action: str, session_id: str) -> Any:
    """Carry out what ``KVClient`` asks, in the engine; None without the plugin's pool."""
    if control is None:
        return None
    if action == "media":
        return [asdict(media) for media in control.media()]
    actions = {
        "pin": control.pin,
        "unpin": control.unpin,
        "release": control.release,
        "trim": control.trim,
    }
    return actions[action](session_id)


def key_of(session_id: str, cache_salt: str | None) -> str:
    """The key under which the engines know and list a session.

    Args:
        session_id: As the client names it.
        cache_salt: As the client names it, if it does.
    """
    return session_key(short_id(session_id, "session"), cache_salt)
