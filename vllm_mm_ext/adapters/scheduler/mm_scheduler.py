"""vLLM's schedulers with encoder work apart from prefill and decoding.

Each step is prepared before vLLM's own ``schedule`` runs: requests are put into order, and what
they may do is limited. What happens within these limits is vLLM's code.
"""

from __future__ import annotations

import logging
import math
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.request import RequestStatus

from vllm_mm_ext.adapters.names.scheduler_names import CADENCE_ATTRIBUTES
from vllm_mm_ext.adapters.scheduler.admission import Admission, Scarce
from vllm_mm_ext.adapters.scheduler.candidate_reader import CandidateReader, free_slots
from vllm_mm_ext.adapters.scheduler.encoder_inputs import EncoderInputs
from vllm_mm_ext.adapters.scheduler.load_publisher import LoadPublisher
from vllm_mm_ext.adapters.scheduler.queue import ArrangedQueue
from vllm_mm_ext.adapters.scheduler.start_warnings import start_warnings
from vllm_mm_ext.adapters.scheduler.step_candidates import (
    Candidate,
    chunk_limits,
    decode_tokens,
    demands,
    finishing_first,
)
from vllm_mm_ext.adapters.scheduler.step_demand import StepState, running_of, step_demand, text_of
from vllm_mm_ext.base.heap import trim_when_due
from vllm_mm_ext.config.root import MMExtConfig
from vllm_mm_ext.policies.scheduler.encoder_plan import EncoderCapacity, EncoderPlan, plan
from vllm_mm_ext.policies.scheduler.step_budget import Remainder, StepBudget, StepLimits
from vllm_mm_ext.policies.scheduler.step_times import StepTimes, StepWork, attended

logger = logging.getLogger("vllm.mm_ext")

# Steps whose end is still awaited; more were given up.
_MOST_IN_FLIGHT = 64


