"""One clock for the sound and the frames of a session."""

from __future__ import annotations

# Sound that is not followed by more for this long has ended; frames go on without it.
_PAUSE_S = 2.0
#: Frames whose times jump by more than this are placed by their arrival.
JUMP_S = 30.0


class SessionClock:
    """Follows the sound's own count of samples where there is sound, else the time that passes.

    So sound that a client sends late, or faster than real time, stays as long as it is. The clock
    does not go back.

    Args:
        rate: Samples of sound a second.
        now: When the session begins, in monotonic seconds.
    """

    def __init__(self, rate: int, now: float) -> None:
        self._rate = rate
        self._start = now
        self._received = 0
        self._offset = 0.0
        self._heard_at: float | None = None
        self._last_frame = 0.0
        # Of the client's times of frames, and the last of them; None before the first one.
        self._client_offset: float | None = None
        self._client_s = 0.0

    def of_sample(self, position: int) -> float:
        """The time of a sample of what sounds, or sounded last, in seconds.

        Args:
            position: Samples since the session's sound began.
        """
        return position / self._rate + self._offset

    def sounds(self, now: float) -> bool:
        """Whether sound is coming in.

        Args:
            now: Monotonic seconds.
        """
        return self._heard_at is not None and now - self._heard_at <= _PAUSE_S

    def hear(self, received: int, now: float) -> None:
        """Sound came in.

        Args:
            received: Samples that the client has sent since the session began.
            now: Monotonic seconds.
        """
        if received == self._received:
            return
        if self._heard_at is None or (not self.sounds(now) and self._last_frame > self.sound_end):
            # Time went on without sound.
            begin = self.time(now) - (received - self._received) / self._rate
            begin = max(begin, self._last_frame, self.sound_end)
            self._offset = begin - self._received / self._rate
        self._received = received
        self._heard_at = now

    def place(self, time_s: float | None, now: float) -> float:
        """When a frame was taken, in seconds; no earlier than the last one.

        Args:
            time_s: When the client says that it was, on the client's clock; None: now.
            now: Monotonic seconds.
        """
        here = self.time(now)
        if time_s is None:
            place = here
        else:
            # The client's clock goes back only where it begins anew: the watcher sees to that.
            if self._client_offset is None or time_s < self._client_s:
                self._client_offset = here - time_s
            self._client_s = time_s
            ahead = time_s + self._client_offset - here
            # A microphone's clock, or lost sound, can leave the sound more and more behind.
            if ahead > (_PAUSE_S if self.sounds(now) else JUMP_S) or ahead < -JUMP_S:
                self._client_offset = here - time_s
            place = time_s + self._client_offset
        self._last_frame = max(self._last_frame, place)
        return self._last_frame

    def forget_client(self) -> None:
        """The client's clock of frames may begin anew."""
        self._client_offset = None

    def time(self, now: float) -> float:
        """The present time of the session in seconds.

        Args:
            now: Monotonic seconds.
        """
        if self._heard_at is None:
            time = now - self._start
        else:
            time = self.sound_end + now - self._heard_at
        return time if self.sounds(now) else max(time, self._last_frame)

    def when(self, time_s: float) -> float:
        """When it will be that time if no sound comes, in monotonic seconds.

        Args:
            time_s: Seconds of the session.
        """
        if self._heard_at is None:
            return self._start + time_s
        return self._heard_at + time_s - self.sound_end

    @property
    def sound_end(self) -> float:
        """The time up to which sound came in, in seconds."""
        return self.of_sample(self._received)
