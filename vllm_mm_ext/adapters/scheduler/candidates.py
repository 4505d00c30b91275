"""Reads requests without their first token as the plan of a step wants them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from vllm.v1.core.sched.request_queue import SchedulingPolicy
from vllm.v1.request import RequestStatus

from vllm_mm_ext.adapters.scheduler.media_work import MediaWork, Need
from vllm_mm_ext.policies.scheduler.order import Order, Rank, aged_after_s
from vllm_mm_ext.policies.scheduler.step_plan import Candidate


class Arrival(NamedTuple):
    """When a request came, in seconds on the scheduler's clock, and its place in that order."""

    since: float
    order: Order


class Candidates:
    """Who came when and needs what.

    Args:
        scheduler: vLLM's scheduler.
        aging_s: The setting.
        plans_encoder: Encoder work is planned.

    Attributes:
        backlog: Encoder outputs that requests need, as far as each was last looked at.
        stuck: Running requests that got nowhere in the last step, though they were granted
            something.
    """

    def __init__(self, scheduler: Any, *, aging_s: float, plans_encoder: bool) -> None:
        self.arrivals: dict[str, Arrival] = {}
        self.media = MediaWork(scheduler)
        self.backlog = 0
        self.stuck: set[str] = set()
        self._aged_after_s = aged_after_s(aging_s)
        self._plans_encoder = plans_encoder
        self._by_priority = scheduler.policy == SchedulingPolicy.PRIORITY
        self._clock: Callable[[], float] = lambda: scheduler._clock()
        self._needs: dict[str, int] = {}
        self._came = 0

    def came(self, request: Any, arrival_time: float) -> None:
        """A request has come, or a streaming session goes on, which counts as one.

        Args:
            request: vLLM's request.
            arrival_time: When it came by vLLM's account: the API server takes that time.
        """
        self._came += 1
        order = (arrival_time if self._by_priority else 0.0, self._came)
        self.arrivals[request.request_id] = Arrival(self._clock(), order)

    def order(self, request: Any) -> Order:
        """A request's place in the order of coming."""
        return self.arrivals[request.request_id].order

    def is_aged(self, request: Any, now: float) -> bool:
        """Whether no later request may pass it."""
        waited = now - self.arrivals[request.request_id].since
        return request.status == RequestStatus.PREEMPTED or waited >= self._aged_after_s

    def first_rank(self, request: Any) -> Rank:
        """The rank of a request that begins to wait."""
        need = self.need(request, self._clock())
        work = 2 * need.tokens + request.num_tokens - need.computed
        resumes = request.status == RequestStatus.PREEMPTED
        return (0 if resumes else 1, self._priority(request), work, self.order(request))

    def read(self, request: Any, now: float, *, failed: bool) -> Candidate:
        """A request as it is now.

        Args:
            request: vLLM's request, which could get on.
            now: On the scheduler's clock.
            failed: It was granted something, and vLLM could not let it in.
        """
        key, need = request.request_id, self.need(request, now)
        return Candidate(
            key,
            self.arrivals[key].order,
            self._priority(request),
            need.computed,
            max(1, request.num_tokens - need.computed),
            need.items,
            need.tokens,
            bool(request.mm_features),
            request.status == RequestStatus.RUNNING,
            self.is_aged(request, now),
            failed or key in self.stuck,
        )

    def need(self, request: Any, now: float) -> Need:
        """What a request needs; where encoder work is not planned, and for text, no encoder."""
        if not self._plans_encoder or not request.has_encoder_inputs:
            return Need(request.num_computed_tokens)
        need = self.media.need(request, now)
        self._needs_encoding(request.request_id, need.tokens)
        return need

    def encoded(self, key: str, tokens: int) -> None:
        """So many encoder outputs that a request needs are made."""
        self._needs_encoding(key, max(0, self._needs.get(key, 0) - tokens))

    def has_prompt(self, key: str) -> None:
        """A request decodes from now on, whoever made its encoder outputs."""
        if self._needs.get(key):
            self._needs_encoding(key, 0)

    def forget(self, key: str) -> None:
        """The request is no more."""
        self.arrivals.pop(key, None)
        self.media.forget(key)
        self.backlog -= self._needs.pop(key, 0)

    def _needs_encoding(self, key: str, tokens: int) -> None:
        self.backlog += tokens - self._needs.get(key, 0)
        self._needs[key] = tokens

    def _priority(self, request: Any) -> int:
        return int(request.priority) if self._by_priority else 0


def decode_tokens(request: Any) -> int:
    """Tokens a decoding request takes in a step, drafts included."""
    ahead = request.num_tokens_with_spec + request.num_output_placeholders
    return max(0, int(ahead - request.num_computed_tokens))
