"""The live sessions of one API server."""

from __future__ import annotations

import asyncio
import logging
import os
import time
from collections.abc import Collection
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import Any
from uuid import uuid4

from vllm_mm_ext.adapters.live.connection import (
    OUR_FAULT,
    POLICY,
    TRY_LATER,
    Connection,
    close_socket,
)
from vllm_mm_ext.adapters.live.engine import EngineSession, LiveEngine, UnknownModelError
from vllm_mm_ext.adapters.live.lane import Lane
from vllm_mm_ext.adapters.live.punctuality import AppendClock, Punctuality
from vllm_mm_ext.adapters.live.senses import Senses
from vllm_mm_ext.config.live_settings import LiveSettings
from vllm_mm_ext.config.root import MIB
from vllm_mm_ext.live.effects import Close
from vllm_mm_ext.live.event_codec import write_event
from vllm_mm_ext.live.machine import SessionMachine
from vllm_mm_ext.live.server_events import error_event
from vllm_mm_ext.live.session_options import SessionLimits
from vllm_mm_ext.live.text_counts import TextCounts
from vllm_mm_ext.live.voice import VoicePool, unavailable
from vllm_mm_ext.sight.ended_sessions import EndedSessions

logger = logging.getLogger("vllm.mm_ext")

# Threads for decoding, resampling and detection; 64 sessions need about one core.
_MOST_THREADS = 4
# What a pixel takes while an image is read: 8 to 12 bytes, 18 of a WebP file. So reading one takes
# little more memory than its session may hold.
_BYTES_OF_PIXEL = 12
# Seconds between two looks whether sessions have ended.
_LOOK_S = 0.02


