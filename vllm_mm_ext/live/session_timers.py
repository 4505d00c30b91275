"""When a session ends by itself, when the model is to speak to a silent user, and when to append
what nobody has asked about."""

from __future__ import annotations

from vllm_mm_ext.live.session_options import ServerVad, SessionLimits, TurnDetection

# Seconds in which a response to what was committed is likely to be asked for. An append meanwhile
# would only keep the response waiting.
UNASKED_S = 0.3


class SessionTimers:
    """The times of one session, in monotonic seconds.

    Args:
        limits: What the session may use.
        now: When it begins.
    """

    def __init__(self, limits: SessionLimits, now: float) -> None:
        self._limits = limits
        self._ends_at = now + limits.max_session_s
        self._last_event = now
        # When the last answer of the conversation ended, and how long the session's sound was then,
        # in milliseconds; None: somebody has spoken since, or there was none.
        self._silent_since: tuple[float, int] | None = None
        # When to append what was committed; None: it is appended, or a response was asked for.
        self._append_at: float | None = None

    def event(self, now: float) -> None:
        """Something came from the client or the engine."""
        self._last_event = now

    def response_ended(self, now: float, sound_ms: int) -> None:
        """An answer of the conversation ended; the session's sound was so long then."""
        self._silent_since = now, sound_ms

    def spoken(self) -> None:
        """The user speaks, or the model."""
        self._silent_since = None

    def committed(self, now: float) -> None:
        """Something was added to the conversation."""
        self._append_at = now + UNASKED_S

    def asked(self) -> None:
        """A response to the conversation was asked for."""
        self._append_at = None

    def unasked(self, now: float) -> bool:
        """Whether something was added that nobody has asked about; told once."""
        if self._append_at is None or now < self._append_at:
            return False
        self._append_at = None
        return True

    def over(self, now: float, *, responding: bool) -> tuple[str, str] | None:
        """Why the session is over, as a code and a message; None: it is not."""
        if now >= self._ends_at:
            seconds = self._limits.max_session_s
            return "session_expired", f"The session has lasted {seconds:g} s, its limit."
        if not responding and now >= self._last_event + self._limits.idle_timeout_s:
            seconds = self._limits.idle_timeout_s
            return "session_idle", f"Nothing has come from the client for {seconds:g} s."
        return None

    def silent_from(self, now: float, detection: TurnDetection | None) -> int | None:
        """Where in the session's sound a silence began that was too long, in milliseconds.

        It is told once. None: there is no such silence.
        """
        ends = self._silence_ends(detection)
        if ends is None or now < ends or self._silent_since is None:
            return None
        sound_ms = self._silent_since[1]
        self._silent_since = None
        return sound_ms

    def next(self, detection: TurnDetection | None, *, responding: bool) -> float:
        """When ``over``, ``silent_from`` or ``unasked`` has something to tell."""
        times = [self._ends_at]
        if not responding:
            times.append(self._last_event + self._limits.idle_timeout_s)
        if (silence_ends := self._silence_ends(detection)) is not None:
            times.append(silence_ends)
        if self._append_at is not None:
            times.append(self._append_at)
        return min(times)

    def _silence_ends(self, detection: TurnDetection | None) -> float | None:
        if self._silent_since is None or not isinstance(detection, ServerVad):
            return None
        if detection.idle_timeout_ms is None:
            return None
        return self._silent_since[0] + detection.idle_timeout_ms / 1000
