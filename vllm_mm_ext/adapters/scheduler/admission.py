"""Waiting requests that vLLM did not let in, and what is kept for them."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

from vllm.v1.request import RequestStatus

from vllm_mm_ext.policies.scheduler.step_plan import Order

# Steps in which a request goes last after vLLM found no room for it against the plan: it would stop
# those behind it, which lack nothing. For correctness, not speed: no traffic is faster by it.
BACK_OFF = 8


class _Refusal(NamedTuple):
    """The last step in which the request goes last, and what it lacked."""

    until: int
    blocks: bool = False
    adapter: bool = False


class Admission:
    """Refused requests, and the door that is kept for the aged ones among them.

    A refused request goes last for ``BACK_OFF`` steps, so that others pass it. It may have lacked
    KV blocks or a place for its LoRA adapter, which later requests could take for ever. So once it
    is aged, these are let in only with KV blocks that running requests, it and such ones before
    them do not need, not with an adapter other than its own if that is what it lacks. An aged one
    whose prompt is not computed yet keeps blocks as well. What runs ends, hence each gets its turn.
    The door is open while nothing runs: blocks may be held by sessions that wait for input.

    Args:
        scheduler: vLLM's scheduler.
        order: Tells a request's place in the order of coming.
    """

    def __init__(self, scheduler: Any, order: Callable[[Any], Order]) -> None:
        self._scheduler = scheduler
        self._order = order
        self._refusals: dict[str, _Refusal] = {}
        # Those for whom blocks are kept, and the first one that lacks a place for its adapter.
        self._line: list[Any] = []
        self._adapted: Any = None
        self._is_aged: Callable[[Any], bool] = bool

    def forget(self, key: str) -> None:
        """The request has what it lacked, or is no more."""
        self._refusals.pop(key, None)

    def goes_last(self, request: Any) -> bool:
        """Whether it goes behind all others in this step, which vLLM is about to begin."""
        refusal = self._refusals.get(request.request_id)
        return refusal is not None and self._scheduler.current_step < refusal.until

    def refuse(self, request: Any, *, blocks: bool = False, adapter: bool = False) -> None:
        """Vllm tried the request in the current step and did not let it in."""
        until = self._scheduler.current_step + BACK_OFF
        self._refusals[request.request_id] = _Refusal(until, blocks, adapter)

    def note(self, planned: Iterable[str], tried: dict[str, Any], scheduled: Any) -> None:
        """Learn from a step who was refused.

        Args:
            planned: Requests that were to encode something.
            tried: Of the waiting ones those that vLLM tried, by id.
            scheduled: Ids of what it scheduled.
        """
        scheduler = self._scheduler
        for key in self._refusals.keys() & scheduled.keys():
            self.forget(key)
        for key in planned:
            request = tried.get(key)
            if request is None or key in scheduled or request.status == RequestStatus.RUNNING:
                continue
            if not scheduler._is_blocked_waiting_status(request.status):
                # What vLLM skips is deferred; where it finds no KV blocks its walk ends instead.
                skipped = request in scheduler.deferred_waiting
                adapter = skipped and not self._place(request)
                self.refuse(request, blocks=not skipped, adapter=adapter)

    def keep_door(self, is_aged: Callable[[Any], bool]) -> None:
        """Find for whom the door is kept. Who finds what it lacked goes last no more."""
        running, requests = self._scheduler.running, self._scheduler.requests
        self._line = [one for one in running if one.is_prefill_chunk and is_aged(one)]
        self._adapted, self._is_aged = None, is_aged
        for request in sorted((requests[key] for key in self._refusals), key=self._order):
            key = request.request_id
            refusal = self._refusals[key]
            fits = refusal.blocks and self._fit((request,))
            if fits or (refusal.adapter and self._place(request)):
                self._refusals[key] = refusal._replace(until=0)
            if running and is_aged(request):
                if refusal.blocks:
                    self._line.append(request)
                elif refusal.adapter and self._adapted is None:
                    self._adapted = request

    def holds(self, request: Any) -> bool:
        """Whether a waiting request must not be let in, for one that came before it.

        To be asked of requests in the order of their coming.
        """
        order, resumes = self._order(request), request.status == RequestStatus.PREEMPTED
        if resumes or request.num_computed_tokens:
            return False
        first, lora = self._adapted, request.lora_request
        others = first is not None and lora and first.lora_request.lora_int_id != lora.lora_int_id
        if others and self._order(first) < order:
            return True
        before = [one for one in self._line if self._order(one) < order]
        # Whoever was let in takes what its prompt lacks, aged or not. Decodes lack one token.
        running = self._scheduler.running if before else ()
        begun = (one for one in running if one.num_computed_tokens + 1 < one.num_tokens)
        if not before or self._fit({*before, *begun, request}):
            return False
        if self._is_aged(request) and request not in self._line:
            # Those that come after it must not have its blocks either.
            self._line.append(request)
        return True

    def _fit(self, requests: Iterable[Any]) -> bool:
        """Whether there are KV blocks for what all of these still need."""
        needed = sum(self._scheduler._request_remaining_blocks(one) for one in requests)
        return bool(needed <= self._scheduler.kv_cache_manager.block_pool.get_num_free_blocks())

    def _place(self, request: Any) -> bool:
        """Whether the running requests leave a place for its LoRA adapter."""
        config, wanted = self._scheduler.lora_config, request.lora_request
        if not (config and wanted):
            return True
        loras = (one.lora_request for one in self._scheduler.running)
        adapters = {lora.lora_int_id for lora in loras if lora}
        return wanted.lora_int_id in adapters or len(adapters) < config.max_loras
