"""Reads what each request without its first token needs from vLLM's scheduler."""

from __future__ import annotations

from typing import Any, NamedTuple

from vllm.v1.core.sched.request_queue import SchedulingPolicy
from vllm.v1.request import RequestStatus

from vllm_mm_ext.adapters.scheduler.admission import Admission
from vllm_mm_ext.adapters.scheduler.media_work import MediaWork, Need
from vllm_mm_ext.adapters.scheduler.queue import LOOKED_AT, Standing
from vllm_mm_ext.adapters.scheduler.turns import Turn
from vllm_mm_ext.policies.scheduler.backlog import Backlog
from vllm_mm_ext.policies.scheduler.order import (
    Candidate,
    is_promoted,
    promotion_s,
    rank_of,
    standing,
)

# Of text that has not begun.
_NOTHING = Need(0)


class _Known(NamedTuple):
    """A turn as it was last read, and what it was read from."""

    turn: Turn
    need: Need
    status: RequestStatus


class Arrival(NamedTuple):
    """When a request came, in seconds on the scheduler's clock, and as which of all."""

    since: float
    number: int


def free_slots(scheduler: Any) -> int:
    """Requests that may be let in by their number."""
    used = len(scheduler.running) + scheduler.num_waiting_for_streaming_input
    return max(0, int(scheduler.max_num_active_reqs - used))


class TurnReader:
    """Who came when and needs what.

    Args:
        scheduler: vLLM's scheduler, with an ``ArrangedQueue``.
        aging_s: The setting.
        max_tokens: Tokens that a step may hold.
        plans_encoder: Encoder work is planned.
    """

    def __init__(
        self, scheduler: Any, *, aging_s: float, max_tokens: int, plans_encoder: bool
    ) -> None:
        self.arrivals: dict[str, Arrival] = {}
        self.media = MediaWork(scheduler)
        self.backlog = Backlog()
        self._scheduler = scheduler
        self._aging_s = aging_s
        self._max_tokens = max_tokens
        self._plans_encoder = plans_encoder
        self._by_priority = scheduler.policy == SchedulingPolicy.PRIORITY
        self._came = 0
        self._known: dict[str, _Known] = {}

    def came(self, request: Any, now: float) -> None:
        """A request has come, or a streaming session goes on, which counts as one."""
        self._came += 1
        self.arrivals[request.request_id] = Arrival(now, self._came)
        self._known.pop(request.request_id, None)

    def number(self, key: str) -> int:
        """Order of coming."""
        return self.arrivals[key].number

    def forget(self, key: str) -> None:
        """The request is no more."""
        self.arrivals.pop(key, None)
        self._known.pop(key, None)
        self.media.forget(key)
        self.backlog.forget(key)

    def is_promoted(self, request: Any, now: float) -> bool:
        """Whether no later request may pass it."""
        waited = now - self.arrivals[request.request_id].since
        preempted = request.status == RequestStatus.PREEMPTED
        return preempted or waited >= promotion_s(self._aging_s)

    def standing(self, request: Any) -> Standing:
        """Where a waiting request stands before it is looked at: nothing is known to be cached."""
        tokens = self.media.total(request) if self._plans(request) else 0
        self.backlog.set(request.request_id, tokens)
        candidate = self._candidate(request, tokens, request.num_tokens)
        return Standing(standing(candidate, blocked=False), candidate.number)

    def turns(self, admission: Admission, now: float) -> list[Turn]:
        """Requests without their first token, by rank; of many that wait some.

        Args:
            admission: Who was refused before.
            now: On the scheduler's clock.
        """
        scheduler = self._scheduler
        found = [self._turn(r, admission, now) for r in scheduler.running if r.is_prefill_chunk]
        found += [self._turn(r, admission, now) for r in scheduler.kv_holding_waiting]
        if len(scheduler.waiting) <= 2 * LOOKED_AT or free_slots(scheduler):
            adapters = self._adapters()
            for request in scheduler.waiting.candidates():
                turn = self._turn(request, admission, now)
                blocked = scheduler._is_blocked_waiting_status(request.status)
                lacks = _adapter(request) not in adapters if adapters else False
                rank_now = standing(turn.candidate, blocked=blocked or lacks)
                scheduler.waiting.looked_at(request, Standing(rank_now, turn.candidate.number))
                found.append(turn)
        for turn in found:
            self.backlog.set(turn.candidate.key, turn.candidate.encoder_tokens)
        return sorted(found, key=lambda turn: rank_of(turn.candidate, promoted=turn.promoted))

    def _plans(self, request: Any) -> bool:
        return self._plans_encoder and bool(request.has_encoder_inputs)

    def _turn(self, request: Any, admission: Admission, now: float) -> Turn:
        key, status = request.request_id, request.status
        if self._plans(request):
            need = self.media.need(request, now)
        else:
            computed = request.num_computed_tokens
            need = Need(computed) if computed else _NOTHING
        known = self._known.get(key)
        if known is None or known.need is not need or known.status is not status:
            turn = self._described(request, need)
        else:
            turn = known.turn
        ready = status == RequestStatus.RUNNING or not (
            self._scheduler._is_blocked_waiting_status(status)
            or admission.backs_off(key, self._scheduler.current_step + 1)
            or admission.holds(request)
        )
        promoted = is_promoted(turn.candidate, now, self._aging_s)
        if turn.ready != ready or turn.promoted != promoted:
            turn = turn._replace(ready=ready, promoted=promoted)
        if known is None or turn is not known.turn:
            self._known[key] = _Known(turn, need, status)
        return turn

    def _described(self, request: Any, need: Need) -> Turn:
        left = max(0, request.num_tokens - need.computed)
        candidate = self._candidate(request, need.tokens, left)
        return Turn(request, candidate, need.computed, left, need.items, ready=True, promoted=False)

    def _candidate(self, request: Any, encoder_tokens: int, left: int) -> Candidate:
        key = request.request_id
        since, number = self.arrivals[key]
        return Candidate(
            key,
            since,
            number,
            priority=request.priority if self._by_priority else 0,
            encoder_tokens=encoder_tokens,
            prefill_steps=-(-left // self._max_tokens),
            resumes=request.status == RequestStatus.PREEMPTED,
        )

    def _adapters(self) -> set[int]:
        """LoRA adapters that can be scheduled now, no adapter (0) among them; none: any can."""
        config = self._scheduler.lora_config
        if not config:
            return set()
        used = {_adapter(request) for request in self._scheduler.running} - {0}
        return used | {0} if len(used) >= config.max_loras else set()


def _adapter(request: Any) -> int:
    return request.lora_request.lora_int_id if request.lora_request else 0
