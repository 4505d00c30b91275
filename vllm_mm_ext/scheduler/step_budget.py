"""How much encoder and prefill work a step may hold. Pure."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from vllm_mm_ext.scheduler.settings import SchedulerSettings
from vllm_mm_ext.scheduler.step_times import StepTimes

# Share of a step that encoder work gets where decoding and prefill take all of the target.
LEAST_SHARE = 0.2
# As much of the time goes to encoder work as its backlog is of this share of the aging bound: so a
# target that leaves too little for the load is exceeded before requests wait for long.
BACKLOG_OF_AGING = 1 / 8
MOST_FOR_BACKLOG = 0.9
# Prompt tokens a step may always compute: two of vLLM's usual KV blocks.
LEAST_PREFILL_TOKENS = 32


@dataclass(frozen=True, slots=True)
class Demand:
    """What a step could do.

    Attributes:
        decode_tokens: Tokens that decoding requests need.
        decoding: Something decodes.
        text_due: A request without encoder work waits for its first token.
        prefill_tokens: Prompt tokens that could be computed: their encoder outputs are there.
        encoder_tokens: Encoder outputs that are missing.
        next_item: Tokens of the item that would be encoded first, 0 if there is none.
    """

    decode_tokens: int
    decoding: bool
    text_due: bool
    prefill_tokens: int
    encoder_tokens: int
    next_item: int


@dataclass(frozen=True, slots=True)
class StepLimits:
    """What a step may hold.

    Attributes:
        tokens: Tokens computed by the language model, decoded ones included.
        prefill_tokens: Prompt tokens among them.
        encoder_tokens: Encoder outputs.
    """

    tokens: int
    prefill_tokens: int
    encoder_tokens: int


class StepBudget:
    """Turns demand and measured times into the limits of each step.

    While something decodes, encoder work draws on a credit that grows with each step by what the
    step has time for. So an item larger than that is encoded once credit covers it: after
    ``ceil(item / allowance)`` steps, and the average stays within the allowance.

    Args:
        settings: The ``scheduler`` section.
        max_tokens: vLLM's bound on tokens of a step.
        max_encoder_tokens: vLLM's bound on encoder outputs of a step.
    """

    def __init__(
        self, settings: SchedulerSettings, max_tokens: int, max_encoder_tokens: int
    ) -> None:
        self._settings = settings
        self._max_tokens = max_tokens
        self._max_encoder_tokens = max_encoder_tokens
        self._credit = 0.0

    def limits(self, demand: Demand, times: StepTimes) -> StepLimits:
        """Limits of the next step; credit grows by its allowance."""
        if not demand.decoding and not demand.text_due:
            self._credit = 0.0
            return StepLimits(self._max_tokens, self._max_tokens, self._idle(demand, times))
        prefill_s, encoder_s = self._time(demand, times)
        encoder_tokens = self._credited(demand, encoder_s, times)
        if not demand.decoding:
            return StepLimits(self._max_tokens, self._max_tokens, encoder_tokens)
        most = max(1, int(self._settings.prefill_share * self._max_tokens))
        prefill = _tokens(prefill_s, times.prefill_s, most)
        prefill = min(max(prefill, LEAST_PREFILL_TOKENS), most)
        tokens = min(self._max_tokens, demand.decode_tokens + prefill)
        return StepLimits(tokens, prefill, encoder_tokens)

    def spent(self, encoder_tokens: int) -> None:
        """Take what was really encoded off the credit."""
        self._credit = max(0.0, self._credit - encoder_tokens)

    def _idle(self, demand: Demand, times: StepTimes) -> int:
        cap = self._settings.encoder_tokens_idle or self._max_encoder_tokens
        seconds = self._settings.encoder_step_idle_ms / 1e3
        cap = min(cap, _tokens(seconds, times.encoder_s, cap))
        return min(max(cap, demand.next_item), self._max_encoder_tokens)

    def _credited(self, demand: Demand, seconds: float, times: StepTimes) -> int:
        if not demand.encoder_tokens:
            self._credit = 0.0
            return 0
        if self._settings.encoder_tokens_decoding:
            allowance: float = self._settings.encoder_tokens_decoding
        elif times.encoder_s is None:
            # One item tells what encoding costs here.
            allowance = demand.next_item
        else:
            allowance = max(1.0, _tokens(seconds, times.encoder_s, self._max_encoder_tokens))
        # Credit beyond one item would be spent at once later, in a long step.
        ceiling = max(allowance, float(demand.next_item))
        self._credit = min(self._credit + allowance, ceiling)
        return min(int(self._credit), self._max_encoder_tokens)

    def _time(self, demand: Demand, times: StepTimes) -> tuple[float, float]:
        """Seconds of the step for prefill and for encoder work.

        Prefill comes first, as its request is further on, and may take as long as the target: a
        prompt cut into pieces waits for a whole step after each of them.
        """
        target = self._settings.target_itl_ms / 1e3
        base = times.base_s
        least = LEAST_SHARE * max(target, base)
        prefill = min(demand.prefill_tokens * (times.prefill_s or 0.0), target)
        backlog = demand.encoder_tokens * (times.encoder_s or 0.0)
        share = min(backlog / (BACKLOG_OF_AGING * self._settings.aging_s), MOST_FOR_BACKLOG)
        paced = share / (1 - share) * (base + prefill)
        return max(target, least), max(target - base - prefill, least, paced)


def fair_level(needs: Sequence[float], total: float) -> float:
    """The cap on each that makes ``needs`` sum to ``total`` (max-min fair); infinite if none."""
    left = total
    for done, need in enumerate(sorted(needs)):
        share = left / (len(needs) - done)
        if need > share:
            return share
        left -= need
    return math.inf


def _tokens(seconds: float, per_token: float | None, most: int) -> int:
    """Tokens that fit into so many seconds, at most ``most``; all of them at an unknown price."""
    if not per_token or seconds >= per_token * most:
        return most
    return int(seconds / per_token)
