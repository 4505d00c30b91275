"""How much encoder and prefill work a step may hold. Pure."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from vllm_mm_ext.config.scheduler_settings import SchedulerSettings
from vllm_mm_ext.policies.scheduler.step_times import StepTimes

# Share of a step that encoder work gets where decoding and prefill take all of the target.
LEAST_SHARE = 0.2
# As much of the time goes to encoder work as its backlog is of this share of the aging bound: so a
# target that leaves too little for the load is exceeded before requests wait for long.
BACKLOG_OF_AGING = 1 / 8
MOST_FOR_BACKLOG = 0.75
# A step may take this much longer if that saves a prompt another step, or two prompts one each.
FINISH_SLACK = 0.1
FINISH_BOTH_SLACK = 0.5
# Of steps, at most so many put text first: it gets its first token sooner, and media pay for the
# decodes of another step.
TEXT_FIRST_STEPS = 1 / 8
# Prompt tokens a step may always compute: two of vLLM's usual KV blocks.
LEAST_PREFILL_TOKENS = 32


@dataclass(frozen=True, slots=True)
class Remainder:
    """What is left of a prompt.

    Attributes:
        encoder_tokens: Encoder outputs that are missing.
        prefill_tokens: Prompt tokens to compute, those of the missing outputs included.
        context: Tokens before them.
    """

    encoder_tokens: int = 0
    prefill_tokens: int = 0
    context: int = 0

    @property
    def ready_tokens(self) -> int:
        """Prompt tokens that need not be encoded before."""
        return max(0, self.prefill_tokens - self.encoder_tokens)

    def seconds(self, times: StepTimes) -> float:
        """How long it takes within a step."""
        return times.seconds(self.encoder_tokens, self.prefill_tokens, self.context)


NOTHING = Remainder()


@dataclass(frozen=True, slots=True)
class Demand:
    """What a step could do.

    Attributes:
        decode_tokens: Tokens that decoding requests need.
        decoding: Something decodes.
        text_due: A request without encoder work waits for its first token.
        prefill_tokens: Prompt tokens that could be computed now: their encoder outputs are there.
            Those of ``finish`` do not count.
        media_tokens: Those among them of running requests with mm items.
        media_context: Tokens before these, on average.
        encoder_tokens: Encoder outputs that are missing.
        next_item: Tokens of the item that would be encoded first, 0 if there is none.
        context: Tokens before it in its prompt.
        cache_tokens: Encoder outputs that the cache has room for.
        one: What is left of the prompt that this item is of, if no other prompt with mm items could
            get on.
        finish: What the request that goes first needs to be done with its prompt in this step; none
            if that is more than the step has time for.
        text: What is left of prompts without mm items that go before all with them (but ``finish``)
            and could be computed now.
    """

    decode_tokens: int
    decoding: bool
    text_due: bool
    prefill_tokens: int
    encoder_tokens: int
    next_item: int
    media_tokens: int = 0
    media_context: int = 0
    context: int = 0
    cache_tokens: int = 0
    one: Remainder = NOTHING
    finish: Remainder = NOTHING
    text: tuple[Remainder, ...] = ()

    @property
    def text_tokens(self) -> int:
        """Prompt tokens that could be computed now, but for those of running media."""
        return self.prefill_tokens - self.media_tokens

    def prefill_s(self, times: StepTimes) -> float:
        """Seconds of the prompt tokens that could be computed now."""
        media_s = times.seconds(0, self.media_tokens, self.media_context)
        return times.seconds(0, self.text_tokens) + media_s


@dataclass(frozen=True, slots=True)
class StepLimits:
    """What a step may hold.

    Attributes:
        tokens: Tokens computed by the language model, decoded ones included.
        prefill_tokens: Prompt tokens among them.
        encoder_tokens: Encoder outputs.
        media_tokens: Prompt tokens among ``prefill_tokens`` that text does not get: of what is
            encoded in the step, or of the one prompt with mm items that gets on.
        text_first: No prompt gets on but text that goes first, and what is finished.
    """

    tokens: int
    prefill_tokens: int
    encoder_tokens: int
    media_tokens: int
    text_first: bool = False


class StepBudget:
    """Turns demand and measured times into the limits of each step.

    While something decodes, encoder work draws on a credit that grows with each step by what the
    step has time for. So an item larger than that is encoded once credit covers it: after
    ``ceil(item / allowance)`` steps, and the average stays within the allowance. Items are encoded
    in one piece and prefilled in any: time left over goes to another item, of which the next steps
    prefill the rest.

    Where only one prompt with mm items gets on, and has half of the step's time or more, steps that
    encode and steps that prefill what was encoded alternate instead: each call of the encoder costs
    something whatever its size, so few calls that fill a step are best.

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
        self._text_first_credit = 1.0
        self._prefilled = NOTHING

    def limits(self, demand: Demand, times: StepTimes) -> StepLimits:
        """Limits of the next step; credit grows by its allowance."""
        if not demand.decoding and not demand.text_due:
            self._credit = 0.0
            idle = self._idle(demand, times)
            return StepLimits(self._max_tokens, self._max_tokens, idle, idle)
        most = max(1, int(self._settings.prefill_share * self._max_tokens))
        ready = 0
        text_first = self._puts_text_first(demand, times, most)
        if text_first:
            encoder_tokens = fresh = demand.finish.encoder_tokens
            ready = sum(one.prefill_tokens for one in demand.text)
        elif (apart := self._apart(demand, times, most)) is not None:
            encoder_tokens, fresh = apart
            ready = demand.text_tokens
        else:
            prefill_s, media_s = self._time(demand, times)
            encoder_tokens = fresh = self._credited(demand, media_s, times)
            if not self._settings.encoder_tokens_decoding:
                encoder_tokens, fresh = self._filled(encoder_tokens, demand, media_s, times)
            ready = self._ready(demand, prefill_s, times, most)
        if not demand.decoding:
            most = self._max_tokens
            return StepLimits(most, most, encoder_tokens, fresh, text_first)
        prefill = fresh + demand.finish.ready_tokens + ready
        prefill = min(max(prefill, LEAST_PREFILL_TOKENS), most)
        tokens = min(self._max_tokens, demand.decode_tokens + prefill)
        return StepLimits(tokens, prefill, encoder_tokens, fresh, text_first)

    def no_prompts(self) -> None:
        """A step in which no prompt could get on."""
        self._credit = 0.0
        self._prefilled = NOTHING
        self._earn_text_first()

    def finishes(self, left: Remainder, times: StepTimes, decode_tokens: int) -> bool:
        """Whether a step that decodes so many tokens has time for what is left of a prompt."""
        return left.seconds(times) <= (1 + FINISH_SLACK) * self._capacity_s(times, decode_tokens)

    def spent(self, encoder_tokens: int) -> None:
        """Take what was really encoded off the credit."""
        self._credit = max(0.0, self._credit - encoder_tokens)

    def _puts_text_first(self, demand: Demand, times: StepTimes, most: int) -> bool:
        """Whether the step holds the text, what is finished, and no other prompt.

        So it is where there is room for all of these, and without it text would wait longer: for
        other media in the step, or, as the step is too short for what is finished and all of the
        text, for another step.
        """
        self._earn_text_first()
        tokens = sum(one.prefill_tokens for one in demand.text)
        fits = tokens + demand.finish.prefill_tokens <= most
        if not tokens or not fits or self._text_first_credit < 1.0:
            return False
        if self._settings.encoder_tokens_decoding:
            return False
        capacity = self._capacity_s(times, demand.decode_tokens)
        seconds = sum(one.seconds(times) for one in (*demand.text, demand.finish))
        if demand.finish.prefill_tokens:
            chosen = capacity < seconds <= (1 + FINISH_BOTH_SLACK) * capacity
        else:
            others = demand.encoder_tokens > 0 or demand.prefill_tokens > tokens
            chosen = others and seconds <= (1 + FINISH_SLACK) * capacity
        if chosen:
            self._text_first_credit = 0.0
        return chosen

    def _earn_text_first(self) -> None:
        self._text_first_credit = min(1.0, self._text_first_credit + TEXT_FIRST_STEPS)

    def _capacity_s(self, times: StepTimes, decode_tokens: int) -> float:
        """Seconds for prompts in a step that decodes so many tokens."""
        return self._settings.target_itl_ms / 1e3 - times.base_s(decode_tokens, prompts=True)

    def _idle(self, demand: Demand, times: StepTimes) -> int:
        cap = self._settings.encoder_tokens_idle or self._max_encoder_tokens
        seconds = self._settings.encoder_step_idle_ms / 1e3
        if times.encoder_s:
            cap = min(cap, int(seconds / times.encoder_s))
        return min(max(cap, demand.next_item), self._max_encoder_tokens)

    def _apart(self, demand: Demand, times: StepTimes, most: int) -> tuple[int, int] | None:
        """A step that encodes for the one prompt that gets on, or one that prefills it.

        Returns:
            Encoder tokens, and prompt tokens of this prompt; None for a step that does both, as
            there is more than one prompt, text takes most of the time, or it is overloaded.
        """
        one, item, price = demand.one, demand.next_item, times.encoder_s
        before, self._prefilled = self._prefilled, NOTHING
        if not (demand.decoding and one.encoder_tokens and price) or demand.finish.prefill_tokens:
            return None
        if self._settings.encoder_tokens_decoding:
            return None
        capacity = self._capacity_s(times, demand.decode_tokens)
        text = times.seconds(0, demand.text_tokens)
        media = capacity - text
        others = self._settings.target_itl_ms / 1e3 - media
        if 2 * text > capacity or self._paced(demand, others, times) > media:
            return None
        # Without progress since the last such step its KV or encoder outputs are waited for.
        if demand.prefill_s(times) >= capacity and demand.media_tokens and before != one:
            self._prefilled = one
            return 0, max(1, times.tokens(media, demand.media_context, most, encoded=False))
        # vLLM encodes for no request that gets no token.
        at_once = times.seconds(0, LEAST_PREFILL_TOKENS, one.context)
        items = min(self._settings.max_encoder_batch, 1 + self._settings.lookahead_items)
        bound = min(one.encoder_tokens, demand.cache_tokens, self._max_encoder_tokens)
        # The target is for most steps, not for the mean of those that encode.
        price *= 1 + times.encoder_spread
        fitting = min((media - at_once) / price, bound)
        tokens = min(int(fitting) // item, items) * item if item else 0
        if tokens <= 0:
            return None
        left = media - tokens * price
        return tokens, times.tokens(left, demand.media_context, most, encoded=False)

    def _ready(self, demand: Demand, seconds: float, times: StepTimes, most: int) -> int:
        """Prompt tokens that need no encoding and fit into a time, at most ``most``; text first."""
        if not demand.prefill_tokens:
            return 0
        if not demand.media_tokens:
            return times.tokens(seconds, 0, most, encoded=False)
        text = times.tokens(seconds, 0, demand.text_tokens, encoded=False)
        left = seconds - times.seconds(0, text)
        return text + times.tokens(left, demand.media_context, most, encoded=False)

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
            # What is encoded is prefilled in the same step.
            most = self._max_encoder_tokens
            allowance = max(1, times.tokens(seconds, demand.context, most, encoded=True))
        allowance = max(allowance, demand.finish.encoder_tokens)
        # Credit beyond one item would be spent at once later, in a long step.
        ceiling = max(allowance, float(demand.next_item))
        self._credit = min(self._credit + allowance, ceiling)
        return min(int(self._credit), self._max_encoder_tokens)

    def _filled(
        self, credit: int, demand: Demand, seconds: float, times: StepTimes
    ) -> tuple[int, int]:
        """Encoder tokens of the step, and prompt tokens of theirs, so that no time is left over.

        Args:
            credit: Encoder tokens that the step may spend.
            demand: What it could do.
            seconds: What it has for encoding and prefilling what was encoded.
            times: What that costs.
        """
        item = demand.next_item
        whole = credit // item * item if item else credit
        filled = whole + item
        left = seconds - times.seconds(whole, whole, demand.context)
        encoding = times.seconds(item, 0)
        fits = filled <= min(demand.encoder_tokens, self._max_encoder_tokens)
        if whole < demand.finish.encoder_tokens or not fits or not 0 < encoding <= left:
            return credit, credit
        context = demand.context + whole
        return filled, whole + times.tokens(left - encoding, context, item, encoded=False)

    def _time(self, demand: Demand, times: StepTimes) -> tuple[float, float]:
        """Seconds of the step for prefill of what is there, and for encoding and prefilling more.

        Prefill comes first, as its request is further on, and a prompt cut into pieces waits for a
        whole step after each of them.
        """
        target = self._settings.target_itl_ms / 1e3
        finish = demand.finish.seconds(times)
        prompts = bool(demand.prefill_tokens or demand.encoder_tokens or finish)
        base = times.base_s(demand.decode_tokens, prompts=prompts)
        least = LEAST_SHARE * max(target, base)
        kept = finish or (least if demand.encoder_tokens else 0.0)
        capacity = max(target - base - kept, 0.0 if finish else least)
        prefill = min(demand.prefill_s(times), capacity)
        paced = self._paced(demand, base + prefill, times)
        ready = times.seconds(0, demand.finish.ready_tokens, demand.finish.context)
        return prefill, max(target - base - prefill - ready, least, paced)

    def _paced(self, demand: Demand, others: float, times: StepTimes) -> float:
        """Seconds of encoder work that keep its backlog from growing old, beside other work."""
        backlog = times.seconds(demand.encoder_tokens, 0)
        share = min(backlog / (BACKLOG_OF_AGING * self._settings.aging_s), MOST_FOR_BACKLOG)
        return share / (1 - share) * others


def fair_level(needs: Sequence[float], total: float) -> float:
    """The cap on each that makes ``needs`` sum to ``total`` (max-min fair); infinite if none."""
    left = total
    for done, need in enumerate(sorted(needs)):
        share = left / (len(needs) - done)
        if need > share:
            return share
        left -= need
    return math.inf
