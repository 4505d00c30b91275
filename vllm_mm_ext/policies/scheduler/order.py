"""Who comes first: shortest encoder work, with a bound on how long anyone is passed. Pure."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple


class Candidate(NamedTuple):
    """A request that has not got its first token (or lost its place by preemption).

    Attributes:
        key: Its id.
        since: When it came, in seconds on the scheduler's clock.
        number: Order of coming; no two are equal.
        priority: Lower goes first; 0 for all unless the server schedules by priority.
        encoder_tokens: Encoder work it still needs, in tokens.
        prefill_steps: Steps its prefill takes at least; most prompts need one.
        resumes: It was preempted, so it had its turn before.
    """

    key: str
    since: float
    number: int
    priority: int = 0
    encoder_tokens: int = 0
    prefill_steps: int = 1
    resumes: bool = False


Rank = tuple[int, int, int, int, int]


def promotion_s(aging_s: float) -> float:
    """Seconds after which a request is no longer passed by later ones."""
    return aging_s / 2


def is_promoted(candidate: Candidate, now: float, aging_s: float) -> bool:
    """Whether a candidate goes before every later one."""
    return candidate.resumes or now - candidate.since >= promotion_s(aging_s)


def rank(candidate: Candidate, now: float, aging_s: float) -> Rank:
    """Sort key of a candidate at ``now``; lower goes first.

    Promoted requests come first, in the order of their coming. The others follow by priority,
    encoder work, steps of prefill and order of coming. Hence the guarantee: once a request has
    waited ``promotion_s``, every request ranked before it came before it, or was preempted. No
    request can join that set but by preemption, so it is served as soon as those before it are.
    """
    return rank_of(candidate, promoted=is_promoted(candidate, now, aging_s))


def rank_of(candidate: Candidate, *, promoted: bool) -> Rank:
    """``rank`` where it is known whether the candidate is promoted."""
    if promoted:
        return (0, 0, 0, 0, candidate.number)
    return (
        1,
        candidate.priority,
        candidate.encoder_tokens,
        candidate.prefill_steps,
        candidate.number,
    )


def standing(candidate: Candidate, *, blocked: bool) -> Rank:
    """Sort key of a candidate that holds until something about it changes.

    For choosing whom to look at among many, next to those that came first.

    Args:
        candidate: The candidate.
        blocked: It cannot be scheduled for now.
    """
    return (
        0 if candidate.resumes else 2 if blocked else 1,
        candidate.priority,
        candidate.encoder_tokens,
        candidate.prefill_steps,
        candidate.number,
    )


def ordered(candidates: Iterable[Candidate], now: float, aging_s: float) -> list[Candidate]:
    """Candidates, first come those to be served first."""
    return sorted(candidates, key=lambda candidate: rank(candidate, now, aging_s))