class MMExtScheduler(Scheduler):  # type: ignore[misc]
    """For ``--scheduler-cls``; asynchronous where vLLM schedules asynchronously."""

    def __new__(cls, vllm_config: Any, *_args: Any, **_kwargs: Any) -> MMExtScheduler:
        """Choose the variant that fits the configuration."""
        if cls is MMExtScheduler and vllm_config.scheduler_config.async_scheduling:
            cls = MMExtAsyncScheduler
        return object.__new__(cls)

    def __init__(self, vllm_config: Any, *args: Any, **kwargs: Any) -> None:
        super().__init__(vllm_config, *args, **kwargs)
        if vllm_config.model_config.is_diffusion:
            raise ValueError("mm_ext: diffusion models need vLLM's own scheduler")
        # Not what the plugin left at the model's configuration: it may not be in VLLM_PLUGINS.
        config = MMExtConfig.from_additional_config(vllm_config.additional_config)
        self._settings = config.scheduler
        self._clock: Callable[[], float] = time.monotonic
        self._times = StepTimes()
        self._max_tokens: int = self.max_num_scheduled_tokens
        self._budget = StepBudget(
            self._settings, self._max_tokens, self.max_num_encoder_input_tokens
        )
        self._plans_encoder = self.max_num_encoder_input_tokens > 0 and not self.is_encoder_decoder
        # Where vLLM must compute prompts or blocks in one piece, a limit could stop them for good.
        self._limits_prefill = not (
            self.need_mamba_block_aligned_split
            or self.scheduler_config.disable_chunked_mm_input
            or not self.scheduler_config.enable_chunked_prefill
        )
        for warning in start_warnings(self, self._settings, limits_prefill=self._limits_prefill):
            logger.warning("mm_ext: %s", warning)
        self._reader = CandidateReader(
            self,
            aging_s=self._settings.aging_s,
            max_tokens=self._max_tokens,
            plans_encoder=self._plans_encoder,
        )
        self.waiting = ArrangedQueue(self._reader.sort_keys)
        self._plan = EncoderPlan()
        self._waits_for_encoder: set[str] = set()
        self._aged: set[str] = set()
        self._kept_slots = 0
        self._kept_before: dict[str, int] = {}
        self._reserved_slots = min(self._settings.text_slots, int(self.max_num_active_reqs) // 4)
        self._most_kept_slots = max(1, int(self.max_num_active_reqs) // 4)
        self._admission = Admission(self, self._reader.order, self._in_transit)
        self._encoder_inputs = EncoderInputs(self, self._reader.media)
        self._tried: dict[str, Any] = {}
        # In this step no other waiting request is let in.
        self._walk_ends = False
        self._chunks: dict[str, int] = {}
        self._begun: OrderedDict[int, tuple[float, StepWork]] = OrderedDict()
        self._ended = -math.inf
        self._backlog = 0
        self._publisher = LoadPublisher(self)

    # --- a step -----------------------------------------------------------------------------------

    def schedule(self, throttle_prefills: bool = False) -> Any:
        """Prepare a step, and let vLLM fill it."""
        now = self._clock()
        decoding = [request for request in self.running if not request.is_prefill_chunk]
        waits = self.waiting or self.kv_holding_waiting
        if not waits and len(decoding) == len(self.running):
            return self._decode(decoding, throttle_prefills, now)
        decodes = sum(decode_tokens(request) for request in decoding)
        for request in self._admission.keep_door(lambda one: self._reader.is_aged(one, now)):
            self._reader.media.look_again(request)
        self._tried, self._walk_ends = {}, False
        candidates, finish = finishing_first(
            self._reader.candidates(self._admission, now),
            lambda left: self._budget.finishes(left, self._times, decodes),
        )
        # Decodes first. The last one in ``running`` is the first that vLLM preempts.
        running = [candidate.request for candidate in candidates if candidate.is_running]
        self.running[:] = [*decoding, *running]
        self._no_backlog(decoding)
        limits = self._limits(decodes, candidates, finish)
        self._plan_encoder(candidates, limits)
        held = bool(decoding) and self._holds_prefill(throttle_prefills)
        with self._limited(limits), self.waiting.showing(self._shown(candidates)):
            output = super().schedule(throttle_prefills)
        self._send_all_inputs(output)
        self._reader.media.note(output)
        if not held:
            self._admission.note(self._plan.items, self._tried, output.num_scheduled_tokens)
        self._note(output, {request.request_id for request in decoding}, now)
        return output

    def _decode(self, decoding: list[Any], throttle_prefills: bool, now: float) -> Any:
        """A step without a prompt is vLLM's own: most steps are, and they are short."""
        self._no_backlog(decoding)
        self._budget.no_prompts()
        self._plan, self._chunks = EncoderPlan(), {}
        output = super().schedule(throttle_prefills)
        self._reader.media.note(output)
        self._admission.note((), {}, output.num_scheduled_tokens)
        self._begin(output, StepWork(output.total_num_scheduled_tokens, 0, 0), now)
        return output

    def _no_backlog(self, decoding: list[Any]) -> None:
        """What decodes has nothing left to encode."""
        if self._reader.backlog.tokens:
            for request in decoding:
                self._reader.backlog.set(request.request_id, 0)
        self._backlog = self._reader.backlog.tokens

    def add_request(self, request: Any) -> None:
        """Note when it came; give back what the media of earlier ones left free in the heap."""
        if request.request_id not in self._reader.arrivals:
            self._reader.came(request, self._clock(), request.arrival_time)
        if request.mm_features:
            trim_when_due()
        super().add_request(request)

    def _update_request_as_session(self, session: Any, update: Any) -> None:
        """Count what a streaming session goes on with as a request that comes now."""
        self._reader.came(session, self._clock(), update.arrival_time)
        super()._update_request_as_session(session, update)

    def _in_transit(self, request: Any) -> bool:
        """Whether a waiting request has to wait for a connector that still fetches for it."""
        return self._reader.media.in_transit(request, self._clock())

    def _holds_prefill(self, throttled: bool) -> bool:
        """Whether vLLM begins no prefill in this step, in which something decodes.

        Data-parallel engines are throttled together; by itself an engine of vLLM 0.33 keeps to
        ``--prefill-schedule-interval``. Neither holds prompts back that a step had no room for.
        """
        interval, last, executed = (getattr(self, name, 0) for name in CADENCE_ATTRIBUTES)
        early = interval > 1 and executed + 1 - last < interval
        return (throttled or early) and not self.prefill_capacity_bound

    def _free_slots(self) -> int:
        return free_slots(self)

    def _limits(self, decodes: int, candidates: list[Candidate], finish: Remainder) -> StepLimits:
        """Limits of a step that decodes so many tokens, and of running requests within them."""
        state = StepState(
            decodes=decodes,
            slots=self._free_slots(),
            reserved=self._reserved_slots,
            cache_tokens=self._cache_capacity(),
            limits_prefill=self._limits_prefill,
            failed=self._admission.failed,
        )
        demand = step_demand(candidates, finish, state)
        limits = self._budget.limits(demand, self._times)
        if not self._limits_prefill:
            return replace(limits, tokens=self._max_tokens, prefill_tokens=self._max_tokens)
        running, text = running_of(candidates), text_of(candidates, state.slots)
        self._chunks = chunk_limits(limits, running, text, finish)
        return limits

    def _plan_encoder(self, candidates: list[Candidate], limits: StepLimits) -> None:
        capacity = EncoderCapacity(
            tokens=limits.encoder_tokens,
            items=self._settings.max_encoder_batch,
            cache_tokens=self._cache_capacity(),
            slots=self._free_slots(),
            reserved=self._reserved_slots,
            lookahead=self._settings.lookahead_items,
        )
        reach = limits.prefill_tokens + self.num_prefill_lookahead
        media = [candidate for candidate in candidates if candidate.items]
        ready = [candidate for candidate in media if candidate.ready]
        self._plan = plan(demands(ready, self._admission.failed, reach), capacity)
        waits = {candidate.rank_inputs.key for candidate in media} - self._plan.items.keys()
        self._waits_for_encoder = waits
        self._aged = {candidate.rank_inputs.key for candidate in candidates if candidate.aged}

    def _shown(self, candidates: list[Candidate]) -> list[Any]:
        """Waiting requests that vLLM may let in.

        For aged ones among the others slots are kept: as many as may soon be let in together.
        """
        shown, kept = [], 0
        self._kept_slots, self._kept_before = 0, {}
        for candidate in candidates:
            request, key = candidate.request, candidate.rank_inputs.key
            if request not in self.waiting:
                continue
            if candidate.ready and key in self._waits_for_encoder:
                kept += candidate.aged
                self.deferred_waiting.add(request)
            else:
                self._kept_before[key] = kept
                shown.append(request)
        return shown

    def _cache_capacity(self) -> int:
        """Encoder outputs the cache can take, where its manager says so."""
        capacity = getattr(self.encoder_cache_manager, "num_freeable_slots", None)
        return self.max_num_encoder_input_tokens if capacity is None else int(capacity)

    @contextmanager
    def _limited(self, limits: StepLimits) -> Iterator[None]:
        """Put the limit where vLLM's ``schedule`` reads it, for the time it runs."""
        self.max_num_scheduled_tokens = limits.tokens
        try:
            yield
        finally:
            self.max_num_scheduled_tokens = self._max_tokens

    def _send_all_inputs(self, output: Any) -> None:
        """Send new requests with the inputs of all their items.

        vLLM leaves out those of items whose KV is there. A V1 model runner gets nothing sent again
        when a request goes on after it was preempted, and if the KV is gone by then, it would have
        nothing to encode. V2 runners get such a request as a new one.
        """
        if self.use_v2_model_runner:
            return
        for new in output.scheduled_new_reqs:
            new.mm_features = self.requests[new.req_id].mm_features

    def _note(self, output: Any, decoding: set[str], now: float) -> None:
        """Account for what was scheduled; its time is taken when its output comes."""
        encoded = sum(
            self.requests[key].get_num_encoder_embeds(index)
            for key, indices in output.scheduled_encoder_inputs.items()
            for index in indices
        )
        self._budget.spent(encoded)
        self._backlog = max(0, self._backlog - encoded)
        scheduled = output.num_scheduled_tokens
        prefill = {key: n for key, n in scheduled.items() if key not in decoding}
        # vLLM has counted the step's tokens as computed.
        pairs = (
            attended(n, self.requests[key].num_computed_tokens - n) for key, n in prefill.items()
        )
        work = StepWork(
            decodes=sum(scheduled[key] for key in decoding & scheduled.keys()),
            prefill_tokens=sum(prefill.values()),
            encoder_tokens=encoded,
            attended=sum(pairs),
        )
        self._begin(output, work, now)

    def _begin(self, output: Any, work: StepWork, now: float) -> None:
        self._begun[id(output)] = (now, work)
        if len(self._begun) > _MOST_IN_FLIGHT:
            self._begun.popitem(last=False)

    def update_from_output(self, scheduler_output: Any, model_runner_output: Any) -> Any:
        """Learn what the step took."""
        begun = self._begun.pop(id(scheduler_output), None)
        now = self._clock()
        if begun is not None:
            # Of overlapping steps, a later one starts when the one before it ends.
            at, work = begun
            self._times.observe(work, now - max(at, self._ended))
        self._ended = now
        outputs = super().update_from_output(scheduler_output, model_runner_output)
        self._publisher.publish(self._backlog, self._times)
        return outputs

    def shutdown(self) -> None:
        """Take the engine's figures back."""
        self._publisher.close()
        super().shutdown()

    # --- what vLLM's schedule asks ----------------------------------------------------------------

    def _handle_blocked_waiting_request(self, request: Any) -> bool:
        """Pass a request over that waits for the encoder: it gets no slot and stops nobody.

        But slots are kept for aged ones among them: as many as may soon be let in together.
        """
        if not super()._handle_blocked_waiting_request(request) or self._walk_ends:
            return False
        key = request.request_id
        aged = key in self._aged
        waits = key in self._waits_for_encoder
        if waits or self._admission.backs_off(key, self.current_step):
            self._kept_slots += aged
            return False
        kept = min(self._kept_slots + self._kept_before.get(key, 0), self._most_kept_slots)
        has_slot = aged or self._free_slots() > kept
        if not has_slot or self._admission.holds(request):
            return False
        self._tried[key] = request
        self.deferred_waiting.discard(request)
        return True

    def _reserve_prefill_lookahead(
        self, request: Any, num_computed_tokens: int, num_new_tokens: int
    ) -> int:
        """Keep to the request's share of the step's prefill."""
        most = self._chunks.get(request.request_id, num_new_tokens)
        found = super()._reserve_prefill_lookahead(
            request, num_computed_tokens, min(num_new_tokens, most)
        )
        return int(found)

    def _try_schedule_encoder_inputs(
        self,
        request: Any,
        num_computed_tokens: int,
        num_new_tokens: int,
        encoder_compute_budget: int,
        shift_computed_tokens: int = 0,
    ) -> tuple[list[int], int, int, list[int], list[int]]:
        """Encode what the plan gives the request, lookahead included."""
        if not self._plans_encoder:
            found = super()._try_schedule_encoder_inputs(
                request,
                num_computed_tokens,
                num_new_tokens,
                encoder_compute_budget,
                shift_computed_tokens,
            )
            return found  # type: ignore[no-any-return]
        items, tokens, spent, external, duplicates = self._encoder_inputs.schedule(
            super()._try_schedule_encoder_inputs,
            request,
            self._plan.items.get(request.request_id, ()),
            num_computed_tokens,
            num_new_tokens,
            shift_computed_tokens,
        )
        if not tokens and request.status != RequestStatus.RUNNING:
            self._pass_over(request)
        return items, tokens, encoder_compute_budget - spent, external, duplicates

    def _pass_over(self, request: Any) -> None:
        """Note that a waiting request gets nothing in this step: it lacks encoder outputs."""
        self._tried.pop(request.request_id, None)
        if request.request_id in self._aged:
            # It must not be passed meanwhile; vLLM 0.32 ends its walk here, later ones go on.
            self._walk_ends = True
            self._reader.media.look_again(request)
        else:
            self._admission.refuse(request, Scarce.OTHER)
        self.encoder_cache_manager.free(request)

    def _free_request(self, request: Any, *args: Any, **kwargs: Any) -> Any:
        """Forget the request."""
        key = request.request_id
        self._admission.forget(key)
        self._reader.forget(key)
        return super()._free_request(request, *args, **kwargs)


class MMExtAsyncScheduler(MMExtScheduler, AsyncScheduler):  # type: ignore[misc]
    """The same over vLLM's asynchronous scheduler."""
