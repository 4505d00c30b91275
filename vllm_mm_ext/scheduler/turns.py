"""Requests without their first token, as one step of the scheduler sees them."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

from vllm.v1.request import RequestStatus

from vllm_mm_ext.scheduler.encoder_plan import EncoderDemand, Item, groups
from vllm_mm_ext.scheduler.order import Candidate
from vllm_mm_ext.scheduler.step_budget import NOTHING, Remainder, StepLimits, fair_level


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
        )
        for turn in media
    ]


def finishing_first(
    turns: list[Turn], finishes: Callable[[Remainder], bool]
) -> tuple[list[Turn], Remainder]:
    """Put the media request that is nearest to its first token in front if it gets there now.

    What comes in front of it would cost it a whole step; it costs that a part of one.

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
    left = Remainder(nearest.candidate.encoder_tokens, nearest.left, nearest.computed)
    if any(turn.promoted for turn in turns if turn is not nearest) or not finishes(left):
        return turns, NOTHING
    return [nearest, *(turn for turn in turns if turn is not nearest)], left


def decode_tokens(request: Any) -> int:
    """Tokens a decoding request takes in a step, drafts included."""
    ahead = request.num_tokens_with_spec + request.num_output_placeholders
    return max(0, int(ahead - request.num_computed_tokens))


def chunk_limits(
    limits: StepLimits, running: list[Turn], text: list[Turn], finish: Remainder = NOTHING
) -> dict[str, int]:
    """Most prompt tokens of each running request, so that text finds room; empty: no bound.

    vLLM goes through running requests first, so without a bound the long prompts among them take
    all there is. Text that waits gets what was not planned for encoding, or half if that is more,
    also behind promoted requests: these are so many under an overload of encoder work that it would
    not be answered any more.

    Args:
        limits: Of the step.
        running: Turns that hold slots, by rank.
        text: Turns without encoder work that could get one.
        finish: What is left of the first one's prompt, if the step is to do all of it.
    """
    due = bool(text) or any(not turn.is_media for turn in running)
    if not running or not due:
        return {}
    wanted = sum(turn.prefill_need for turn in text)
    others = max(limits.prefill_tokens // 2, limits.prefill_tokens - limits.fresh_tokens)
    room = limits.prefill_tokens - min(wanted, others)
    level = fair_level([turn.could_compute(limits.encoder_tokens) for turn in running], room)
    if math.isinf(level):
        return {}
    chunks = {turn.candidate.key: max(1, int(level)) for turn in running}
    if finish.prefill_tokens:
        first = running[0].candidate.key
        chunks[first] = max(chunks[first], finish.prefill_tokens)
    return chunks
