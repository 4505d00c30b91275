"""Sticky decisions: a video keeps its load tier and its tokens, so that follow-ups hit caches."""

from __future__ import annotations

from blake3 import blake3

from vllm_mm_ext.base.shared_state import KEY_BYTES, Decision, SharedState
from vllm_mm_ext.config.options import RequestOptions
from vllm_mm_ext.config.quality_settings import StickySettings

# A decision is noted as used again once this share of its time to live has passed: most requests
# then only read the shared state.
_TOUCH_SHARE = 1 / 16
# How many times to live a tier above 0 that belongs to no session lasts at most. A video that many
# ask about would otherwise never come back to full quality.
_MAX_LIVES = 4


class StickyDecisions:
    """Finds and keeps decisions about videos.

    A decision is kept for a video, the options it was asked with and, if the request names one, a
    session. The tier is kept for the video itself as well: a session that has no decision about a
    video yet takes over that tier, and so does a request without a session. Tokens are granted by
    what else is in a request, and so never to other sessions or to requests without one.

    Args:
        settings: The ``sticky`` section.
        state: Where decisions are kept.
    """

    def __init__(self, settings: StickySettings, state: SharedState) -> None:
        self._settings = settings
        self._state = state

    def find(
        self, session: str | None, digest: str, options: RequestOptions, now: float
    ) -> Decision | None:
        """The decision about a video that is in force; None if there is none.

        Args:
            session: Session of the request, None without one.
            digest: Digest of the video.
            options: What the request asks.
            now: Seconds on the clock of the decisions.
        """
        if not self._settings.enabled:
            return None
        for owner in dict.fromkeys((session, None)):
            key = _key(owner, digest, options)
            decision = self._in_force(key, owner, now)
            if decision is not None:
                if now - decision.used > self._settings.ttl_s * _TOUCH_SHARE:
                    self._state.keep(key, decision._replace(used=now))
                return decision
        return None

    def remember(
        self,
        session: str | None,
        digest: str,
        options: RequestOptions,
        *,
        level: int,
        tokens: int,
        now: float,
    ) -> None:
        """Keep a decision from now on; see ``find`` for the arguments.

        The tier of the video itself is left alone while it is in force, and where the session
        already had a decision: others may be in the middle of a conversation that goes by it.

        Args:
            level: Tier of the video.
            tokens: Prompt tokens that each use of the video was granted, 0 where they cannot be
                counted.
        """
        if not self._settings.enabled:
            return
        for owner in dict.fromkeys((session, None)):
            key = _key(owner, digest, options)
            earlier = self._in_force(key, owner, now)
            if earlier is None or owner == session:
                made = now if earlier is None else earlier.made
                granted = 0 if owner is None else tokens
                self._state.keep(key, Decision(level, granted, made, now))
            if earlier is not None:
                return

    def _in_force(self, key: bytes, owner: str | None, now: float) -> Decision | None:
        ttl = self._settings.ttl_s
        decision = self._state.find(key)
        if decision is None or now - decision.used > ttl:
            return None
        if owner is None and decision.level and now - decision.made > _MAX_LIVES * ttl:
            return None
        return decision


def _key(session: str | None, digest: str, options: RequestOptions) -> bytes:
    hasher = blake3()
    for part in ("" if session is None else f"s{session}", digest, options.model_dump_json()):
        raw = part.encode()
        hasher.update(len(raw).to_bytes(8, "little"))
        hasher.update(raw)
    return bytes(hasher.digest(KEY_BYTES))
