"""What steps cost, learned from how long they took. Pure; durations are arguments."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

# Tokens after which what was measured before counts half: quick to follow a change of load, and
# a slow first call (lazy initialisation) is soon forgotten.
HALF_LIFE_TOKENS = 4096
# Weight of the newest step in averages over steps, and in what a decoded token adds to a step,
# which takes steps of different sizes to tell.
_NEWEST = 0.1
_NEWEST_OF_SLOPE = 0.01
# A step counts as at most this multiple of what it was expected to take: what held it up (another
# process, a page fault) says nothing of its work. Where prices did rise, steps soon add up to it.
_MOST_OF_EXPECTED = 2.0
# Of a token: the time that ``n`` tokens take is time for ``n``, whatever a division rounds to. A
# prompt that misses its last token pays for another step.
_ROUNDING = 1e-6
# Of a feature's own weight, so that prices of things that always occur together are shared evenly,
# and steps that are all of one size tell what tokens cost rather than what a step adds.
_RIDGE = (1e-9, 1e-9, 1e-9, 1e-3)
# What has a price: a prefill token, a pair that attends, an encoder token, and any of these at all.
_FEATURES = len(_RIDGE)


@dataclass(frozen=True, slots=True)
class StepWork:
    """What a step did.

    Attributes:
        decodes: Tokens that decoding requests computed.
        prefill_tokens: Prompt tokens computed.
        encoder_tokens: Encoder outputs computed.
        attended: Pairs of a prompt token computed and a token it attends to.
    """

    decodes: int
    prefill_tokens: int
    encoder_tokens: int
    attended: float = 0.0


def attended(tokens: int, context: int) -> float:
    """Pairs of each of ``tokens`` and those it attends to, ``context`` before them."""
    return tokens * (context + tokens / 2)


class _DecodeTimes:
    """Seconds of steps that only decode, as a line over how many tokens they decode.

    Its height follows the last steps: what a step takes changes with the load of the machine. Its
    slope is that of many more, at least 0 and at most that of a line through the origin.

    Attributes:
        slope: Seconds that another token adds.
        intercept: Seconds at no token.
    """

    def __init__(self) -> None:
        self.slope = self.intercept = 0.0
        self._steps = 0
        # Averages of decoded tokens and of seconds, over the last steps and over many.
        self._near = self._mean = (0.0, 0.0)
        self._variance = self._covariance = 0.0

    def observe(self, decodes: int, seconds: float) -> None:
        """Learn from a step."""
        self._steps += 1
        weight = max(_NEWEST, 1 / self._steps)
        near_decodes, near_seconds = self._near
        near_decodes += weight * (decodes - near_decodes)
        near_seconds += weight * (seconds - near_seconds)
        self._near = near_decodes, near_seconds
        weight = max(_NEWEST_OF_SLOPE, 1 / self._steps)
        mean_decodes, mean_seconds = self._mean
        more, longer = decodes - mean_decodes, seconds - mean_seconds
        self._mean = mean_decodes + weight * more, mean_seconds + weight * longer
        self._variance += weight * ((1 - weight) * more * more - self._variance)
        self._covariance += weight * ((1 - weight) * more * longer - self._covariance)
        if self._variance > 0.0:
            slope = max(self._covariance / self._variance, 0.0)
            self.slope = min(slope, near_seconds / near_decodes)
        self.intercept = max(0.0, near_seconds - self.slope * near_decodes)


class StepTimes:
    """Time of a step as base + prefill tokens + attention + encoder tokens, at measured prices.

    The base is the time of steps that only decode as many tokens, and what any prompt adds to it: a
    step with one has more to prepare and runs outside of the graphs captured for decoding. The
    prices are the non-negative least squares solution for what steps with prompts took beyond those
    without.
    """

    def __init__(self) -> None:
        self._decoding = _DecodeTimes()
        self._itl: float | None = None
        # Decayed sums of x xᵀ, of x y and of x d over steps: x the work that has prices, y the
        # seconds, d the decoded tokens. The base, which changes with the load of the machine, is
        # taken off when prices are asked. Plain floats: at this size that is several times as fast
        # as arrays, in the gap between two steps where nothing is in the processor's caches.
        self._works = [[0.0] * _FEATURES for _ in range(_FEATURES)]
        self._seconds = [0.0] * _FEATURES
        self._decodes = [0.0] * _FEATURES
        self._prices: tuple[float, ...] | None = None
        # Average square of how far steps that mostly encode are from what is expected, as a share.
        self._encoder_off = 0.0

    def observe(self, work: StepWork, seconds: float) -> None:
        """Learn from a finished step that took ``seconds``."""
        if work.decodes:
            self._itl = _average(self._itl, seconds)
        tokens = work.prefill_tokens + work.encoder_tokens
        if tokens:
            keep = 0.5 ** (tokens / HALF_LIFE_TOKENS)
            x = (
                float(work.prefill_tokens),
                float(work.attended),
                float(work.encoder_tokens),
                1.0,
            )
            if self._works[-1][-1] > 4:
                expected = self.base_s(work.decodes) + _dot(self._solved(), x)
                seconds = min(seconds, _MOST_OF_EXPECTED * expected)
                if 2 * work.encoder_tokens * self._solved()[2] > expected:
                    off = (seconds / expected - 1) ** 2
                    self._encoder_off = _average(self._encoder_off, off)
            self._works = [
                _decayed(row, keep, x, one) for row, one in zip(self._works, x, strict=True)
            ]
            self._seconds = _decayed(self._seconds, keep, x, seconds)
            self._decodes = _decayed(self._decodes, keep, x, work.decodes)
        elif work.decodes:
            most = _MOST_OF_EXPECTED * (self.base_s(work.decodes) or seconds)
            self._decoding.observe(work.decodes, min(seconds, most))
        self._prices = None

    def base_s(self, decodes: int, *, prompts: bool = False) -> float:
        """Seconds of a step that decodes so many tokens, 0 before there was one.

        Args:
            decodes: The tokens.
            prompts: It computes tokens of prompts as well, whose own time is not counted here.
        """
        base = self._decoding.intercept + self._decoding.slope * decodes
        return base + self._solved()[3] if prompts else base

    @property
    def itl_s(self) -> float:
        """Average seconds of steps in which something decoded, 0 before there was one."""
        return self._itl or 0.0

    @property
    def encoder_s(self) -> float | None:
        """Seconds per encoder token, None before there was any."""
        return self._solved()[2] if self._works[2][2] else None

    @property
    def encoder_spread(self) -> float:
        """How far steps that mostly encode are from what is expected: a share of it, rms.

        Encoders allocate more, and their inputs come with new requests, so that their time varies
        more than that of prefill.
        """
        return math.sqrt(self._encoder_off)

    def seconds(self, encoder_tokens: int, prefill_tokens: int, context: int = 0) -> float:
        """What work adds to a step; what is not known counts nothing.

        Args:
            encoder_tokens: Encoder outputs.
            prefill_tokens: Prompt tokens of one request.
            context: Tokens before them.
        """
        if not (encoder_tokens or prefill_tokens):
            # The usual step only decodes: prices need not be worked out for it.
            return 0.0
        prefill, attention, encoder, _ = self._solved()
        pairs = attended(prefill_tokens, context)
        return prefill_tokens * prefill + pairs * attention + encoder_tokens * encoder

    def tokens(self, seconds: float, context: int, most: int, *, encoded: bool) -> int:
        """Tokens that fit into a time, at most ``most``; all of them at an unknown price.

        Args:
            seconds: The time.
            context: Tokens before them.
            most: The bound.
            encoded: They are encoded before.
        """
        prefill, attention, encoder, _ = self._solved()
        each = prefill + (encoder if encoded else 0.0) + attention * context
        # each * n + attention * n² / 2 = seconds
        root = math.sqrt(each * each + 2 * attention * max(0.0, seconds)) + each
        if not root or 2 * max(0.0, seconds) >= root * most:
            return most
        return int(2 * max(0.0, seconds) / root + _ROUNDING)

    def _solved(self) -> tuple[float, ...]:
        """Prices of ``_FEATURES``."""
        if self._prices is None:
            slope, intercept = self._decoding.slope, self._decoding.intercept
            steps = (row[-1] for row in self._works)
            beyond = [
                seconds - slope * decodes - intercept * count
                for seconds, decodes, count in zip(self._seconds, self._decodes, steps, strict=True)
            ]
            self._prices = _non_negative(self._works, beyond)
        return self._prices


def _dot(one: Sequence[float], other: Sequence[float]) -> float:
    return sum(a * b for a, b in zip(one, other, strict=True))


def _decayed(
    sums: Sequence[float], keep: float, more: Sequence[float], weight: float
) -> list[float]:
    return [keep * before + weight * one for before, one in zip(sums, more, strict=True)]


def _non_negative(works: Sequence[Sequence[float]], seconds: Sequence[float]) -> tuple[float, ...]:
    """Prices ``[features]`` from normal equations; features that would be negative cost nothing."""
    used = [n for n in range(_FEATURES) if works[n][n] > 0.0]
    scale = [math.sqrt(works[n][n]) for n in range(_FEATURES)]
    while used:
        rows = [
            [works[n][m] / (scale[n] * scale[m]) + (_RIDGE[n] if n == m else 0.0) for m in used]
            + [seconds[n] / scale[n]]
            for n in used
        ]
        found = _solve(rows)
        least = min(found)
        if least >= 0.0:
            prices = {n: price / scale[n] for n, price in zip(used, found, strict=True)}
            return tuple(prices.get(n, 0.0) for n in range(_FEATURES))
        del used[found.index(least)]
    return (0.0,) * _FEATURES


def _solve(rows: list[list[float]]) -> list[float]:
    """Solve equations ``[*coefficients, right side]`` of a positive definite matrix, in place."""
    for n, row in enumerate(rows):
        for below in rows[n + 1 :]:
            share = below[n] / row[n]
            for m in range(n, len(row)):
                below[m] -= share * row[m]
    found = [0.0] * len(rows)
    for n in reversed(range(len(rows))):
        row = rows[n]
        found[n] = (row[-1] - _dot(row[n + 1 : -1], found[n + 1 :])) / row[n]
    return found


def _average(before: float | None, seconds: float) -> float:
    return seconds if before is None else before + _NEWEST * (seconds - before)
