"""``scheduler-step``: CPU time of a scheduling step, next to vLLM's, with few or many waiting.

vLLM's real scheduler classes; instead of a model only its answers, and a simulated clock.
"""

from __future__ import annotations

import gc
import statistics
from dataclasses import dataclass
from typing import Any

from vllm_mm_ext.tools.bench.harness import BenchContext, BenchResult, Row
from vllm_mm_ext.tools.bench.scheduler_clock import (
    EngineShape,
    SimulatedEngine,
    build_request,
    build_scheduler,
)

WAITING = (100, 1_000, 10_000)
# With nothing waiting.
DECODING = (1, 64)
_STEPS = 60
# Steps before the first one that counts.
_FIRST = 20
_SLOTS = 256
_STEP_TOKENS = 512
_ENCODER_TOKENS = 1024
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
    rows, steps = [], {}
    cases = {f"{count} decode, none waits": (0, count) for count in DECODING}
    cases |= {f"{waiting:,} videos wait": (waiting, 1) for waiting in WAITING}
    with context.steps("scheduler-step", 2 * len(cases) * context.repeats) as begin:
        for case, (waiting, decoding) in cases.items():
            taken: dict[str, list[Spent]] = {"stock": [], "plugin": []}
            for repeat in range(context.repeats):
                for side in taken:
                    begin(f"{case}, {side}, repeat {repeat + 1}")
                    spent = measure(waiting, decoding, plugin=side == "plugin")
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


def measure(waiting: int, decoding: int = 1, *, plugin: bool, steps: int = _STEPS) -> Spent:
    """Time of a scheduler's steps.

    Args:
        waiting: Requests with a video that wait at the beginning.
        decoding: Requests without one that decode.
        plugin: The plugin's scheduler instead of vLLM's.
        steps: How many are timed.
    """
    shape = EngineShape(_SLOTS, _STEP_TOKENS, _ENCODER_TOKENS, blocks=1 << 18)
    scheduler = build_scheduler(shape, {} if plugin else None, prefix_caching=True)
    engine = SimulatedEngine(scheduler, _seconds)
    for number in range(decoding):
        engine.add(build_request(f"decodes {number}", text=64, answer=30_000, hashed=True))
    while any(one.is_prefill_chunk for one in scheduler.running) or scheduler.waiting:
        engine.step()
    items = [_SEGMENT] * _SEGMENTS
    for number in range(waiting):
        name = f"video {number}"
        engine.add(build_request(name, text=64, items=items, answer=4, hashed=True))
    for _ in range(_FIRST):
        engine.step()
    gc.collect()
    gc.disable()
    try:
        times = [engine.step() for _ in range(steps)]
    finally:
        gc.enable()
        scheduler.shutdown()
    return Spent([1e6 * one for one, _ in times], [1e6 * other for _, other in times])


def _seconds(output: Any) -> float:
    encoded = sum(map(len, output.scheduled_encoder_inputs.values())) * _SEGMENT
    prefilled: int = output.total_num_scheduled_tokens
    return _STEP_S + _PREFILL_S * prefilled + _ENCODER_S * encoded
