"""vLLM's schedulers with encoder work apart from prefill and decoding.

Each step is prepared before vLLM's own ``schedule`` runs: requests are put into order, and what
they may do is limited. What happens within these limits is vLLM's code.
"""

from __future__ import annotations

import logging
import math
import time
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.request import RequestStatus

from vllm_mm_ext.adapters.names.scheduler_names import CADENCE_ATTRIBUTES
from vllm_mm_ext.adapters.scheduler.admission import Admission, Scarce
from vllm_mm_ext.adapters.scheduler.candidates import Candidates, decode_tokens
from vllm_mm_ext.adapters.scheduler.encoder_inputs import EncoderInputs
from vllm_mm_ext.adapters.scheduler.load_publisher import LoadPublisher
from vllm_mm_ext.adapters.scheduler.queue import LOOKED_AT, ArrangedQueue
from vllm_mm_ext.adapters.scheduler.start_warnings import start_warnings
from vllm_mm_ext.base.heap import trim_when_due
from vllm_mm_ext.config.root import MMExtConfig
from vllm_mm_ext.policies.scheduler.step_plan import (
    Candidate,
    Room,
    StepPlan,
    plan,
    step_seconds,
)
from vllm_mm_ext.policies.scheduler.step_times import StepTimes, StepWork, attended

logger = logging.getLogger("vllm.mm_ext")

# Steps whose end is still awaited; more were given up.
_MOST_IN_FLIGHT = 64
# Waiting requests that a step looks at if all before them are let in.
_MOST_LOOKED_AT = 256


