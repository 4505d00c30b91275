"""What steps cost, learned from how long they took. Pure; durations are arguments."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

# Tokens after which what was measured before counts half: quick to follow a change of load, and
# a slow first call (lazy initialisation) is soon forgotten.
HALF_LIFE_TOKENS = 4096
# Weight of the newest step in averages over steps.
_NEWEST = 0.1
# A step counts as at most this multiple of what it was expected to take: what held it up (another
# process, a page fault) says nothing of its work. Where prices did rise, steps soon add up to it.
_MOST_OF_EXPECTED = 2.0
# Of a token: the time that ``n`` tokens take is time for ``n``, whatever a division rounds to. A
# prompt that misses its last token pays for another step.
_ROUNDING = 1e-6
# Of a feature's own weight, so that prices of things that always occur together are shared evenly,
# and steps that are all of one size tell what tokens cost rather than what a step adds.
_RIDGE = np.array((1e-9, 1e-9, 1e-9, 1e-3))
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

    It follows the last steps: what a step takes changes with the load of the machine. Its slope is
    at least 0 and at most that of a line through the origin.

    Attributes:
        slope: Seconds that another token adds.
        intercept: Seconds at no token.
    """

    def __init__(self) -> None:
        self.slope = self.intercept = 0.0
        self._steps = 0
        # Averages of decoded tokens and of seconds.
        self._mean = (0.0, 0.0)
        self._variance = self._covariance = 0.0

    def observe(self, decodes: int, seconds: float) -> None:
        """Learn from a step."""
        self._steps += 1
        weight = max(_NEWEST, 1 / self._steps)
        before, took = self._mean
        more, longer = decodes - before, seconds - took
        mean_decodes, mean_seconds = before + weight * more, took + weight * longer
        self._mean = mean_decodes, mean_seconds
        self._variance += weight * ((1 - weight) * more * more - self._variance)
        self._covariance += weight * ((1 - weight) * more * longer - self._covariance)
        # Steps of one size tell no slope.
        if self._variance > 1e-9:
            slope = max(self._covariance / self._variance, 0.0)
            self.slope = min(slope, mean_seconds / mean_decodes)
        self.intercept = max(0.0, mean_seconds - self.slope * mean_decodes)


class StepTimes:
    """Time of a step as base + prefill tokens + attention + encoder tokens, at measured prices.

    The base is the time of steps that only decode as many tokens, and what any prompt adds to it: a
    step with one has more to prepare and runs outside of the graphs captured for decoding. The
    prices are the non-negative least squares solution for what steps with prompts took beyond those
    without.

    Attributes:
        itl_s: Average seconds of steps in which something decoded, 0 before there was one.
    """

    def __init__(self) -> None:
        self._decoding = _DecodeTimes()
        self.itl_s = 0.0
        # Decayed sums over steps of the products of what each held and took: the work that has
        # prices, the decoded tokens, the seconds. The base, which changes with the load of the
        # machine, is taken off when prices are asked.
        self._sums = [[0.0] * (_FEATURES + 2) for _ in range(_FEATURES)]
        self._prices: tuple[float, ...] | None = None
        # Average square of how far steps that mostly encode are from what is expected, as a share.
        self._encoder_off = 0.0

    def observe(self, work: StepWork, seconds: float) -> None:
        """Learn from a finished step that took ``seconds``."""
        if work.decodes:
            self.itl_s += (_NEWEST if self.itl_s else 1.0) * (seconds - self.itl_s)
        tokens = work.prefill_tokens + work.encoder_tokens
        if tokens:
            keep = 0.5 ** (tokens / HALF_LIFE_TOKENS)
            x = (float(work.prefill_tokens), work.attended, float(work.encoder_tokens), 1.0)
            if self._sums[-1][_FEATURES - 1] > 4:
                prices = self._solved()
                costs = (price * count for price, count in zip(prices, x, strict=True))
                expected = self.base_s(work.decodes) + sum(costs)
                seconds = min(seconds, _MOST_OF_EXPECTED * expected)
                if 2 * work.encoder_tokens * prices[2] > expected:
                    off = (seconds / expected - 1) ** 2
                    self._encoder_off += _NEWEST * (off - self._encoder_off)
            held = (*x, float(work.decodes), seconds)
            self._sums = [
                [keep * before + one * other for before, other in zip(row, held, strict=True)]
                for row, one in zip(self._sums, x, strict=True)
            ]
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
    def knows_encoder(self) -> bool:
        """Whether there was a step that encoded something."""
        return self._sums[2][2] > 0.0

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

    def tokens(self, seconds: float, context: int, most: int) -> int:
        """Tokens that fit into a time, at most ``most``; all of them at an unknown price.

        Args:
            seconds: The time.
            context: Tokens before them.
            most: The bound.
        """
        prefill, attention, *_ = self._solved()
        each = prefill + attention * context
        # each * n + attention * n² / 2 = seconds
        root = math.sqrt(each * each + 2 * attention * max(0.0, seconds)) + each
        if not root or 2 * max(0.0, seconds) >= root * most:
            return most
        return int(2 * max(0.0, seconds) / root + _ROUNDING)

    def _solved(self) -> tuple[float, ...]:
        """Prices of ``_FEATURES``; those that would be negative are 0."""
        if self._prices is None:
            works = np.array(self._sums)
            line = (self._decoding.intercept, self._decoding.slope)
            beyond = works[:, -1] - works[:, -3] * line[0] - works[:, -2] * line[1]
            works = works[:, :_FEATURES]
            scale = np.sqrt(works.diagonal())
            used = [n for n in range(_FEATURES) if scale[n] > 0.0]
            prices = np.zeros(_FEATURES)
            while used:
                among = np.ix_(used, used)
                scaled = works[among] / np.outer(scale[used], scale[used]) + np.diag(_RIDGE[used])
                found = np.linalg.solve(scaled, beyond[used] / scale[used])
                if found.min() >= 0.0:
                    prices[used] = found / scale[used]
                    break
                del used[int(found.argmin())]
            self._prices = tuple(prices.tolist())
        return self._prices
