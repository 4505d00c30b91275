"""Tells from speech probabilities where speech starts and stops."""

from __future__ import annotations

from dataclasses import dataclass

# Speech goes on while the probability is above the threshold less this (as Silero's own iterator).
_HYSTERESIS = 0.15
_LEAST_THRESHOLD = 0.01


@dataclass(frozen=True, slots=True)
class DetectorOptions:
    """Options of turn detection, as the protocol has them.

    Attributes:
        threshold: Probability from which on sound is speech, in 0..1.
        prefix_padding_ms: How much sound before speech counts as part of it.
        silence_duration_ms: How long a silence ends speech; None: no silence does (``end`` does).
    """

    threshold: float = 0.5
    prefix_padding_ms: int = 300
    silence_duration_ms: int | None = 500


@dataclass(frozen=True, slots=True)
class SpeechStarted:
    """Speech begins ``position`` samples into the session's sound, padding included."""

    position: int


@dataclass(frozen=True, slots=True)
class SpeechStopped:
    """Speech ends ``position`` samples into the session's sound, the silence included."""

    position: int


class TurnDetector:
    """Speech or not, window by window of one session's sound.

    Speech begins with two windows in a row at or above the threshold: single ones are clicks and
    cries. As in Silero's own iterator, a silence begins with a window below the threshold less the
    hysteresis, and ends with one at or above the threshold.

    Args:
        rate: Samples a second in which positions are counted.
        options: The session's options; they may be replaced at any time.
    """

    def __init__(self, rate: int, options: DetectorOptions) -> None:
        self._rate = rate
        self.options = options
        self.speaking = False
        self._ended = 0
        # Where the last window began, if it may be the first one of speech.
        self._candidate: int | None = None
        self._silence_start: int | None = None

    def step(
        self, start: int, end: int, probability: float
    ) -> SpeechStarted | SpeechStopped | None:
        """Take the next window; return what changed with it.

        Args:
            start: Where the window begins, in samples since the session began.
            end: Where the window ends.
            probability: That the window holds speech.
        """
        options = self.options
        if probability >= options.threshold:
            self._silence_start = None
            if self.speaking:
                return None
            first, self._candidate = self._candidate, start
            if first is None:
                return None
            self.speaking = True
            return SpeechStarted(max(self._ended, first - self._samples(options.prefix_padding_ms)))
        self._candidate = None
        if not self.speaking:
            return None
        if self._silence_start is None:
            if probability >= max(options.threshold - _HYSTERESIS, _LEAST_THRESHOLD):
                return None
            self._silence_start = start
        if options.silence_duration_ms is None:
            return None
        stop = self._silence_start + self._samples(options.silence_duration_ms)
        if end < stop:
            return None
        self.end(stop)
        return SpeechStopped(stop)

    def silence(self, position: int) -> int:
        """Samples of silence so far within speech; 0 where there is speech, or none began.

        Args:
            position: Up to where sound was judged.
        """
        return 0 if self._silence_start is None else position - self._silence_start

    def look_away(self) -> None:
        """Windows follow that are not judged: what began in the last ones counts no more."""
        self._candidate = self._silence_start = None

    def end(self, position: int) -> None:
        """Let speech end: by silence, a commit or a clear, or as the model says that a turn ended.

        Args:
            position: Where; the padding of the next speech does not reach behind it.
        """
        self.speaking = False
        self._ended = position
        self.look_away()

    def _samples(self, milliseconds: int) -> int:
        return milliseconds * self._rate // 1000