class LiveSessions:
    """Opens sessions for clients, within the server's bounds, and counts them.

    Args:
        engine: The engine's side.
        settings: The section ``live``.
        model: Name of the served model.
        max_pixels: Pixels of an image file at most; 0: only the size of a session bounds them.
    """

    def __init__(
        self, engine: LiveEngine, settings: LiveSettings, model: str, max_pixels: int
    ) -> None:
        self._engine = engine
        self._settings = settings
        self._model = model
        self._max_pixels = max_pixels
        self._no_voice = unavailable()
        self._voices = VoicePool(settings.max_sessions)
        self._threads = ThreadPoolExecutor(
            min(_MOST_THREADS, os.cpu_count() or 1), thread_name_prefix="mm-ext-live"
        )
        self._punctuality = Punctuality()
        self._sessions = self._opened = self._refused = 0
        self._open: dict[str, tuple[Connection, EngineSession]] = {}
        self._ended = EndedSessions()

    def stats(self) -> dict[str, int | float]:
        """Counters for ``GET /mm_ext/stats``."""
        return {
            "sessions": self._sessions,
            "opened": self._opened,
            "closed": self._opened - self._sessions,
            "refused": self._refused,
            "units": self._punctuality.appends,
            "late_units": self._punctuality.late,
            "worst_late_s": round(self._punctuality.worst_s, 3),
            "computed_tokens": self._punctuality.computed,
            "pinned": self._engine.pinned,
        }

    def listing(self) -> list[dict[str, Any]]:
        """The sessions, the first one first."""
        return [{"id": key, **connection.facts()} for key, (connection, _) in self._open.items()]

    def end(self, session_id: str, reason: str) -> bool:
        """End a session; False if there is none of that id.

        Args:
            session_id: As ``listing`` has it.
            reason: What its client is told.
        """
        if session_id not in self._open:
            return False
        connection, _ = self._open[session_id]
        connection.end(reason)
        return True

    # What takedowns ask.

    def end_holding(self, digests: Collection[str], reason: str) -> list[str]:
        """End the sessions whose client sent one of these files; returns their ids.

        Args:
            digests: Of the files.
            reason: As of ``end``.
        """
        found = [key for key, (connection, _) in self._open.items() if connection.holds(digests)]
        for session_id in found:
            self.end(session_id, reason)
        return found

    async def left(self, session_ids: Collection[str], deadline: float) -> int:
        """Wait until sessions have ended and let go of all they hold.

        Args:
            session_ids: As ``listing`` has them.
            deadline: Value of ``time.monotonic()`` until which it waits.

        Returns:
            Number of the sessions that have not ended by then.
        """
        while left := self._open.keys() & session_ids:
            if time.monotonic() > deadline:
                break
            await asyncio.sleep(_LOOK_S)
        return len(left)

    def hashes_of(self, digests: Collection[str]) -> set[str]:
        """vLLM's hashes of the mm items of sessions whose client sent one of these files.

        Sessions that have ended are among them.
        """
        sessions = (engine for one, engine in self._open.values() if one.holds(digests))
        return self._ended.hashes_of(digests).union(*(engine.hashes for engine in sessions))

    def forget(self, digests: Collection[str], before: float) -> None:
        """Forget what became of some files: as ``EndedSessions.forget``."""
        self._ended.forget(digests, before)

    async def serve(self, websocket: Any, model: str | None) -> None:
        """Hold one session, to its end.

        Args:
            websocket: Starlette's, accepted.
            model: As the client names it; None: the served model.
        """
        if self._sessions >= self._settings.max_sessions:
            self._refused += 1
            message = (
                f"This server holds {self._sessions} live sessions already "
                "(mm_ext.live.max_sessions). Try again later."
            )
            await _refuse(websocket, TRY_LATER, "too_many_sessions", message)
            return
        self._sessions += 1
        self._opened += 1
        try:
            await self._serve(websocket, model)
        finally:
            self._sessions -= 1

    async def _serve(self, websocket: Any, model: str | None) -> None:
        session_id = f"sess_{uuid4().hex}"
        connection = self._connection(websocket, session_id, model or self._model)
        try:
            session = await self._engine.open(session_id, connection, model=model)
        except UnknownModelError as error:
            await _refuse(websocket, POLICY, "model_not_found", str(error))
        except Exception:
            logger.exception("A live session could not be opened")
            await _refuse(websocket, OUR_FAULT, "internal_error", "The server failed.")
        else:
            self._open[session_id] = connection, session
            try:
                await connection.run(session)
            finally:
                del self._open[session_id]
                self._ended.add(connection.files, session.hashes)

    def _connection(self, websocket: Any, session_id: str, model: str) -> Connection:
        settings, traits = self._settings, self._engine.traits
        context = self._engine.context_tokens
        fits = max(1, context - settings.answer_tokens)
        limits = SessionLimits(
            prompt_tokens=min(settings.max_tokens or fits, fits),
            context_tokens=context,
            answer_tokens=settings.answer_tokens,
            keep_frames=settings.keep_frames,
            max_bytes=settings.session_mb * MIB,
            idle_timeout_s=settings.idle_timeout_s,
            max_session_s=settings.max_session_s,
            no_voice=self._no_voice,
        )
        counts = TextCounts(self._engine.measure, limits.prompt_tokens)
        machine = SessionMachine(
            session_id,
            model,
            traits,
            limits,
            counts.measure,
            asyncio.get_running_loop().time(),
            int(time.time() + settings.max_session_s),
        )
        most = limits.max_bytes // _BYTES_OF_PIXEL
        pixels = min(self._max_pixels, most) if self._max_pixels else most
        lane = Lane(self._threads)
        senses = Senses(traits, machine.options, self._voices, lane, pixels, limits.max_bytes)
        clock = AppendClock(self._punctuality, traits.unit_s)
        return Connection(websocket, machine, senses, clock, counts)


async def _refuse(websocket: Any, close_code: int, code: str, message: str) -> None:
    """Tell a client why it gets no session, and close its socket."""
    with suppress(Exception):  # The client may have gone.
        kind = "invalid_request_error" if close_code == POLICY else "server_error"
        await websocket.send_text(write_event(error_event(message, error_type=kind, code=code)))
        await close_socket(websocket, Close(close_code, message))
