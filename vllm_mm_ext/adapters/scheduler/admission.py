"""Waiting requests that vLLM did not let in, and what is kept for them."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

from vllm.v1.request import RequestStatus

from vllm_mm_ext.adapters.scheduler.prompts import Prompts

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
        prompts: Tells who came when.
    """

    def __init__(self, scheduler: Any, prompts: Prompts) -> None:
        self._scheduler, self._prompts, self._order = scheduler, prompts, prompts.order
        self._refusals: dict[str, _Refusal] = {}
        # Those for whom blocks are kept, and the first one that lacks a place for its adapter.
        self._line: list[Any] = []
        self._adapted: Any = None
        self._now = 0.0

    def forget(self, key: str) -> None:
        """The request has what it lacked, or is no more."""
        self._refusals.pop(key, None)

    def goes_last(self, request: Any) -> bool:
        """Whether it goes behind all others in this step, which vLLM is about to begin."""
        refusal = self._refusals.get(request.request_id)
        if refusal is None or self._scheduler.current_step >= refusal.until:
            return False
        found = refusal.blocks and self._fit((request,))
        if found or (refusal.adapter and self.has_place(request)):
            # It has found what it lacked.
            self._refusals[request.request_id] = refusal._replace(until=0)
            return False
        return True

    def refuse(self, request: Any, *, blocks: bool = False, adapter: bool = False) -> None:
        """The request was tried in the current step and not let in."""
        until = self._scheduler.current_step + BACK_OFF
        self._refusals[request.request_id] = _Refusal(until, blocks, adapter)

    def note(self, planned: set[str], tried: dict[str, Any], scheduled: Any) -> None:
        """Learn from a step who was refused, and open the door until the next one.

        Args:
            planned: Requests that were to encode something.
            tried: Of the waiting ones those that vLLM tried, by id.
            scheduled: Ids of what it scheduled.
        """
        scheduler = self._scheduler
        for key in self._refusals.keys() & scheduled.keys():
            self.forget(key)
        for key, request in tried.items():
            # What vLLM skips is deferred; where it finds no KV blocks its walk ends instead.
            skipped = request in scheduler.deferred_waiting
            # KV that it loads, or its own last tokens, come to it whoever goes first.
            awaits = scheduler._is_blocked_waiting_status(request.status)
            if key in scheduled or awaits or request.num_stale_output_tokens:
                continue
            if skipped or key in planned:
                self.refuse(request, blocks=not skipped)
        self._line, self._adapted = [], None

    def keep_door(self, now: float) -> None:
        """Find for whom the door is kept in a step that begins now."""
        self._now, running = now, self._scheduler.running
        refused = [(self._scheduler.requests[key], lacks) for key, lacks in self._refusals.items()]
        aged = [pair for pair in refused if running and self._prompts.is_aged(pair[0], now)]
        begun = (one for one in running if one.is_prefill_chunk)
        self._line = [one for one in begun if self._prompts.is_aged(one, now)]
        self._line += [one for one, lacks in aged if lacks.blocks]
        adapted = (one for one, lacks in aged if lacks.adapter)
        self._adapted = min(adapted, key=self._order, default=None)

    def holds(self, request: Any) -> bool:
        """Whether a waiting request must not be let in, for one that came before it.

        To be asked of requests in the order of their coming.
        """
        order, resumes = self._order(request), request.status == RequestStatus.PREEMPTED
        if resumes or request.num_computed_tokens:
            return False
        if self.keeps_place(request):
            return True
        before = [one for one in self._line if self._order(one) < order]
        # Whoever was let in takes what its prompt lacks, aged or not. Decodes lack one token.
        running = self._scheduler.running if before else ()
        begun = (one for one in running if one.num_computed_tokens + 1 < one.num_tokens)
        if not before or self._fit({*before, *begun, request}):
            return False
        if self._prompts.is_aged(request, self._now) and request not in self._line:
            # Those that come after it must not have its blocks either.
            self._line.append(request)
        return True

    def keeps_place(self, request: Any) -> bool:
        """Whether the door keeps a place for the adapter of one before it."""
        first, lora = self._adapted, request.lora_request
        others = first is not None and lora and first.lora_request.lora_int_id != lora.lora_int_id
        return bool(others and self._order(first) < self._order(request))

    def _fit(self, requests: Iterable[Any]) -> bool:
        """Whether there are KV blocks for what all of these still need."""
        needed = sum(self._scheduler._request_remaining_blocks(one) for one in requests)
        return bool(needed <= self._scheduler.kv_cache_manager.block_pool.get_num_free_blocks())

    def has_place(self, request: Any) -> bool:
        """Whether the running requests leave a place for its LoRA adapter."""
        if not request.lora_request:
            return True
        loras = (one.lora_request for one in (*self._scheduler.running, request))
        adapters = {lora.lora_int_id for lora in loras if lora}
        return bool(len(adapters) <= self._scheduler.lora_config.max_loras)
