"""What the requests without their first token ask of one step."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import takewhile

from vllm_mm_ext.adapters.scheduler.step_candidates import Candidate, demands, ready_media
from vllm_mm_ext.policies.scheduler.encoder_plan import first_served
from vllm_mm_ext.policies.scheduler.step_budget import NOTHING, Demand, Remainder


@dataclass(frozen=True, slots=True)
class StepState:
    """What a step begins with.

    Attributes:
        decodes: Tokens that it decodes.
        slots: Free slots.
        reserved: Of these, slots that are kept for text and aged requests.
        cache_tokens: Encoder outputs that the encoder cache can take.
        limits_prefill: Whether prefill can be limited.
        failed: Whether a request was in a plan before and not let in.
    """

    decodes: int
    slots: int
    reserved: int
    cache_tokens: int
    limits_prefill: bool
    failed: Callable[[str], bool]


def running_of(candidates: list[Candidate]) -> list[Candidate]:
    """Those that hold a slot."""
    return [candidate for candidate in candidates if candidate.is_running]


def text_of(candidates: list[Candidate], slots: int) -> list[Candidate]:
    """Those without encoder work that could be let in, at most as many as there are slots."""
    return [one for one in candidates if one.ready and not one.items and not one.is_running][:slots]


def step_demand(candidates: list[Candidate], finish: Remainder, state: StepState) -> Demand:
    """What a step is asked for.

    Args:
        candidates: By rank.
        finish: What is left of the first one's prompt, if the step is to do all of it.
        state: What the step begins with.
    """
    running, text = running_of(candidates), text_of(candidates, state.slots)
    media = [one for one in candidates if one.items and one.ready]
    behind = slice(1 if finish.prefill_tokens else 0, None)
    due = [*running, *text][behind]
    # Where prefill is not limited, text cannot be put first: media would go on beside it.
    keys = {one.rank_inputs.key for one in due} if state.limits_prefill else set()
    ahead = takewhile(lambda one: not one.is_media, candidates[behind])
    served = _served(media, state)
    only = all(one is served for one in due if one.is_media)
    ready, context = ready_media(running[behind])
    return Demand(
        decode_tokens=state.decodes,
        decoding=bool(state.decodes),
        text_due=bool(text) or any(not one.is_media for one in running),
        prefill_tokens=sum(one.ready_need for one in due),
        media_tokens=ready,
        media_context=context,
        encoder_tokens=sum(one.rank_inputs.encoder_tokens for one in media),
        next_item=served.next_tokens if served else 0,
        context=media[0].computed if media else 0,
        cache_tokens=state.cache_tokens,
        # Where prefill is not limited, what is encoded is prefilled in the same step.
        one=served.remainder if served and only and state.limits_prefill else NOTHING,
        finish=finish,
        text=tuple(one.remainder for one in ahead if one.rank_inputs.key in keys),
    )


def _served(media: list[Candidate], state: StepState) -> Candidate | None:
    """The request that is encoded for first, None if none can be."""
    first = first_served(demands(media, state.failed), state.slots, state.reserved)
    return next((one for one in media if first and one.rank_inputs.key == first.key), None)
