"""Reads what each request without its first token needs from vLLM's scheduler."""

from __future__ import annotations

from typing import Any, NamedTuple

from vllm.v1.core.sched.request_queue import SchedulingPolicy
from vllm.v1.request import RequestStatus

from vllm_mm_ext.adapters.scheduler.admission import Admission
from vllm_mm_ext.adapters.scheduler.media_work import MediaWork, Need
from vllm_mm_ext.adapters.scheduler.queue import LOOKED_AT, SortKeys
from vllm_mm_ext.adapters.scheduler.step_candidates import Candidate
from vllm_mm_ext.policies.scheduler.backlog import Backlog
from vllm_mm_ext.policies.scheduler.order import (
    Order,
    RankInputs,
    aged_after_s,
    is_aged,
    rank_of,
    sort_key,
)

# Of text that has not begun.
_NOTHING = Need(0)


class _Known(NamedTuple):
    """A candidate as it was last read, and what it was read from."""

    candidate: Candidate
    need: Need
    status: RequestStatus


class Arrival(NamedTuple):
    """When a request came, in seconds on the scheduler's clock, and its place in that order."""

    since: float
    order: Order


def free_slots(scheduler: Any) -> int:
    """Requests that may be let in by their number."""
    used = len(scheduler.running) + scheduler.num_waiting_for_streaming_input
    return max(0, int(scheduler.max_num_active_reqs - used))


class CandidateReader:
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

    def came(self, request: Any, now: float, arrival_time: float) -> None:
        """A request has come, or a streaming session goes on, which counts as one.

        Args:
            request: vLLM's request.
            now: On the scheduler's clock.
            arrival_time: When it came by vLLM's account: the API server takes that time.
        """
        self._came += 1
        order = (arrival_time if self._by_priority else 0.0, self._came)
        self.arrivals[request.request_id] = Arrival(now, order)
        self._known.pop(request.request_id, None)

    def order(self, key: str) -> Order:
        """A request's place in the order of coming."""
        return self.arrivals[key].order

    def forget(self, key: str) -> None:
        """The request is no more."""
        self.arrivals.pop(key, None)
        self._known.pop(key, None)
        self.media.forget(key)
        self.backlog.forget(key)

    def is_aged(self, request: Any, now: float) -> bool:
        """Whether no later request may pass it."""
        waited = now - self.arrivals[request.request_id].since
        preempted = request.status == RequestStatus.PREEMPTED
        return preempted or waited >= aged_after_s(self._aging_s)

    def sort_keys(self, request: Any) -> SortKeys:
        """Sort keys of a waiting request before it is looked at: nothing is known to be cached."""
        tokens = self.media.total(request) if self._plans(request) else 0
        self.backlog.set(request.request_id, tokens)
        rank_inputs = self._rank_inputs(request, tokens, request.num_tokens)
        return SortKeys(sort_key(rank_inputs, blocked=False), rank_inputs.order)

    def candidates(self, admission: Admission, now: float) -> list[Candidate]:
        """Requests without their first token, by rank; of many that wait some.

        Args:
            admission: Who was refused before.
            now: On the scheduler's clock.
        """
        scheduler = self._scheduler
        found = [
            self._candidate(r, admission, now) for r in scheduler.running if r.is_prefill_chunk
        ]
        found += [self._candidate(r, admission, now) for r in scheduler.kv_holding_waiting]
        if len(scheduler.waiting) <= 2 * LOOKED_AT or free_slots(scheduler):
            adapters = self._adapters()
            for request in scheduler.waiting.candidates():
                candidate = self._candidate(request, admission, now)
                blocked = scheduler._is_blocked_waiting_status(request.status)
                lacks = _adapter(request) not in adapters if adapters else False
                rank_now = sort_key(candidate.rank_inputs, blocked=blocked or lacks)
                scheduler.waiting.looked_at(
                    request, SortKeys(rank_now, candidate.rank_inputs.order)
                )
                found.append(candidate)
        for candidate in found:
            self.backlog.set(candidate.rank_inputs.key, candidate.rank_inputs.encoder_tokens)
        return sorted(
            found, key=lambda candidate: rank_of(candidate.rank_inputs, aged=candidate.aged)
        )

    def _plans(self, request: Any) -> bool:
        return self._plans_encoder and bool(request.has_encoder_inputs)

    def _candidate(self, request: Any, admission: Admission, now: float) -> Candidate:
        key, status = request.request_id, request.status
        if self._plans(request):
            need = self.media.need(request, now)
        else:
            computed = request.num_computed_tokens
            need = Need(computed) if computed else _NOTHING
        known = self._known.get(key)
        if known is None or known.need is not need or known.status is not status:
            candidate = self._described(request, need)
        else:
            candidate = known.candidate
        ready = status == RequestStatus.RUNNING or not (
            self._scheduler._is_blocked_waiting_status(status)
            or admission.backs_off(key, self._scheduler.current_step + 1)
            or admission.holds(request)
        )
        aged = is_aged(candidate.rank_inputs, now, self._aging_s)
        if candidate.ready != ready or candidate.aged != aged:
            candidate = candidate._replace(ready=ready, aged=aged)
        if known is None or candidate is not known.candidate:
            self._known[key] = _Known(candidate, need, status)
        return candidate

    def _described(self, request: Any, need: Need) -> Candidate:
        left = max(0, request.num_tokens - need.computed)
        rank_inputs = self._rank_inputs(request, need.tokens, left)
        return Candidate(
            request, rank_inputs, need.computed, left, need.items, ready=True, aged=False
        )

    def _rank_inputs(self, request: Any, encoder_tokens: int, left: int) -> RankInputs:
        key = request.request_id
        since, order = self.arrivals[key]
        return RankInputs(
            key,
            since,
            order,
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
