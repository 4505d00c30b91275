"""Counts what an engine's steps do, whatever scheduler it runs, and publishes the figures."""

from __future__ import annotations

import time
import weakref
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from vllm_mm_ext.base.engine_figures import (
    FIGURES,
    MODALITIES,
    EngineBoard,
    EngineTimes,
)
from vllm_mm_ext.base.shared_state import SharedState
from vllm_mm_ext.policies.kv.pieces import Tree
from vllm_mm_ext.sight.harmless import harmless

# Steps whose end is still awaited; more were given up.
_MOST_IN_FLIGHT = 64
# Prompts under way that are remembered besides the scheduler's requests: aborted ones stay a while.
_MOST_GONE = 256
# Seconds between two writings of the figures, but for those when the engine comes to rest or to
# work.
_PUBLISH_S = 0.1

_Figures = Callable[[], Mapping[str, float]]


@dataclass(slots=True)
class _Step:
    began: float
    kind: str = "decode"
    encodes: tuple[str, ...] = ()
    prefills: tuple[str, ...] = ()
    prompts_done: tuple[str, ...] = ()


@dataclass(slots=True)
class _Prompt:
    arrival: float
    began: float
    encode_s: float = 0.0
    prefill_s: float = 0.0


class StepObserver:
    """Watches one engine. Steps that only decode cost the least: they are many, and short.

    Args:
        scheduler: vLLM's scheduler, whose engine has nothing to do yet.
        state: The shared state of the engine's service.
        clock: Seconds of the monotonic clock.
    """

    def __init__(
        self, scheduler: Any, state: SharedState, clock: Callable[[], float] = time.monotonic
    ) -> None:
        # The scheduler has this observer.
        self._scheduler = weakref.proxy(scheduler)
        self._engine: int = scheduler.parallel_config.data_parallel_index
        self._board = EngineBoard(state)
        self._clock = clock
        self._values: dict[str, float] = dict.fromkeys(FIGURES, 0.0)
        self._steps: OrderedDict[int, _Step] = OrderedDict()
        self._prompts: dict[str, _Prompt] = {}
        self._ended = self._published = float("-inf")
        # vLLM's own block pool and encoder cache tell nothing of media.
        pool = scheduler.kv_cache_manager.block_pool
        self._pieces: Tree | None = getattr(pool, "tree", None)
        manager = scheduler.encoder_cache_manager
        self._encoder_cache: _Figures | None = getattr(manager, "figures", None)
        # Also where an engine in this process is dropped without being shut down.
        self._close = weakref.finalize(self, _leave, state, self._engine)
        self._publish(self._ended)

    @harmless
    def scheduled(self, output: Any) -> None:
        """Note what a step is going to do.

        Args:
            output: vLLM's ``SchedulerOutput``.
        """
        total: int = output.total_num_scheduled_tokens
        if not total:
            return
        now = self._clock()
        cached = output.scheduled_cached_reqs
        step = _Step(now)
        if (
            output.scheduled_new_reqs
            or output.scheduled_encoder_inputs
            or cached.resumed_req_ids
            or 0 in cached.num_output_tokens
        ):
            self._note(step, output, total)
        else:
            self._values["decode_tokens"] += total
        self._values[f"steps_{step.kind}"] += 1
        self._steps[id(output)] = step
        if len(self._steps) > _MOST_IN_FLIGHT:
            self._steps.popitem(last=False)
        if not self._values["running"]:
            # The first step after a rest may never end, and who watches must see it.
            self._publish(now)

    @harmless
    def finished(self, output: Any) -> None:
        """Note that a step has ended; publish times of requests before its outputs go out.

        Args:
            output: As of ``scheduled``.
        """
        step = self._steps.pop(id(output), None)
        now = self._clock()
        if step is not None:
            # Of overlapping steps, a later one starts when the one before it ends.
            seconds = now - max(step.began, self._ended)
            self._values[f"step_s_{step.kind}"] += seconds
            self._count(step, seconds, now)
            self._ended = now
        if now >= self._published + _PUBLISH_S or not self._scheduler.running:
            self._publish(now)

    def close(self) -> None:
        """Take the figures back: the engine ends."""
        self._close()

    # --- steps with prompts -----------------------------------------------------------------------

    def _note(self, step: _Step, output: Any, total: int) -> None:
        requests = self._scheduler.requests
        scheduled: Mapping[str, int] = output.num_scheduled_tokens
        cached = output.scheduled_cached_reqs
        prefills = [new.req_id for new in output.scheduled_new_reqs]
        prefills += [
            key
            for key, made in zip(cached.req_ids, cached.num_output_tokens, strict=True)
            if not made or key in cached.resumed_req_ids
        ]
        tokens = sum(scheduled[key] for key in prefills)
        self._values["prefill_tokens"] += tokens
        self._values["decode_tokens"] += total - tokens
        for key in prefills:
            request = requests[key]
            # Preempted requests have told their times when they first came.
            if request.mm_features and key not in self._prompts and not request.num_output_tokens:
                self._prompts[key] = _Prompt(request.arrival_time, step.began)
        for key, indices in output.scheduled_encoder_inputs.items():
            self._note_encoding(requests[key].mm_features[index] for index in indices)
        step.encodes = tuple(output.scheduled_encoder_inputs)
        step.prefills = tuple(key for key in prefills if key in self._prompts)
        step.prompts_done = tuple(
            key for key in step.prefills if not requests[key].is_prefill_chunk
        )
        step.kind = _kind(bool(step.encodes), bool(tokens), tokens < total)
        if len(self._prompts) > len(requests) + _MOST_GONE:
            self._prompts = {key: one for key, one in self._prompts.items() if key in requests}

    def _note_encoding(self, features: Iterable[Any]) -> None:
        for feature in features:
            tokens = int(feature.mm_position.get_num_embeds())
            modality = feature.modality if feature.modality in MODALITIES else "other"
            self._values[f"encoder_tokens_{modality}"] += tokens
            self._values["encoder_items"] += 1

    def _count(self, step: _Step, seconds: float, now: float) -> None:
        for key in step.encodes:
            if (prompt := self._prompts.get(key)) is not None:
                prompt.encode_s += seconds
        for key in step.prefills:
            if (prompt := self._prompts.get(key)) is not None and key not in step.encodes:
                prompt.prefill_s += seconds
        for key in step.prompts_done:
            prompt = self._prompts.pop(key, None)
            if prompt is not None:
                spent = prompt.encode_s + prompt.prefill_s
                waited = max(0.0, now - prompt.began - spent)
                self._board.write_times(
                    prompt.arrival,
                    EngineTimes(prompt.encode_s, prompt.prefill_s, waited),
                )

    # --- figures ----------------------------------------------------------------------------------

    def _publish(self, now: float) -> None:
        values, scheduler = self._values, self._scheduler
        values["running"], values["waiting"] = scheduler.get_request_counts()
        pool = scheduler.kv_cache_manager.block_pool
        blocks, free = pool.num_gpu_blocks - 1, pool.get_num_free_blocks()
        kept = getattr(pool.free_block_queue, "kept", 0)
        values["kv_blocks"] = blocks
        values["kv_used_blocks"] = blocks - free
        values["kv_kept_blocks"] = kept
        values["kv_evictions"] = getattr(pool, "evictions", 0)
        values["kv_pressure"] = (blocks - free + kept) / blocks if blocks else 0.0
        if self._pieces is not None:
            values["kv_media_items"] = len(self._pieces.items)
            tokens = dict.fromkeys(MODALITIES, 0)
            for modality, count in self._pieces.modalities.items():
                tokens[modality if modality in tokens else "other"] += count
            values.update((f"kv_media_tokens_{name}", count) for name, count in tokens.items())
        if self._encoder_cache:
            values.update(self._encoder_cache())
        self._board.write(self._engine, values)
        self._published = now


def _kind(encodes: bool, prefills: bool, decodes: bool) -> str:
    if encodes:
        return "encode"
    if prefills and decodes:
        return "mixed"
    return "prefill" if prefills else "decode"


def _leave(state: SharedState, engine: int) -> None:
    EngineBoard(state).clear(engine)
    state.close()
