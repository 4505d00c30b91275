"""Who comes first: shortest encoder work, with a bound on how long anyone is passed. Pure."""

from __future__ import annotations

from typing import NamedTuple

# A request's place among all in the order of coming; no two requests have the same. Where the
# server schedules by priority, the first value is vLLM's arrival time, in seconds: vLLM puts
# requests of equal priority in that order. Else it is 0, and the count of requests decides.
Order = tuple[float, int]


class RankInputs(NamedTuple):
    """What decides the rank of a request that has not got its first token, or was preempted.

    Attributes:
        key: The request's id.
        since: When it came, in seconds on the scheduler's clock.
        order: Its place in the order of coming.
        priority: Lower goes first; 0 for all unless the server schedules by priority.
        encoder_tokens: Encoder work it still needs, in tokens.
        prefill_steps: Steps its prefill takes at least; most prompts need one.
        resumes: It was preempted, so it was served before.
    """

    key: str
    since: float
    order: Order
    priority: int = 0
    encoder_tokens: int = 0
    prefill_steps: int = 1
    resumes: bool = False


Rank = tuple[int, int, int, int, Order]


def aged_after_s(aging_s: float) -> float:
    """Seconds after which a request is aged: later requests no longer pass it."""
    return aging_s / 2


def is_aged(inputs: RankInputs, now: float, aging_s: float) -> bool:
    """Whether a request goes before every later one."""
    return inputs.resumes or now - inputs.since >= aged_after_s(aging_s)


def rank_of(inputs: RankInputs, *, aged: bool) -> Rank:
    """Sort key of a request in one step; the lowest goes first.

    Aged requests come first, in the order of their coming. The others follow by priority, encoder
    work, steps of prefill and order of coming. Hence the guarantee: once a request has waited
    ``aged_after_s``, every request ranked before it came before it, or was preempted. No request
    can join that set but by preemption, so it is served as soon as those before it are.
    """
    if aged:
        return (0, 0, 0, 0, inputs.order)
    return (1, inputs.priority, inputs.encoder_tokens, inputs.prefill_steps, inputs.order)


def sort_key(inputs: RankInputs, *, blocked: bool) -> Rank:
    """Sort key of a request that holds until something about the request changes.

    It chooses whom a step looks at among many, beside those that came first.

    Args:
        inputs: What the request's rank depends on.
        blocked: The request cannot be scheduled for now.
    """
    return (
        0 if inputs.resumes else 2 if blocked else 1,
        inputs.priority,
        inputs.encoder_tokens,
        inputs.prefill_steps,
        inputs.order,
    )
