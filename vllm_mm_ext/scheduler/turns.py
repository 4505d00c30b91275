"""Requests without their first token, as one step of the scheduler sees them."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

from vllm.v1.request import RequestStatus

from vllm_mm_ext.scheduler.encoder_plan import EncoderDemand, Item, groups
from vllm_mm_ext.scheduler.order import Candidate
from vllm_mm_ext.scheduler.step_budget import StepLimits, fair_level


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
        if not self.items:
            return self.left
        return max(0, self.items[0].start - self.computed) + self.next_tokens

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
            running=turn.request.status == RequestStatus.RUNNING,
            promoted=turn.promoted,
            failed=failed(turn.candidate.key),
        )
        for turn in media
    ]


def decode_tokens(request: Any) -> int:
    """Tokens a decoding request takes in a step, drafts included."""
    ahead = request.num_tokens_with_spec + request.num_output_placeholders
    return max(0, int(ahead - request.num_computed_tokens))


def chunk_limit(limits: StepLimits, running: list[Turn], text: list[Turn]) -> int:
    """Most prompt tokens of one request, so that text finds room.

    vLLM goes through running requests first, so without a bound the long prompts among them take
    all there is. Text that waits gets half of it at most, also behind promoted requests: these are
    so many under an overload of encoder work that it would not be answered any more.
    """
    due = bool(text) or any(not turn.request.mm_features for turn in running)
    if not running or not due:
        return 0
    wanted = sum(turn.prefill_need for turn in text)
    room = limits.prefill_tokens - min(wanted, limits.prefill_tokens // 2)
    level = fair_level([turn.left for turn in running], room)
    return 0 if math.isinf(level) else max(1, int(level))
