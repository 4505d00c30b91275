"""vLLM's schedulers with encoder work apart from prefill and decoding.

Each step is prepared before vLLM's own ``schedule`` runs: requests are put into order, and what
they may do is limited. What happens within these limits is vLLM's code.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable
from typing import Any

from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.interface import PauseState
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.request import RequestStatus

from vllm_mm_ext.adapters.encoder_cache.never_served import refuse_what_never_fits
from vllm_mm_ext.adapters.encoder_cache.runner_inputs import send_all_inputs
from vllm_mm_ext.adapters.names.scheduler_names import CADENCE_ATTRIBUTES
from vllm_mm_ext.adapters.scheduler.admission import Admission
from vllm_mm_ext.adapters.scheduler.choice import start_warnings
from vllm_mm_ext.adapters.scheduler.load_publisher import LoadPublisher
from vllm_mm_ext.adapters.scheduler.prompts import Prompts, decode_tokens
from vllm_mm_ext.adapters.scheduler.queue import ArrangedQueue
from vllm_mm_ext.adapters.vllm_compat import awaited_ahead
from vllm_mm_ext.base.heap import trim_when_due
from vllm_mm_ext.config.root import MMExtConfig
from vllm_mm_ext.policies.scheduler.step_plan import (
    Candidate,
    Item,
    Room,
    StepPlan,
    plan,
    step_seconds,
)
from vllm_mm_ext.policies.scheduler.step_times import StepTimes, StepWork, attended

logger = logging.getLogger("vllm.mm_ext")


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
        self._settings = MMExtConfig.from_additional_config(vllm_config.additional_config).scheduler
        self._clock: Callable[[], float] = time.monotonic
        self._times = StepTimes()
        self._plans_encoder = self.max_num_encoder_input_tokens > 0 and not self.is_encoder_decoder
        self._shift = awaited_ahead(vllm_config)
        # Where vLLM must compute prompts or blocks in one piece, a limit could stop them for good.
        self._limits_prefill = not (
            self.need_mamba_block_aligned_split
            or self.scheduler_config.disable_chunked_mm_input
            or not self.scheduler_config.enable_chunked_prefill
        )
        for warning in start_warnings(self):
            logger.warning("mm_ext: %s", warning)
        self._prompts = Prompts(
            self, aging_s=self._settings.aging_s, plans_encoder=self._plans_encoder
        )
        self._admission = Admission(self, self._prompts)
        self.waiting = ArrangedQueue(self._prompts.order, self._prompts.first_rank)
        self._plan = StepPlan()
        # By how much steps took longer than theirs, for items too large for any.
        self._late_s = self._room_s = 0.0
        self._tried: dict[str, Any] = {}
        # Running requests that got nowhere in the last step against the plan. What one lacks others
        # may hold, who get on only before it (``test_scheduler_with_caches`` stops without this).
        self._stuck: set[str] = set()
        # In this step no other waiting request is let in.
        self._walk_ends = False
        self._begun: dict[int, tuple[float, StepWork]] = {}
        self._ended = -math.inf
        self._publisher = LoadPublisher(self)

    # --- a step -----------------------------------------------------------------------------------

    def schedule(self, throttle_prefills: bool = False) -> Any:
        """Prepare a step, and let vLLM fill it."""
        now = self._clock()
        decoding = [request for request in self.running if not request.is_prefill_chunk]
        comes = self._admits() or (self._free_slots() and self.kv_holding_waiting)
        if len(decoding) == len(self.running) and not comes:
            return self._decode(throttle_prefills, now)
        self._admission.keep_door(now)
        candidates = self._looked_at(now)
        self._plan = self._filled(candidates, decoding)
        requests = [self.requests[one.key] for one in candidates]
        # Decodes first. The last one in ``running`` is the first that vLLM preempts.
        running = [one for one in requests if one.status == RequestStatus.RUNNING]
        self.running[:] = dict.fromkeys((*decoding, *running, *self.running))
        grants = self._plan.grants
        shown = [one for one in requests if one in self.waiting and one.request_id in grants]
        self._walk_ends = False
        held = self._holds_prefill(throttle_prefills, decoding)
        with self.waiting.showing(shown):
            output = super().schedule(throttle_prefills)
        send_all_inputs(self, output)
        if not held:
            missed = grants.keys() - output.num_scheduled_tokens.keys()
            self._stuck = {one.request_id for one in running} & missed
        planned = {key for key, grant in grants.items() if grant.items}
        self._admission.note(planned, {} if held else self._tried, output.num_scheduled_tokens)
        self._tried.clear()
        self._note(output, {request.request_id for request in decoding}, now)
        return output

    def _decode(self, throttle_prefills: bool, now: float) -> Any:
        """A step without a prompt is vLLM's own: most steps are, and they are short."""
        self._plan, self._late_s = StepPlan(), 0.0
        output = super().schedule(throttle_prefills)
        self._admission.note(set(), {}, output.num_scheduled_tokens)
        self._begun[id(output)] = now, StepWork(output.total_num_scheduled_tokens, 0, 0)
        return output

    def _looked_at(self, now: float) -> list[Candidate]:
        """Requests that could get on, by rank; of many that wait those whose turn may come."""
        running = [one for one in self.running if one.is_prefill_chunk]
        found = [self._candidate(one, now) for one in (*running, *self.kv_holding_waiting)]
        if self._admits():
            first, later = self.waiting.to_look_at()
            # Nobody passes an aged request for not being looked at.
            aged = (one for one in later if self._prompts.is_aged(one, now))
            kept = {bool(one.mm_features): self._prompts.order(one) for one in aged}
            for request in sorted(first, key=self._prompts.order):
                one = self._candidate(request, now)
                if one is None or self._admission.holds(request):
                    passed = one is None or self._admission.keeps_place(request)
                    rank = (3, 0, 0, self._prompts.order(request))
                    self.waiting.looked_at(request, rank, passed=passed)
                    self.deferred_waiting.add(request)
                    continue
                self.waiting.looked_at(request, one._replace(aged=False).rank, passed=one.last)
                if one.order <= kept.get(one.media, one.order):
                    found.append(one)
        # An aged one that found no room for its encoder outputs waits for those who hold it.
        blocked = self._walk_ends
        return sorted(filter(None, found), key=lambda one: (blocked and not one.running, one.rank))

    def _candidate(self, request: Any, now: float) -> Candidate | None:
        """A request as the plan wants it; None if it cannot get on."""
        waits = request.status != RequestStatus.RUNNING
        if waits and not super()._handle_blocked_waiting_request(request):
            return None
        last = self._admission.goes_last(request) if waits else request.request_id in self._stuck
        one = self._prompts.read(request, now, last=last)
        # It may wait for what another instance is encoding.
        return None if one.left <= 0 or refuse_what_never_fits(self, request, one.items) else one

    def _filled(self, candidates: list[Candidate], decoding: list[Any]) -> StepPlan:
        """What the candidates are granted in a step beside those that decode."""
        settings, times = self._settings, self._times
        # None where their tokens are under way, as in every other step of two pipeline stages.
        decodes = sum(map(decode_tokens, decoding))
        base = times.base_s(decodes, prompts=True)
        # The target is for most steps, not for the mean of those that encode.
        target = settings.target_itl_ms / 1e3 / (1 + times.encoder_spread)
        seconds = media_s = step_seconds(target, base)
        alone = not decoding and all(one.media for one in candidates)
        if not decoding:
            seconds, self._late_s = settings.encoder_step_idle_ms / 1e3, 0.0
            media_s = seconds if alone else media_s
        # One item tells what encoding costs here.
        learns = not (alone or times.knows_encoder)
        self._room_s = media_s
        bound = int(self.max_num_encoder_input_tokens)
        # Encoder outputs that the cache can take, where its manager says so.
        space: int = getattr(self.encoder_cache_manager, "num_freeable_slots", bound)
        slots = int(self.max_num_active_reqs)
        room = Room(
            seconds,
            media_s,
            tokens=max(1, self.max_num_scheduled_tokens - decodes),
            encoder_tokens=min(space, bound),
            items=1 if learns else settings.max_encoder_batch,
            slots=self._free_slots(),
            reserved=min(settings.text_slots, slots // 4),
            most_kept=max(1, slots // 4),
            shift=self._shift,
            late_s=self._late_s,
            prefill_counts=self._limits_prefill,
            whole=not self.scheduler_config.enable_chunked_prefill,
            together=bound if hasattr(self.encoder_cache_manager, "overdraws") else math.inf,
        )
        return plan(candidates, room, times)

    def _admits(self) -> bool:
        """Whether a request that waits may be let in. A paused engine lets none in."""
        unpaused = self.pause_state == PauseState.UNPAUSED
        return bool(unpaused and self.waiting and self._free_slots())

    def _free_slots(self) -> int:
        used = len(self.running) + self.num_waiting_for_streaming_input
        return max(0, int(self.max_num_active_reqs - used))

    def _holds_prefill(self, throttled: bool, decoding: list[Any]) -> bool:
        """Whether vLLM computes no prompt in this step: it is paused, or throttled beside decodes.

        Data-parallel engines are throttled together; by itself an engine of vLLM 0.33 keeps to
        ``--prefill-schedule-interval``. Neither holds prompts back that a step had no room for.
        """
        interval, last, executed = (getattr(self, name, 0) for name in CADENCE_ATTRIBUTES)
        early = interval > 1 and executed + 1 - last < interval
        throttled = (throttled or early) and not self.prefill_capacity_bound
        return self.pause_state == PauseState.PAUSED_ALL or (throttled and bool(decoding))

    # --- what steps and requests were -------------------------------------------------------------

    def add_request(self, request: Any) -> None:
        """Note when it came; give back what the media of earlier ones left free in the heap."""
        if request.request_id not in self._prompts.arrivals:
            self._prompts.came(request, request.arrival_time)
        if request.mm_features:
            trim_when_due()
            refuse_what_never_fits(self, request)
        super().add_request(request)

    def _update_request_as_session(self, session: Any, update: Any) -> None:
        """Count what a streaming session goes on with as a request that comes now."""
        self._prompts.came(session, update.arrival_time)
        super()._update_request_as_session(session, update)

    def _note(self, output: Any, decoding: set[str], now: float) -> None:
        """Account for what was scheduled; its time is taken when its output comes."""
        encoded = sum(
            self.requests[key].get_num_encoder_embeds(index)
            for key, indices in output.scheduled_encoder_inputs.items()
            for index in indices
        )
        scheduled = output.num_scheduled_tokens
        prefill = {key: n for key, n in scheduled.items() if key not in decoding}
        # Not what was planned: vLLM does nothing for who lacks KV blocks or room in a cache.
        pairs, seconds = 0.0, self._times.seconds(encoded, 0)
        for key, tokens in prefill.items():
            request = self.requests[key]
            # vLLM has counted the step's tokens as computed.
            before = request.num_computed_tokens - tokens
            pairs += attended(tokens, before)
            seconds += self._times.seconds(0, tokens, before)
            if not request.is_prefill_chunk:
                # It decodes from now on, whoever made its encoder outputs.
                self._prompts.encodes(key, 0)
        self._late_s = max(0.0, self._late_s - self._room_s + seconds)
        decodes = sum(scheduled[key] for key in decoding & scheduled.keys())
        self._begun[id(output)] = now, StepWork(decodes, sum(prefill.values()), encoded, pairs)

    def update_from_output(self, scheduler_output: Any, model_runner_output: Any) -> Any:
        """Learn what the step took."""
        now = self._clock()
        if begun := self._begun.pop(id(scheduler_output), None):
            # Of overlapping steps, a later one starts when the one before it ends.
            at, work = begun
            self._times.observe(work, now - max(at, self._ended))
        self._ended = now
        outputs = super().update_from_output(scheduler_output, model_runner_output)
        loads = model_runner_output.kv_connector_output
        for one in self.running if loads and loads.invalid_block_ids else ():
            # vLLM has noted what must be computed again, but not that the request decodes no more:
            # one that decodes lacks its last token alone.
            known = one.num_tokens + one.num_output_placeholders
            one.is_prefill_chunk |= one.num_computed_tokens < known - 1
        self._publisher.publish(self._prompts.backlog, self._times)
        return outputs

    def _free_request(self, request: Any, *args: Any, **kwargs: Any) -> Any:
        """Forget the request."""
        self._admission.forget(request.request_id)
        self._prompts.forget(request.request_id)
        return super()._free_request(request, *args, **kwargs)

    def shutdown(self) -> None:
        """Take the engine's figures back."""
        self._publisher.close()
        super().shutdown()

    # --- what vLLM's schedule asks ----------------------------------------------------------------

    def _handle_blocked_waiting_request(self, request: Any) -> bool:
        """Pass a request over that is granted nothing: it gets no slot and stops nobody."""
        key = request.request_id
        passed = self._walk_ends or key not in self._plan.grants or self._admission.holds(request)
        if passed or not super()._handle_blocked_waiting_request(request):
            return False
        if not self._admission.has_place(request):
            # vLLM 0.32 counts adapters of this step alone, and fails over those of the next.
            self._admission.refuse(request, adapter=True)
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
        # The last token of a prompt, which vLLM has padded to the size of a speculating decode.
        padded = num_computed_tokens + num_new_tokens > request.num_tokens
        if self._limits_prefill and (grant or request.is_prefill_chunk) and not padded:
            num_new_tokens = min(num_new_tokens, grant.tokens if grant else 0)
        return int(super()._reserve_prefill_lookahead(request, num_computed_tokens, num_new_tokens))

    def _try_schedule_encoder_inputs(
        self,
        request: Any,
        num_computed_tokens: int,
        num_new_tokens: int,
        encoder_compute_budget: int,
        shift_computed_tokens: int = 0,
    ) -> tuple[list[int], int, int, list[int], list[int]]:
        """Encode what the plan gives the request, ahead of its prefill too."""
        grant = self._plan.grants.get(request.request_id)
        given = {item.index for item in grant.items} if grant else set()
        waits, wanted = request.status != RequestStatus.RUNNING, num_new_tokens
        ready: list[Item] = []
        all_items = self._prompts.items(request, num_computed_tokens) if self._plans_encoder else ()
        for item in all_items:
            if item.index not in given and not self._prompts.is_there(request, item):
                # What the plan does not pay for, vLLM must not reach.
                shift_computed_tokens = self._shift
                most = item.start - num_computed_tokens - shift_computed_tokens
                num_new_tokens = min(num_new_tokens, max(0, most))
                break
            ready.append(item)
        items, tokens, left, external, duplicates = super()._try_schedule_encoder_inputs(
            request,
            num_computed_tokens,
            num_new_tokens,
            encoder_compute_budget,
            shift_computed_tokens,
        )
        if waits and self.running and not self.scheduler_config.enable_chunked_prefill:
            # A part of a prompt is better than none only where nothing ends and makes room.
            tokens = tokens if tokens == wanted else 0
        if waits and self._plans_encoder and not tokens:
            self._pass_over(request)
        # Then what is planned and prefill does not reach yet.
        ahead = [item for item in ready if item.index in given]
        manager, taken = self.encoder_cache_manager, {*items, *external, *duplicates}
        known = {request.mm_features[index].identifier for index in taken}
        scheduled = sum(request.get_num_encoder_embeds(index) for index in taken)
        for item in ready[: ready.index(ahead[-1]) + 1] if tokens and ahead else ():
            taken_up = item.index in taken or item.digest in known
            if taken_up or manager.check_and_update_cache(request, item.index):
                continue
            # Nothing is encoded ahead of what the cache has lost since the plan, or what must be
            # loaded into it: the request would hold the room that it needs.
            fits = manager.can_allocate(request, item.index, item.tokens, scheduled)
            if item.index not in given or self._prompts.is_there(request, item) or not fits:
                break
            items.append(item.index)
            known.add(item.digest)
            scheduled += item.tokens
            left -= item.tokens
        return items, tokens, left, external, duplicates

    def _pass_over(self, request: Any) -> None:
        """Note that a waiting request gets nothing in this step: it lacks encoder outputs."""
        self._tried.pop(request.request_id, None)
        self._prompts.look_again(request)
        if self._prompts.is_aged(request, self._clock()):
            # It must not be passed meanwhile; vLLM 0.32 ends its walk here, later ones go on.
            self._walk_ends = True
        else:
            self._admission.refuse(request)
        self.encoder_cache_manager.free(request)


class MMExtAsyncScheduler(MMExtScheduler, AsyncScheduler):  # type: ignore[misc]
    """The same over vLLM's asynchronous scheduler."""
