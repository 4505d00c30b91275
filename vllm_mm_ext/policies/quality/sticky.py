"""Standing decisions: a video keeps its tier and its tokens, so that follow-ups hit caches."""

from __future__ import annotations

from dataclasses import replace

from blake3 import blake3

from vllm_mm_ext.config.options import RequestOptions
from vllm_mm_ext.config.quality_settings import StickySettings
from vllm_mm_ext.policies.quality.board import KEY_BYTES, Board, Decision

# A decision is noted as used again once this share of its time to live has passed: most requests
# then only read the board.
_TOUCH_SHARE = 1 / 16
# How often a lowered decision that belongs to no session may outlive its time to live. A video that
# many ask about would otherwise never come back to full quality.
_MAX_LIVES = 4


class Stickiness:
    """Looks up and keeps decisions about videos.

    A decision belongs to a video, the options it was asked with and, if the request names one, a
    session. A session that has none for a video yet takes over what stands for the video itself: so
    do follow-ups whose client names no session, and others who ask about the same video.

    Args:
        settings: The ``sticky`` section.
        board: Where decisions are kept.
    """

    def __init__(self, settings: StickySettings, board: Board) -> None:
        self._settings = settings
        self._board = board

    def find(
        self, session: str | None, digest: str, options: RequestOptions, now: float
    ) -> Decision | None:
        """What stands for a video.

        Args:
            session: Session of the request, None without one.
            digest: Digest of the video.
            options: What the request asks.
            now: Seconds on the board's clock.
        """
        if not self._settings.enabled:
            return None
        for owner in dict.fromkeys((session, None)):
            key = _key(owner, digest, options)
            decision = self._board.find(key)
            if decision is not None and self._stands(decision, owner, now):
                if now - decision.used > self._settings.ttl_s * _TOUCH_SHARE:
                    self._board.keep(key, replace(decision, used=now))
                # What stands for the video itself was made beside other text.
                return decision if owner is not None else replace(decision, tokens=0)
        return None

    def remember(
        self,
        session: str | None,
        digest: str,
        options: RequestOptions,
        *,
        level: int,
        lowered: bool,
        tokens: int,
        now: float,
    ) -> None:
        """Let a decision stand from now on; see ``find`` for the arguments.

        What stands for the video itself is left alone where it still does, and where the session
        already had a decision: others may be in the middle of a conversation that goes by it.

        Args:
            level: Tier of the video.
            lowered: Something is lower than asked.
            tokens: Prompt tokens each use of it was given, 0 where they cannot be counted.
        """
        if not self._settings.enabled:
            return
        for owner in dict.fromkeys((session, None)):
            key = _key(owner, digest, options)
            earlier = self._board.find(key)
            standing = earlier is not None and self._stands(earlier, owner, now)
            if not standing or owner == session:
                made = earlier.made if earlier is not None and standing else now
                granted = 0 if owner is None else tokens
                self._board.keep(key, Decision(level, lowered, granted, made, now))
            if standing:
                return

    def _stands(self, decision: Decision, owner: str | None, now: float) -> bool:
        ttl = self._settings.ttl_s
        if now - decision.used > ttl:
            return False
        return owner is not None or not decision.lowered or now - decision.made <= _MAX_LIVES * ttl


def _key(session: str | None, digest: str, options: RequestOptions) -> bytes:
    hasher = blake3()
    for part in ("" if session is None else f"s{session}", digest, options.model_dump_json()):
        raw = part.encode()
        hasher.update(len(raw).to_bytes(8, "little"))
        hasher.update(raw)
    return bytes(hasher.digest(KEY_BYTES))
