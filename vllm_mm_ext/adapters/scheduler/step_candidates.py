"""Requests without their first token, as one step of the scheduler sees them."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import dropwhile
from typing import Any, NamedTuple

from vllm.v1.request import RequestStatus

from vllm_mm_ext.policies.scheduler.encoder_plan import EncoderDemand, Item, groups
from vllm_mm_ext.policies.scheduler.order import RankInputs
from vllm_mm_ext.policies.scheduler.step_budget import NOTHING, Remainder, StepLimits, fair_level


class Candidate(NamedTuple):
    """A request without its first token, as one step sees it.

    Attributes:
        request: vLLM's request.
        rank_inputs: What its rank depends on.
        computed: Tokens that need not be computed.
        left: Tokens that must be.
        items: Items whose encoder output is missing.
        ready: It could be scheduled, as far as it is known before vLLM tries.
        aged: No later request may pass it.
    """

    request: Any
    rank_inputs: RankInputs
    computed: int
    left: int
    items: tuple[Item, ...]
    ready: bool
    aged: bool

    @property
    def prefill_need(self) -> int:
        """Tokens it could compute in this step, if its next item were encoded."""
        return self.ready_need + (self.next_tokens if self.items else 0)

    @property
    def remainder(self) -> Remainder:
        """What is left of its prompt."""
        return Remainder(self.rank_inputs.encoder_tokens, self.left, self.computed)

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
    media: list[Candidate], failed: Callable[[str], bool], reach: int = 0
) -> list[EncoderDemand]:
    """What requests want of the encoder.

    Args:
        media: Candidates with missing items, by rank.
        failed: Whether a request was in a plan and not let in.
        reach: Tokens that prefill may get on.
    """
    return [
        EncoderDemand(
            candidate.rank_inputs.key,
            candidate.items,
            candidate.rank_inputs.encoder_tokens,
            candidate.computed + reach,
            running=candidate.is_running,
            aged=candidate.aged,
            failed=failed(candidate.rank_inputs.key),
            priority=candidate.rank_inputs.priority,
        )
        for candidate in media
    ]


def finishing_first(
    candidates: list[Candidate], finishes: Callable[[Remainder], bool]
) -> tuple[list[Candidate], Remainder]:
    """Put the media request that is nearest to its first token in front if it gets there now.

    What comes in front of it would cost it a whole step; it costs that a part of one. It passes
    none that must not be passed, nor any of higher priority.

    Args:
        candidates: By rank.
        finishes: Whether a step has time for what is left of a prompt.

    Returns:
        The candidates, and what is left of the first one's prompt (nothing if none was put there).
    """
    started = [
        candidate
        for candidate in candidates
        if candidate.is_running and candidate.ready and candidate.is_media
    ]
    if not started:
        return candidates, NOTHING
    nearest = min(
        started, key=lambda candidate: (candidate.rank_inputs.encoder_tokens, candidate.left)
    )
    left = nearest.remainder
    priority = nearest.rank_inputs.priority
    others = (candidate for candidate in candidates if candidate is not nearest)
    kept = any(candidate.aged or candidate.rank_inputs.priority < priority for candidate in others)
    if kept or not finishes(left):
        return candidates, NOTHING
    return [nearest, *(candidate for candidate in candidates if candidate is not nearest)], left


def ready_media(running: list[Candidate]) -> tuple[int, int]:
    """Prompt tokens that running requests with mm items could compute without the encoder.

    Returns:
        How many, and how many tokens are before them, on average.
    """
    needs = [
        (candidate.ready_need, candidate.computed) for candidate in running if candidate.is_media
    ]
    tokens = sum(need for need, _ in needs)
    return tokens, sum(need * computed for need, computed in needs) // max(1, tokens)


def decode_tokens(request: Any) -> int:
    """Tokens a decoding request takes in a step, drafts included."""
    ahead = request.num_tokens_with_spec + request.num_output_placeholders
    return max(0, int(ahead - request.num_computed_tokens))


def chunk_limits(
    limits: StepLimits, running: list[Candidate], text: list[Candidate], finish: Remainder = NOTHING
) -> dict[str, int]:
    """Most prompt tokens of each running request, so that text finds room; empty: no bound.

    vLLM goes through running requests first, so without a bound the long prompts among them take
    all there is. Text that waits or could be done with its prompt gets what is not kept for
    media, or half if that is more. Behind aged requests with media it is half: these are so
    many under an overload of encoder work that text would not be answered any more.

    Where text goes first, running requests behind it get none.

    Args:
        limits: Of the step.
        running: Candidates that hold slots, by rank.
        text: Candidates without encoder work that could get one.
        finish: What is left of the first one's prompt, if the step is to do all of it.
    """
    if limits.text_first:
        behind = running[1:] if finish.prefill_tokens else running
        behind = list(dropwhile(lambda candidate: not candidate.is_media, behind))
        return {candidate.rank_inputs.key: 0 for candidate in behind}
    if not running or not (text or any(not candidate.is_media for candidate in running)):
        return {}
    share = limits.prefill_tokens // 2
    if not any(candidate.aged and candidate.is_media for candidate in running):
        share = max(share, limits.prefill_tokens - limits.media_tokens)
    ending: list[Candidate] = []
    others: list[Candidate] = []
    for candidate in running:
        (others if candidate.is_media or candidate.left > share else ending).append(candidate)
    wanted = [candidate.prefill_need for candidate in (*ending, *text)]
    needed = [candidate.could_compute(limits.encoder_tokens) for candidate in others]
    capacity = limits.prefill_tokens - min(sum(wanted), share)
    # With text alone that waits, and may not be let in, others have to get on.
    levels = (
        (ending, fair_level(wanted, share), 1),
        (others, fair_level(needed, capacity), 0 if ending else 1),
    )
    chunks = {
        candidate.rank_inputs.key: max(least, int(level))
        for candidates, level, least in levels
        if not math.isinf(level)
        for candidate in candidates
    }
    if finish.prefill_tokens:
        first = running[0].rank_inputs.key
        chunks[first] = max(chunks.get(first, 0), finish.prefill_tokens)
    return chunks