class MMExtScheduler(Scheduler):  # type: ignore[misc]
    """For ``--scheduler-cls``; asynchronous where vLLM schedules asynchronously."""

    max_num_scheduled_tokens: int

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
        self._max_tokens = self.max_num_scheduled_tokens
        self._plans_encoder = self.max_num_encoder_input_tokens > 0 and not self.is_encoder_decoder
        # Where vLLM must compute prompts or blocks in one piece, a limit could stop them for good.
        self._limits_prefill = not (
            self.need_mamba_block_aligned_split
            or self.scheduler_config.disable_chunked_mm_input
            or not self.scheduler_config.enable_chunked_prefill
        )
        for warning in start_warnings(self, self._settings, limits_prefill=self._limits_prefill):
            logger.warning("mm_ext: %s", warning)
        self._candidates = Candidates(
            self, aging_s=self._settings.aging_s, plans_encoder=self._plans_encoder
        )
        self._media = self._candidates.media
        self._admission = Admission(self, self._candidates.order, self._in_transit)
        self._encoder_inputs = EncoderInputs(self, self._media)
        self.waiting = ArrangedQueue(self._candidates.order, self._candidates.first_rank)
        self._plan = StepPlan()
        # By how much steps took longer than theirs, for items too large for any.
        self._late_s = self._room_s = 0.0
        self._tried: dict[str, Any] = {}
        # In this step no other waiting request is let in.
        self._walk_ends = False
        self._begun: OrderedDict[int, tuple[float, StepWork]] = OrderedDict()
        self._ended = -math.inf
        self._publisher = LoadPublisher(self)

    # --- a step -----------------------------------------------------------------------------------

    def schedule(self, throttle_prefills: bool = False) -> Any:
        """Prepare a step, and let vLLM fill it."""
        now = self._clock()
        decoding = [request for request in self.running if not request.is_prefill_chunk]
        if len(decoding) == len(self.running) and not (self.waiting or self.kv_holding_waiting):
            return self._decode(throttle_prefills, now)
        for request in self._admission.keep_door(lambda one: self._candidates.is_aged(one, now)):
            self._media.look_again(request)
        decodes = sum(decode_tokens(request) for request in decoding)
        candidates = self._planned(decodes, now)
        requests = [self.requests[one.key] for one in candidates]
        # Decodes first. The last one in ``running`` is the first that vLLM preempts.
        running = [one for one in requests if one.status == RequestStatus.RUNNING]
        self.running[:] = [*decoding, *running]
        grants = self._plan.grants
        shown = [one for one in requests if one in self.waiting and one.request_id in grants]
        self._tried, self._walk_ends = {}, False
        held = bool(decoding) and self._holds_prefill(throttle_prefills)
        limit = decodes + self._plan.tokens if self._limits_prefill else self._max_tokens
        # Put where vLLM's ``schedule`` reads it, for the time it runs.
        self.max_num_scheduled_tokens = max(1, min(limit, self._max_tokens))
        try:
            with self.waiting.showing(shown):
                output = super().schedule(throttle_prefills)
        finally:
            self.max_num_scheduled_tokens = self._max_tokens
        self._send_all_inputs(output)
        self._media.note(output)
        self._candidates.stuck = {one.request_id for one in running if one.request_id in grants}
        self._candidates.stuck -= output.num_scheduled_tokens.keys()
        if not held:
            planned = [key for key, grant in grants.items() if grant.items]
            self._admission.note(planned, self._tried, output.num_scheduled_tokens)
        self._note(output, {request.request_id for request in decoding}, now)
        return output

    def _decode(self, throttle_prefills: bool, now: float) -> Any:
        """A step without a prompt is vLLM's own: most steps are, and they are short."""
        self._plan, self._late_s = StepPlan(), 0.0
        output = super().schedule(throttle_prefills)
        self._media.note(output)
        self._admission.note((), {}, output.num_scheduled_tokens)
        self._begin(output, StepWork(output.total_num_scheduled_tokens, 0, 0), now)
        return output

    def _planned(self, decodes: int, now: float) -> list[Candidate]:
        """Requests that could get on, by rank; ``_plan`` says what each is granted.

        Of many that wait those are looked at whose turn may come: the best, and the first to come.
        """
        running = [one for one in self.running if one.is_prefill_chunk]
        found = [self._candidate(one, now) for one in (*running, *self.kv_holding_waiting)]
        count, slots, waiting = LOOKED_AT, self._free_slots(), self.waiting
        looked: dict[Any, Candidate | None] = {}
        first, later = waiting.first(count)
        if slots or len(waiting) <= len(first):
            looked = {one: self._looked_at(one, now) for one in waiting.around()}
        while True:
            if slots or len(waiting) <= len(first):
                for request in first:
                    if request not in looked:
                        looked[request] = self._looked_at(request, now)
            # Nobody passes an aged request for not being looked at.
            kept = {
                bool(one.mm_features): self._candidates.order(one)
                for one in later
                if self._candidates.is_aged(one, now)
            }
            free = (
                one
                for one in looked.values()
                if one and one.order <= kept.get(one.media, one.order)
            )
            candidates = sorted((*filter(None, found), *free), key=lambda one: one.rank)
            self._plan = self._filled(candidates, decodes)
            waits = any(one.key not in self._plan.grants for one in candidates)
            if waits or len(looked) >= len(waiting) or count >= _MOST_LOOKED_AT or not slots:
                return candidates
            count *= 2
            first, later = waiting.first(count)

    def _looked_at(self, request: Any, now: float) -> Candidate | None:
        """A waiting request, and in the queue its rank as it is now; None if it cannot get on."""
        candidate = self._candidate(request, now)
        if candidate is None:
            self.waiting.looked_at(request, (3, *self._candidates.first_rank(request)[1:]))
            self.deferred_waiting.add(request)
        else:
            self.waiting.looked_at(request, candidate._replace(aged=False).rank)
        return candidate

    def _candidate(self, request: Any, now: float) -> Candidate | None:
        """A request as the plan wants it; None if it cannot get on."""
        key = request.request_id
        if request.status != RequestStatus.RUNNING and not (
            super()._handle_blocked_waiting_request(request)
            and not self._admission.backs_off(key, self.current_step + 1)
            and not self._admission.holds(request)
        ):
            return None
        return self._candidates.read(request, now, failed=self._admission.failed(key))

    def _filled(self, candidates: list[Candidate], decodes: int) -> StepPlan:
        """What the candidates are granted in a step that decodes so many tokens."""
        settings, times = self._settings, self._times
        aged = any(one.aged for one in candidates)
        base = times.base_s(decodes, prompts=True)
        # The target is for most steps, not for the mean of those that encode.
        target = settings.target_itl_ms / 1e3 / (1 + times.encoder_spread)
        seconds = media_s = step_seconds(target, base, aged=aged)
        beside = decodes or not all(one.media for one in candidates)
        if not decodes:
            seconds, self._late_s = settings.encoder_step_idle_ms / 1e3, 0.0
            media_s = media_s if beside else seconds
        # One item tells what encoding costs here.
        learns = beside and times.encoder_s is None
        self._room_s = media_s
        bound = int(self.max_num_encoder_input_tokens)
        # Encoder outputs that the cache can take, where its manager says so.
        space: int = getattr(self.encoder_cache_manager, "num_freeable_slots", bound)
        room = Room(
            seconds,
            media_s,
            tokens=max(1, self._max_tokens - decodes),
            encoder_tokens=min(space, bound),
            items=1 if learns else settings.max_encoder_batch,
            slots=self._free_slots(),
            reserved=min(settings.text_slots, int(self.max_num_active_reqs) // 4),
            most_kept=max(1, int(self.max_num_active_reqs) // 4),
            shift=self.num_prefill_lookahead,
            late_s=self._late_s,
            prefill_counts=self._limits_prefill,
        )
        return plan(candidates, room, times)

    def _free_slots(self) -> int:
        used = len(self.running) + self.num_waiting_for_streaming_input
        return max(0, int(self.max_num_active_reqs - used))

    def _holds_prefill(self, throttled: bool) -> bool:
        """Whether vLLM begins no prefill in this step, in which something decodes.

        Data-parallel engines are throttled together; by itself an engine of vLLM 0.33 keeps to
        ``--prefill-schedule-interval``. Neither holds prompts back that a step had no room for.
        """
        interval, last, executed = (getattr(self, name, 0) for name in CADENCE_ATTRIBUTES)
        early = interval > 1 and executed + 1 - last < interval
        return (throttled or early) and not self.prefill_capacity_bound

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

    # --- what steps and requests were -------------------------------------------------------------

    def add_request(self, request: Any) -> None:
        """Note when it came; give back what the media of earlier ones left free in the heap."""
        if request.request_id not in self._candidates.arrivals:
            self._candidates.came(request, request.arrival_time)
        if request.mm_features:
            trim_when_due()
        super().add_request(request)

    def _update_request_as_session(self, session: Any, update: Any) -> None:
        """Count what a streaming session goes on with as a request that comes now."""
        self._candidates.came(session, update.arrival_time)
        super()._update_request_as_session(session, update)

    def _in_transit(self, request: Any) -> bool:
        """Whether a waiting request has to wait for a connector that still fetches for it."""
        return self._media.in_transit(request, self._clock())

    def _note(self, output: Any, decoding: set[str], now: float) -> None:
        """Account for what was scheduled; its time is taken when its output comes."""
        encoded = 0
        for key, indices in output.scheduled_encoder_inputs.items():
            tokens = sum(self.requests[key].get_num_encoder_embeds(index) for index in indices)
            encoded += tokens
            self._candidates.encoded(key, tokens)
        self._late_s = max(0.0, self._late_s - self._room_s + self._plan.seconds)
        scheduled = output.num_scheduled_tokens
        prefill = {key: n for key, n in scheduled.items() if key not in decoding}
        for key in prefill:
            if not self.requests[key].is_prefill_chunk:
                self._candidates.has_prompt(key)
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
        self._publisher.publish(self._candidates.backlog, self._times)
        return outputs

    def _free_request(self, request: Any, *args: Any, **kwargs: Any) -> Any:
        """Forget the request."""
        key = request.request_id
        self._admission.forget(key)
        self._candidates.forget(key)
        return super()._free_request(request, *args, **kwargs)

    def shutdown(self) -> None:
        """Take the engine's figures back."""
        self._publisher.close()
        super().shutdown()

    # --- what vLLM's schedule asks ----------------------------------------------------------------

    def _handle_blocked_waiting_request(self, request: Any) -> bool:
        """Pass a request over that is granted nothing: it gets no slot and stops nobody."""
        key = request.request_id
        if self._walk_ends or key not in self._plan.grants or self._admission.holds(request):
            return False
        if not super()._handle_blocked_waiting_request(request):
            return False
        self._tried[key] = request
        self.deferred_waiting.discard(request)
        return True

    def _reserve_prefill_lookahead(
        self, request: Any, num_computed_tokens: int, num_new_tokens: int
    ) -> int:
        """Keep to what the request is granted of the step's prefill."""
        if not (self._plan.grants or request.is_prefill_chunk or self.num_prefill_lookahead):
            return num_new_tokens
        grant = self._plan.grants.get(request.request_id)
        if self._limits_prefill and (grant or request.is_prefill_chunk):
            num_new_tokens = min(num_new_tokens, grant.tokens if grant else 0)
        found = super()._reserve_prefill_lookahead(request, num_computed_tokens, num_new_tokens)
        return int(found)

    def _try_schedule_encoder_inputs(
        self,
        request: Any,
        num_computed_tokens: int,
        num_new_tokens: int,
        encoder_compute_budget: int,
        shift_computed_tokens: int = 0,
    ) -> tuple[list[int], int, int, list[int], list[int]]:
        """Encode what the plan gives the request, beyond its prefill included."""
        if not self._plans_encoder:
            found = super()._try_schedule_encoder_inputs(
                request,
                num_computed_tokens,
                num_new_tokens,
                encoder_compute_budget,
                shift_computed_tokens,
            )
            return found  # type: ignore[no-any-return]
        grant = self._plan.grants.get(request.request_id)
        items, tokens, spent, external, duplicates = self._encoder_inputs.schedule(
            super()._try_schedule_encoder_inputs,
            request,
            grant.items if grant else (),
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
        if self._candidates.is_aged(request, self._clock()):
            # It must not be passed meanwhile; vLLM 0.32 ends its walk here, later ones go on.
            self._walk_ends = True
            self._media.look_again(request)
        else:
            self._admission.refuse(request, Scarce.OTHER)
        self.encoder_cache_manager.free(request)


class MMExtAsyncScheduler(MMExtScheduler, AsyncScheduler):  # type: ignore[misc]
    """The same over vLLM's asynchronous scheduler."""
