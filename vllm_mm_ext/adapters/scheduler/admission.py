"""Waiting requests that vLLM did not let in, and what is kept for them."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Iterable
from enum import Enum, auto
from typing import Any, NamedTuple

from vllm.v1.request import RequestStatus

from vllm_mm_ext.policies.scheduler.order import Order

# Steps for which a request is left alone after vLLM found no room for it against the plan.
BACK_OFF = 8
# Of the first to come among those that wait, so many may have blocks kept.
_LINE = 64


class Scarce(Enum):
    """What a request was refused for the lack of."""

    BLOCKS = auto()
    ADAPTER = auto()
    TRANSFER = auto()
    OTHER = auto()


class _Refusal(NamedTuple):
    """The last step of its back-off, and why."""

    until: int
    scarce: Scarce


class Admission:
    """Refused requests, and the door that is kept for the aged ones among them.

    A refused request is out of the encoder plan for ``BACK_OFF`` steps, so that others pass it, or
    until what it lacked is there: KV blocks, a place for its LoRA adapter, or what a connector
    fetches. Later requests could take the first two for ever. So once it is aged, these are let in
    only with KV blocks that neither its prompt nor those of aged requests between them need, not
    with a LoRA adapter other than its own if that is what it lacks. What runs ends, hence it gets
    its turn. The door is open while nothing runs and yet something lacks: blocks may be held by
    sessions that wait for input.

    Args:
        scheduler: vLLM's scheduler.
        order: Tells a request's place in the order of coming.
        in_transit: Whether a connector still fetches what a request needs.
    """

    def __init__(
        self,
        scheduler: Any,
        order: Callable[[Any], Order],
        in_transit: Callable[[Any], bool],
    ) -> None:
        self._scheduler = scheduler
        self._in_transit = in_transit
        self._order = order
        self._refusals: dict[str, _Refusal] = {}
        self._failed: set[str] = set()
        self._keeps: dict[Scarce, Any] = {}
        self._line: list[tuple[Order, int]] = []

    def forget(self, key: str) -> None:
        """The request has what it lacked, or is no more."""
        self._refusals.pop(key, None)
        self._failed.discard(key)

    def failed(self, key: str) -> bool:
        """Whether it was in a plan and not let in: it goes behind those that run from then on."""
        return key in self._failed

    def backs_off(self, key: str, step: int) -> bool:
        """Whether it is to be left alone in this step."""
        refusal = self._refusals.get(key)
        return refusal is not None and step <= refusal.until

    def refuse(self, request: Any, scarce: Scarce) -> None:
        """Vllm tried the request in the current step and did not let it in."""
        key = request.request_id
        self._failed.add(key)
        self._refusals[key] = _Refusal(self._scheduler.current_step + BACK_OFF, scarce)

    def note(self, planned: Iterable[str], tried: dict[str, Any], scheduled: Any) -> None:
        """Learn from a step who was refused.

        Args:
            planned: Requests of the encoder plan.
            tried: Of the waiting ones those that vLLM tried, by id.
            scheduled: Ids of what it scheduled.
        """
        known = self._failed | self._refusals.keys()
        for key in [key for key in known if key in scheduled]:
            refusal, request = self._refusals.get(key), self._scheduler.requests[key]
            self.forget(key)
            # What it still lacks is kept for it until its prompt is computed.
            if refusal and refusal.scarce is Scarce.BLOCKS and request.is_prefill_chunk:
                self._refusals[key] = _Refusal(0, Scarce.BLOCKS)
        for key in planned:
            request = self._scheduler.requests[key]
            if key in scheduled or request.status == RequestStatus.RUNNING:
                continue
            self._failed.add(key)
            if key in tried and not self._scheduler._is_blocked_waiting_status(request.status):
                self.refuse(request, self._cause(request))

    def _cause(self, request: Any) -> Scarce:
        # What vLLM skips is deferred; where it finds no KV blocks its walk ends instead.
        if request not in self._scheduler.deferred_waiting:
            return Scarce.BLOCKS
        adapted = self._scheduler.lora_config and request.lora_request
        if adapted and not self._is_there(request, Scarce.ADAPTER, self._adapters()):
            return Scarce.ADAPTER
        return Scarce.TRANSFER

    def _adapters(self) -> set[int]:
        """LoRA adapters of running requests."""
        running = self._scheduler.running
        return {one.lora_request.lora_int_id for one in running if one.lora_request}

    def keep_door(self, is_aged: Callable[[Any], bool]) -> list[Any]:
        """Find for whom the door is kept in this step: the first to come of those that lack it.

        Returns:
            Requests that find what they lacked, and so need not back off any longer.
        """
        self._keeps = {}
        running = self._scheduler.running
        adapters, found = self._adapters(), []
        for key in sorted(
            self._refusals, key=lambda key: self._order(self._scheduler.requests[key])
        ):
            request, (until, scarce) = self._scheduler.requests[key], self._refusals[key]
            there = self._is_there(request, scarce, adapters)
            if there and until > self._scheduler.current_step:
                self._refusals[key] = _Refusal(0, scarce)
                found.append(request)
            if (running or there) and is_aged(request):
                self._keeps.setdefault(scarce, request)
        first = self._keeps.get(Scarce.BLOCKS)
        self._line = [] if first is None else self._line_behind(first, is_aged)
        return found

    def _line_behind(self, first: Any, is_aged: Callable[[Any], bool]) -> list[tuple[Order, int]]:
        """By order of coming, who has the blocks kept, and how many all up to each of them lack.

        That is the first that was refused, and the aged ones after it: each may be refused as
        well once it is tried, and what is let in until then would have its blocks.
        """
        order = self._order(first)
        line: list[tuple[Order, int]] = []
        lacking = 0
        for one in (first, *sorted(self._scheduler.waiting.came(_LINE), key=self._order)):
            place = self._order(one)
            if one is first or (place > order and is_aged(one)):
                lacking += int(self._scheduler._request_remaining_blocks(one))
                line.append((place, lacking))
        return line

    def _is_there(self, request: Any, scarce: Scarce, adapters: set[int]) -> bool:
        if scarce is Scarce.ADAPTER:
            own = request.lora_request.lora_int_id
            return own in adapters or len(adapters) < self._scheduler.lora_config.max_loras
        if scarce is Scarce.TRANSFER:
            return not self._in_transit(request)
        return scarce is Scarce.BLOCKS and self._have_blocks(request)

    def _have_blocks(self, request: Any, kept: int = 0) -> bool:
        scheduler = self._scheduler
        needed = kept + scheduler._request_remaining_blocks(request)
        return bool(needed <= scheduler.kv_cache_manager.block_pool.get_num_free_blocks())

    def holds(self, request: Any) -> bool:
        """Whether a waiting request must not be let in, for one that came before it."""
        resumes = request.status == RequestStatus.PREEMPTED or request.num_computed_tokens
        if resumes or not self._keeps:
            return False
        before = self._before(Scarce.ADAPTER, request)
        if before is not None and request.lora_request:
            own, wanted = request.lora_request.lora_int_id, before.lora_request.lora_int_id
            if own != wanted:
                return True
        if self._before(Scarce.BLOCKS, request) is None:
            return False
        place = bisect_left(self._line, (self._order(request),))
        return not self._have_blocks(request, kept=self._line[place - 1][1])

    def _before(self, scarce: Scarce, request: Any) -> Any:
        kept = self._keeps.get(scarce)
        if kept is None or self._order(request) <= self._order(kept):
            return None
        return kept
