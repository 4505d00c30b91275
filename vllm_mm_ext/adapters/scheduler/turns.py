"""Requests without their first token, as one step of the scheduler sees them."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import dropwhile
from typing import Any, NamedTuple

from vllm.v1.request import RequestStatus

from vllm_mm_ext.policies.scheduler.encoder_plan import EncoderDemand, Item, groups
from vllm_mm_ext.policies.scheduler.order import Candidate
from vllm_mm_ext.policies.scheduler.step_budget import NOTHING, Remainder, StepLimits, fair_level


class Turn(NamedTuple):
    """A request without its first token, as one step sees it.

    Attributes:
        request: vLLM's request.
        candidate: What its rank depends on.
        computed: Tokens that need not be computed.
        left: Tokens that must be.
        items: Items whose encoder output is missing.
        ready: It could be scheduled, as far as it is known before vLLM tries.
        promoted: No later request may pass it.
    """

    request: Any
    candidate: Candidate
    computed: int
    left: int
    items: tuple[Item, ...]
    ready: bool
    promoted: bool

    @property
    def prefill_need(self) -> int:
        """Tokens it could compute in this step, if its next item were encoded."""
        return self.ready_need + (self.next_tokens if self.items else 0)

    @property
    def remainder(self) -> Remainder:
        """What is left of its prompt."""
        return Remainder(self.candidate.encoder_tokens, self.left, self.computed)

    @property
    def is_running(self) -> bool:
        """It holds a slot."""
        return bool(self.request.status == RequestStatus.RUNNING)

    @property
    def is_media(self) -> bool:
        """Its prompt has mm items, encoded or not."""
        return bool(self.request.mm_features)

    @property
    def ready_need(self) -> int:
        """Tokens it could compute in this step without the encoder."""
        return max(0, self.items[0].start - self.computed) if self.items else self.left

    def could_compute(self, encoder_tokens: int) -> int:
        """Tokens it could compute in this step if so many of its encoder outputs were made."""
        return min(self.left, self.ready_need + encoder_tokens)

    @property
    def next_tokens(self) -> int:
        """Encoder outputs of what is encoded first."""
        return sum(item.tokens for item in groups(self.items)[0])


def demands(
    media: list[Turn], failed: Callable[[str], bool], reach: int = 0
) -> list[EncoderDemand]:
    """What requests want of the encoder.

    Args:
        media: Turns with missing items, by rank.
        failed: Whether a request was in a plan and not let in.
        reach: Tokens that prefill may get on.
    """
    return [
        EncoderDemand(
            turn.candidate.key,
            turn.items,
            turn.candidate.encoder_tokens,
            turn.computed + reach,
            running=turn.is_running,
            promoted=turn.promoted,
            failed=failed(turn.candidate.key),
            priority=turn.candidate.priority,
        )
        for turn in media
    ]


def finishing_first(
    turns: list[Turn], finishes: Callable[[Remainder], bool]
) -> tuple[list[Turn], Remainder]:
    """Put the media request that is nearest to its first token in front if it gets there now.

    What comes in front of it would cost it a whole step; it costs that a part of one. It passes
    none that must not be passed, nor any of higher priority.

    Args:
        turns: By rank.
        finishes: Whether a step has time for what is left of a prompt.

    Returns:
        The turns, and what is left of the first one's prompt (nothing if none was put there).
    """
    started = [turn for turn in turns if turn.is_running and turn.ready and turn.is_media]
    if not started:
        return turns, NOTHING
    nearest = min(started, key=lambda turn: (turn.candidate.encoder_tokens, turn.left))
    left = nearest.remainder
    priority = nearest.candidate.priority
    others = (turn for turn in turns if turn is not nearest)
    kept = any(turn.promoted or turn.candidate.priority < priority for turn in others)
    if kept or not finishes(left):
        return turns, NOTHING
    return [nearest, *(turn for turn in turns if turn is not nearest)], left


def ready_media(running: list[Turn]) -> tuple[int, int]:
    """Prompt tokens that running requests with mm items could compute without the encoder.

    Returns:
        How many, and how many tokens are before them, on average.
    """
    needs = [(turn.ready_need, turn.computed) for turn in running if turn.is_media]
    tokens = sum(need for need, _ in needs)
    return tokens, sum(need * computed for need, computed in needs) // max(1, tokens)


def decode_tokens(request: Any) -> int:
    """Tokens a decoding request takes in a step, drafts included."""
    ahead = request.num_tokens_with_spec + request.num_output_placeholders
    return max(0, int(ahead - request.num_computed_tokens))


def chunk_limits(
    limits: StepLimits, running: list[Turn], text: list[Turn], finish: Remainder = NOTHING
) -> dict[str, int]:
    """Most prompt tokens of each running request, so that text finds room; empty: no bound.

    vLLM goes through running requests first, so without a bound the long prompts among them take
    all there is. Text that waits or could be done with its prompt gets what is not kept for
    media, or half if that is more. Behind promoted requests with media it is half: these are so
    many under an overload of encoder work that text would not be answered any more.

    Where text goes first, running requests behind it get none.

    Args:
        limits: Of the step.
        running: Turns that hold slots, by rank.
        text: Turns without encoder work that could get one.
        finish: What is left of the first one's prompt, if the step is to do all of it.
    """
    if limits.text_first:
        behind = running[1:] if finish.prefill_tokens else running
        behind = list(dropwhile(lambda turn: not turn.is_media, behind))
        return {turn.candidate.key: 0 for turn in behind}
    if not running or not (text or any(not turn.is_media for turn in running)):
        return {}
    share = limits.prefill_tokens // 2
    if not any(turn.promoted and turn.is_media for turn in running):
        share = max(share, limits.prefill_tokens - limits.media_tokens)
    ending: list[Turn] = []
    others: list[Turn] = []
    for turn in running:
        (others if turn.is_media or turn.left > share else ending).append(turn)
    wanted = [turn.prefill_need for turn in (*ending, *text)]
    needed = [turn.could_compute(limits.encoder_tokens) for turn in others]
    room = limits.prefill_tokens - min(sum(wanted), share)
    # With text alone that waits, and may not be let in, others have to get on.
    levels = (
        (ending, fair_level(wanted, share), 1),
        (others, fair_level(needed, room), 0 if ending else 1),
    )
    chunks = {
        turn.candidate.key: max(least, int(level))
        for turns, level, least in levels
        if not math.isinf(level)
        for turn in turns
    }
    if finish.prefill_tokens:
        first = running[0].candidate.key
        chunks[first] = max(chunks.get(first, 0), finish.prefill_tokens)
    return chunks
