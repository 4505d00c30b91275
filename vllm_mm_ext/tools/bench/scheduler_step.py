"""``scheduler-step``: CPU time of a scheduling step, next to vLLM's, with few or many waiting.

vLLM's real scheduler classes; instead of a model only its answers, and a simulated clock.
"""

from __future__ import annotations

import gc
import statistics
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vllm_mm_ext.tools.bench.harness import BenchContext, BenchResult, Row

WAITING = (100, 1_000, 10_000)
# With nothing waiting.
DECODING = (1, 64)
_STEPS = 60
# Steps before the first one that counts.
_FIRST = 20
_BLOCK = 64
_SLOTS = 256
# Encoder outputs of a segment, few so that ten thousand prompts fit into memory, and segments of a
# video.
_SEGMENT = 64
_SEGMENTS = 20
# What a model would take.
_STEP_S = 0.01
_PREFILL_S = 20e-6
_ENCODER_S = 800e-6


@dataclass(frozen=True)
class Spent:
    """Microseconds of scheduling, and of handling its output, step by step."""

    schedule_us: list[float]
    update_us: list[float]


def run(context: BenchContext) -> BenchResult:
    """Requests decode and none waits; one decodes and many with videos wait.

    With these each step encodes a little.
    """
    from vllm_mm_ext.testing.checkpoints import checkpoint

    model = checkpoint("qwen2_5_vl")
    rows, steps = [], {}
    cases = {f"{count} decode, none waits": (0, count) for count in DECODING}
    cases |= {f"{waiting:,} videos wait": (waiting, 1) for waiting in WAITING}
    with context.steps("scheduler-step", 2 * len(cases) * context.repeats) as begin:
        for case, (waiting, decoding) in cases.items():
            taken: dict[str, list[Spent]] = {"stock": [], "plugin": []}
            for repeat in range(context.repeats):
                for side in taken:
                    begin(f"{case}, {side}, repeat {repeat + 1}")
                    spent = measure(model, waiting, decoding, plugin=side == "plugin")
                    taken[side].append(spent)
            for name, of in (("schedule()", "schedule_us"), ("update_from_output()", "update_us")):
                values = {
                    side: [statistics.median(getattr(one, of)) for one in of_side]
                    for side, of_side in taken.items()
                }
                rows.append(Row.of(f"{case}: {name}", "µs", **values))
            steps[waiting] = rows[-2].plugin or 0.0
    notes = [
        f"where videos wait, one request decodes; {_SLOTS} slots, videos of {_SEGMENTS} segments "
        f"of {_SEGMENT} tokens",
        f"plugin, {WAITING[-1]:,} waiting against {WAITING[0]:,}: "
        f"{steps[WAITING[-1]] / steps[WAITING[0]]:.2f}x",
    ]
    return BenchResult("scheduler-step", rows, notes)


def measure(
    model: Path, waiting: int, decoding: int = 1, *, plugin: bool, steps: int = _STEPS
) -> Spent:
    """Time of a scheduler's steps.

    Args:
        model: A checkpoint whose configuration is read.
        waiting: Requests with a video that wait at the beginning.
        decoding: Requests without one that decode.
        plugin: The plugin's scheduler instead of vLLM's.
        steps: How many are timed.
    """
    scheduler = _scheduler(model, plugin=plugin)
    player = _Player(scheduler)
    for number in range(decoding):
        scheduler.add_request(_request(f"decodes {number}", segments=0, answer=30_000))
    while any(one.is_prefill_chunk for one in scheduler.running) or scheduler.waiting:
        player.step()
    for number in range(waiting):
        scheduler.add_request(_request(f"video {number}", segments=_SEGMENTS, answer=4))
    for _ in range(_FIRST):
        player.step()
    gc.collect()
    gc.disable()
    try:
        times = [player.step() for _ in range(steps)]
    finally:
        gc.enable()
        scheduler.shutdown()
    return Spent([1e6 * one for one, _ in times], [1e6 * other for _, other in times])


class _Player:
    """Answers for a model."""

    def __init__(self, scheduler: Any) -> None:
        self._scheduler = scheduler
        self._now = 0.0
        scheduler._clock = lambda: self._now

    def step(self) -> tuple[float, float]:
        """CPU seconds of scheduling and of taking the output in: the machine is shared."""
        from vllm.v1.outputs import ModelRunnerOutput

        scheduler = self._scheduler
        began = time.thread_time()
        output = scheduler.schedule()
        scheduled = time.thread_time() - began
        keys = list(output.num_scheduled_tokens)
        encoded = sum(map(len, output.scheduled_encoder_inputs.values())) * _SEGMENT
        prefilled = output.total_num_scheduled_tokens
        self._now += _STEP_S + _PREFILL_S * prefilled + _ENCODER_S * encoded
        # ``schedule`` has counted the step's tokens as computed.
        done = [scheduler.requests[key] for key in keys]
        tokens = [[11] if one.num_computed_tokens >= one.num_tokens else [] for one in done]
        places = {key: place for place, key in enumerate(keys)}
        result = ModelRunnerOutput(keys, places, tokens)
        began = time.thread_time()
        scheduler.update_from_output(output, result)
        return scheduled, time.thread_time() - began


def _scheduler(model: Path, *, plugin: bool) -> Any:
    import torch
    from vllm.engine.arg_utils import EngineArgs
    from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec
    from vllm.v1.structured_output import StructuredOutputManager

    config = EngineArgs(
        model=str(model),
        enforce_eager=True,
        max_model_len=32768,
        max_num_batched_tokens=512,
        max_num_seqs=_SLOTS,
        block_size=_BLOCK,
        async_scheduling=False,
        limit_mm_per_prompt={"video": 1, "image": 0},
        scheduler_cls="vllm_mm_ext.scheduler.MMExtScheduler" if plugin else None,
    ).create_engine_config()
    config.cache_config.num_gpu_blocks = 1 << 18
    spec = FullAttentionSpec(_BLOCK, num_kv_heads=1, head_size=16, dtype=torch.float32)
    kv = KVCacheConfig(1 << 18, [], [KVCacheGroupSpec(["layer"], spec)])
    make = config.scheduler_config.get_scheduler_cls()
    return make(config, kv, StructuredOutputManager(config), _BLOCK, log_stats=True)


def _request(name: str, *, segments: int, answer: int) -> Any:
    from vllm.multimodal.inputs import MultiModalFeatureSpec, PlaceholderRange
    from vllm.sampling_params import SamplingParams
    from vllm.utils.hashing import sha256
    from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash
    from vllm.v1.request import Request

    init_none_hash(sha256)
    videos = [
        MultiModalFeatureSpec(
            None, "video", f"{name} {part}", PlaceholderRange(32 + part * _SEGMENT, _SEGMENT)
        )
        for part in range(segments)
    ]
    return Request(
        name,
        [7] * (64 + segments * _SEGMENT),
        SamplingParams(max_tokens=answer, ignore_eos=True),
        None,
        mm_features=videos,
        block_hasher=get_request_block_hasher(_BLOCK, sha256),
    )
