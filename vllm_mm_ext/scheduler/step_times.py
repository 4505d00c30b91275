"""What steps cost, learned from how long they took. Pure; durations are arguments."""

from __future__ import annotations

from dataclasses import dataclass

# Tokens after which what was measured before counts half: quick to follow a change of load, and
# a slow first call (lazy initialisation) is soon forgotten.
HALF_LIFE_TOKENS = 4096
# Weight of the newest step in averages over steps.
_NEWEST = 0.1


@dataclass(frozen=True, slots=True)
class StepWork:
    """What a step did.

    Attributes:
        decodes: Requests that decoded.
        prefill_tokens: Prompt tokens computed.
        encoder_tokens: Encoder outputs computed.
    """

    decodes: int
    prefill_tokens: int
    encoder_tokens: int


class _PerToken:
    """Seconds per token above what is known otherwise: a ratio of decayed sums."""

    def __init__(self) -> None:
        self._seconds = 0.0
        self._tokens = 0.0
        self._steps = 0.0
        self._prefilled = 0.0

    def add(self, seconds: float, tokens: int, prefilled: int) -> None:
        keep = 0.5 ** (tokens / HALF_LIFE_TOKENS)
        self._seconds = keep * self._seconds + seconds
        self._tokens = keep * self._tokens + tokens
        self._steps = keep * self._steps + 1
        self._prefilled = keep * self._prefilled + prefilled

    def seconds(self, step_s: float, prefill_s: float) -> float | None:
        if not self._tokens:
            return None
        rest = self._seconds - self._steps * step_s - self._prefilled * prefill_s
        return max(0.0, rest) / self._tokens


class StepTimes:
    """Time of a step as base + prefill tokens + encoder tokens, each at a measured price.

    The base is the time of steps that only decode, prefill's price comes from steps without
    encoder work, the encoder's from what is left of the others. Each is known before the next one
    is derived, which stays sound when two of them always occur together.
    """

    def __init__(self) -> None:
        self._base: float | None = None
        self._itl: float | None = None
        self._prefill = _PerToken()
        self._encoder = _PerToken()

    def observe(self, work: StepWork, seconds: float) -> None:
        """Learn from a finished step that took ``seconds``."""
        if work.decodes:
            self._itl = _average(self._itl, seconds)
        if work.encoder_tokens:
            self._encoder.add(seconds, work.encoder_tokens, work.prefill_tokens)
        elif work.prefill_tokens:
            self._prefill.add(seconds, work.prefill_tokens, 0)
        elif work.decodes:
            self._base = _average(self._base, seconds)

    @property
    def base_s(self) -> float:
        """Seconds of a step that only decodes, 0 before there was one."""
        return self._base or 0.0

    @property
    def itl_s(self) -> float:
        """Average seconds of steps in which something decoded, 0 before there was one."""
        return self._itl or 0.0

    @property
    def prefill_s(self) -> float | None:
        """Seconds per prompt token, None before there was any."""
        return self._prefill.seconds(self.base_s, 0.0)

    @property
    def encoder_s(self) -> float | None:
        """Seconds per encoder token, None before there was any."""
        return self._encoder.seconds(self.base_s, self.prefill_s or 0.0)


def _average(before: float | None, seconds: float) -> float:
    return seconds if before is None else before + _NEWEST * (seconds - before)
