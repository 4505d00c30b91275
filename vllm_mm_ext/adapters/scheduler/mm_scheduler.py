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
from itertools import takewhile
from typing import Any

from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.request import RequestStatus

from vllm_mm_ext.adapters.scheduler.admission import Admission, Scarce
from vllm_mm_ext.adapters.scheduler.load_publisher import LoadPublisher
from vllm_mm_ext.adapters.scheduler.queue import ArrangedQueue
from vllm_mm_ext.adapters.scheduler.turn_reader import TurnReader, free_slots
from vllm_mm_ext.adapters.scheduler.turns import (
    Turn,
    chunk_limits,
    decode_tokens,
    demands,
    finishing_first,
    ready_media,
)
from vllm_mm_ext.base.heap import trim_when_due
from vllm_mm_ext.config.root import MMExtConfig
from vllm_mm_ext.policies.scheduler.encoder_plan import (
    EncoderPlan,
    EncoderRoom,
    Item,
    first_served,
    plan,
)
from vllm_mm_ext.policies.scheduler.step_budget import (
    NOTHING,
    Demand,
    Remainder,
    StepBudget,
    StepLimits,
)
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
        self._say_what_is_off()
        self._reader = TurnReader(
            self,
            aging_s=self._settings.aging_s,
            max_tokens=self._max_tokens,
            plans_encoder=self._plans_encoder,
        )
        self.waiting = ArrangedQueue(self._reader.standing)
        self._plan = EncoderPlan()
        self._waits_for_encoder: set[str] = set()
        self._promoted: set[str] = set()
        self._kept_slots = 0
        self._kept_before: dict[str, int] = {}
        self._reserved_slots = min(self._settings.text_slots, int(self.max_num_active_reqs) // 4)
        self._most_kept_slots = max(1, int(self.max_num_active_reqs) // 4)
        self._admission = Admission(self, self._reader.number)
        self._tried: dict[str, Any] = {}
        self._chunks: dict[str, int] = {}
        self._begun: OrderedDict[int, tuple[float, StepWork]] = OrderedDict()
        self._ended = -math.inf
        self._backlog = 0
        self._publisher = LoadPublisher(self)

    def _say_what_is_off(self) -> None:
        if self.is_encoder_decoder:
            logger.warning("mm_ext: encoder work of encoder-decoder models is left to vLLM")
        if self.connector is not None:
            logger.warning(
                "mm_ext: requests with media whose KV a connector has wait for their turn at the "
                "encoder before it is asked, unless their kv_transfer_params say do_remote_prefill"
            )
        slots = int(self.max_num_active_reqs)
        if self._settings.text_slots > slots // 4:
            logger.warning(
                "mm_ext: scheduler.text_slots is %d, but at most a quarter of the %d slots "
                "(--max-num-seqs) is kept for text: %d",
                self._settings.text_slots,
                slots,
                slots // 4,
            )
        if not self._limits_prefill:
            logger.warning(
                "mm_ext: prefill is not limited while something decodes: chunked prefill is off, "
                "mm items must not be chunked, or prompts are computed in whole Mamba blocks"
            )

    # --- a step -----------------------------------------------------------------------------------

    def schedule(self, throttle_prefills: bool = False) -> Any:
        """Prepare a step, and let vLLM fill it."""
        now = self._clock()
        decoding = [request for request in self.running if not request.is_prefill_chunk]
        waits = self.waiting or self.kv_holding_waiting
        if not waits and len(decoding) == len(self.running):
            return self._decode(decoding, throttle_prefills, now)
        decodes = sum(decode_tokens(request) for request in decoding)
        self._admission.keep_door(lambda request: self._reader.is_promoted(request, now))
        self._tried = {}
        turns, finish = finishing_first(
            self._reader.turns(self._admission, now),
            lambda left: self._budget.finishes(left, self._times, decodes),
        )
        # Decodes first. The last one in ``running`` is the first that vLLM preempts.
        running = [turn.request for turn in turns if turn.is_running]
        self.running[:] = [*decoding, *running]
        self._no_backlog(decoding)
        limits = self._limits(decodes, turns, finish)
        self._plan_encoder(turns, limits)
        with self._limited(limits), self.waiting.showing(self._shown(turns)):
            output = super().schedule(throttle_prefills)
        self._send_all_inputs(output)
        self._reader.media.note(output)
        if not throttle_prefills:
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
            self._reader.came(request, self._clock())
        if request.mm_features:
            trim_when_due()
        super().add_request(request)

    def _update_request_as_session(self, session: Any, update: Any) -> None:
        """Count what a streaming session goes on with as a request that comes now."""
        self._reader.came(session, self._clock())
        super()._update_request_as_session(session, update)

    def _free_slots(self) -> int:
        return free_slots(self)

    def _limits(self, decodes: int, turns: list[Turn], finish: Remainder) -> StepLimits:
        """Limits of a step that decodes so many tokens, and of running requests within them."""
        running = [turn for turn in turns if turn.is_running]
        slots = self._free_slots()
        text = [turn for turn in turns if turn.ready and not turn.items and not turn.is_running][
            :slots
        ]
        media = [turn for turn in turns if turn.items and turn.ready]
        behind = slice(1 if finish.prefill_tokens else 0, None)
        due = [*running, *text][behind]
        # Where prefill is not limited, text cannot be put first: media would go on beside it.
        keys = {turn.candidate.key for turn in due} if self._limits_prefill else set()
        ahead = takewhile(lambda turn: not turn.is_media, turns[behind])
        served = self._served(media, slots)
        only = all(turn is served for turn in due if turn.is_media)
        ready, context = ready_media(running[behind])
        demand = Demand(
            decode_tokens=decodes,
            decoding=bool(decodes),
            text_due=bool(text) or any(not turn.is_media for turn in running),
            prefill_tokens=sum(turn.ready_need for turn in due),
            media_tokens=ready,
            media_context=context,
            encoder_tokens=sum(turn.candidate.encoder_tokens for turn in media),
            next_item=served.next_tokens if served else 0,
            context=media[0].computed if media else 0,
            cache_tokens=self._cache_room(),
            # Where prefill is not limited, what is encoded is prefilled in the same step.
            one=served.remainder if served and only and self._limits_prefill else NOTHING,
            finish=finish,
            text=tuple(turn.remainder for turn in ahead if turn.candidate.key in keys),
        )
        limits = self._budget.limits(demand, self._times)
        if not self._limits_prefill:
            return replace(limits, tokens=self._max_tokens, prefill_tokens=self._max_tokens)
        self._chunks = chunk_limits(limits, running, text, finish)
        return limits

    def _served(self, media: list[Turn], slots: int) -> Turn | None:
        """The request that is encoded for first, None if none can be."""
        wanted = demands(media, self._admission.failed)
        first = first_served(wanted, slots, self._reserved_slots)
        return next((turn for turn in media if first and turn.candidate.key == first.key), None)

    def _plan_encoder(self, turns: list[Turn], limits: StepLimits) -> None:
        room = EncoderRoom(
            tokens=limits.encoder_tokens,
            items=self._settings.max_encoder_batch,
            cache_tokens=self._cache_room(),
            slots=self._free_slots(),
            reserved=self._reserved_slots,
            lookahead=self._settings.lookahead_items,
        )
        reach = limits.prefill_tokens + self.num_prefill_lookahead
        media = [turn for turn in turns if turn.items]
        ready = [turn for turn in media if turn.ready]
        self._plan = plan(demands(ready, self._admission.failed, reach), room)
        waits = {turn.candidate.key for turn in media} - self._plan.items.keys()
        self._waits_for_encoder = waits
        self._promoted = {turn.candidate.key for turn in turns if turn.promoted}

    def _shown(self, turns: list[Turn]) -> list[Any]:
        """Waiting requests that vLLM may let in.

        For promoted ones among the others slots are kept: as many as may soon be let in together.
        """
        shown, kept = [], 0
        self._kept_slots, self._kept_before = 0, {}
        for turn in turns:
            request, key = turn.request, turn.candidate.key
            if request not in self.waiting:
                continue
            if turn.ready and key in self._waits_for_encoder:
                kept += turn.promoted
                self.deferred_waiting.add(request)
            else:
                self._kept_before[key] = kept
                shown.append(request)
        return shown

    def _cache_room(self) -> int:
        """Encoder outputs the cache can take, where its manager says so."""
        room = getattr(self.encoder_cache_manager, "num_freeable_slots", None)
        return self.max_num_encoder_input_tokens if room is None else int(room)

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

        But slots are kept for promoted ones among them: as many as may soon be let in together.
        """
        if not super()._handle_blocked_waiting_request(request):
            return False
        key = request.request_id
        promoted = key in self._promoted
        waits = key in self._waits_for_encoder
        if waits or self._admission.backs_off(key, self.current_step):
            self._kept_slots += promoted
            return False
        kept = min(self._kept_slots + self._kept_before.get(key, 0), self._most_kept_slots)
        has_slot = promoted or self._free_slots() > kept
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
        # KV that has turned up since, in the prefix cache or a connector, needs no encoder outputs.
        planned = self._plan.items.get(request.request_id, ())
        given = tuple(item for item in planned if item.end > num_computed_tokens)
        own = sum(item.tokens for item in given)
        end = num_computed_tokens + num_new_tokens + shift_computed_tokens
        # vLLM wants a budget for these and takes nothing from it.
        free = self._reader.media.from_elsewhere(request, num_computed_tokens, end)
        items, tokens, left, external, duplicates = super()._try_schedule_encoder_inputs(
            request, num_computed_tokens, num_new_tokens, own + free, shift_computed_tokens
        )
        left -= free
        if left < 0 < free:
            cut = self._unpaid(request, items, own)
            start = request.mm_features[cut].mm_position.offset
            tokens = min(tokens, max(0, start - num_computed_tokens - shift_computed_tokens))
            items, external, duplicates = (
                [index for index in indices if index < cut]
                for indices in (items, external, duplicates)
            )
            left = own - sum(request.get_num_encoder_embeds(index) for index in items)
            # What was found behind must not hold the room that is lacking before it, for good.
            manager = self.encoder_cache_manager
            for index in list(manager.get_cached_input_ids(request)):
                if index >= cut:
                    manager.free_encoder_input(request, index)
        if tokens:
            taken = {*items, *external, *duplicates}
            left = self._look_ahead(request, num_computed_tokens, given, items, taken, left)
        elif request.status != RequestStatus.RUNNING:
            # vLLM ends its walk over waiting requests here. Others get their turn in later steps.
            self._tried.pop(request.request_id, None)
            if request.request_id in self._promoted:
                # It must not be passed meanwhile.
                self._reader.media.look_again(request)
            else:
                self._admission.refuse(request, Scarce.OTHER)
            self.encoder_cache_manager.free(request)
        return items, tokens, encoder_compute_budget - (own - left), external, duplicates

    @staticmethod
    def _unpaid(request: Any, items: list[int], own: int) -> int:
        """The first of the items that what the plan gives does not cover."""
        for index in items:
            own -= request.get_num_encoder_embeds(index)
            if own < 0:
                return index
        raise ValueError("all are covered")

    def _look_ahead(
        self,
        request: Any,
        computed: int,
        given: tuple[Item, ...],
        items: list[int],
        taken: set[int],
        left: int,
    ) -> int:
        """Add planned items that prefill does not reach yet; returns what is left to spend.

        None is added behind one that was cached when the plan was made and has made way since: what
        the request holds by then could be the room that it needs for that one, for good.
        """
        manager = self.encoder_cache_manager
        known = {request.mm_features[index].identifier for index in taken}
        scheduled = sum(request.get_num_encoder_embeds(index) for index in taken)
        planned = {item.index for item in given}
        last = max(planned, default=-1)
        for item in self._reader.media.items(request, computed):
            if item.index > last:
                break
            if item.index in taken or item.digest in known or not item.tokens:
                continue
            if manager.check_and_update_cache(request, item.index):
                continue
            if item.index not in planned:
                break
            if not manager.can_allocate(request, item.index, left, scheduled):
                break
            items.append(item.index)
            known.add(item.digest)
            scheduled += item.tokens
            left -= item.tokens
        return left

    def _free_request(self, request: Any, *args: Any, **kwargs: Any) -> Any:
        """Forget the request."""
        key = request.request_id
        self._admission.forget(key)
        self._reader.forget(key)
        return super()._free_request(request, *args, **kwargs)


class MMExtAsyncScheduler(MMExtScheduler, AsyncScheduler):  # type: ignore[misc]
    """The same over vLLM's asynchronous scheduler."""
