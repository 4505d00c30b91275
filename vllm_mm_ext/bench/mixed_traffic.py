"""Text and videos at once: what videos do to text, and what helping text does to videos."""

from __future__ import annotations

from typing import Any

import numpy as np

from vllm_mm_ext.bench import mixed_engine
from vllm_mm_ext.bench.harness import BenchContext, BenchResult, Row
from vllm_mm_ext.bench.inprocess import measure
from vllm_mm_ext.testing.checkpoints import build

_SIDES = ("stock", "plugin")
# The target between tokens that the plugin is given, in terms of stock's p99: of text alone, and of
# text beside videos; the lower one counts.
TARGET_OF_ALONE, TARGET_OF_STALLED = 1.8, 0.31


def run(context: BenchContext) -> BenchResult:
    """One side after the other, the same arrivals; stock's text alone sets the target."""
    # Wide and deep, so that prompts take far longer than tokens, and a token long enough that a
    # stall for each prompt is more than one gap in a hundred: p99 sees it.
    path = context.work_dir / "qwen2_5_vl-mixed"
    model = build("qwen2_5_vl", path, layers=8, hidden_size=256)
    found: dict[str, list[Any]] = {side: [] for side in _SIDES}
    targets = []
    with context.steps("mixed-traffic", 2 * context.repeats) as begin:
        for repeat in range(context.repeats):
            target_ms = 0.0
            for side in _SIDES:
                begin(f"{side}, repeat {repeat + 1}")
                arguments = [str(model), str(target_ms or 50.0)]
                found[side].append(measure("mixed_engine", side, arguments))
                if side == "stock":
                    target_ms = 1e3 * _target_s(found[side])
                    targets.append(target_ms)
    return BenchResult("mixed-traffic", _rows(found), _notes(targets))


def _target_s(runs: list[Any]) -> float:
    """From medians over stock's runs so far: one p99 is uncertain."""
    alone = np.median([_p(one["alone"]["itl_s"], 99) for one in runs])
    stalled = np.median([_p(one["text"]["itl_s"], 99) for one in runs])
    return float(min(TARGET_OF_ALONE * alone, TARGET_OF_STALLED * stalled))


def _rows(found: dict[str, list[Any]]) -> list[Row]:
    def row(name: str, unit: str, value: Any) -> Row:
        runs = {side: [float(value(one)) for one in ones] for side, ones in found.items()}
        return Row.of(name, unit, **runs)

    ratios = [
        _p(one["text"]["itl_s"], 99) / _p(one["alone"]["itl_s"], 99) for one in found["plugin"]
    ]
    stock_ratios = [
        _p(one["text"]["itl_s"], 99) / _p(one["alone"]["itl_s"], 99) for one in found["stock"]
    ]
    return [
        row("text alone: ITL p99", "ms", lambda one: 1e3 * _p(one["alone"]["itl_s"], 99)),
        row("with videos: text ITL p99", "ms", lambda one: 1e3 * _p(one["text"]["itl_s"], 99)),
        Row.of("text ITL p99, with videos / alone", "ratio", stock=stock_ratios, plugin=ratios),
        row("text alone: TTFT p95", "ms", lambda one: 1e3 * _p(one["alone"]["ttft_s"], 95)),
        row("with videos: text TTFT p95", "ms", lambda one: 1e3 * _p(one["text"]["ttft_s"], 95)),
        row("with videos: videos finished per minute", "1/min", _per_minute),
        row(
            "with videos: mean video TTFT", "ms", lambda one: 1e3 * np.mean(one["videos"]["ttft_s"])
        ),
        row(
            f"{mixed_engine.QUEUED_VIDEOS} videos on {mixed_engine.QUEUE_SLOTS} slots, then text: "
            "videos finished before it",
            "count",
            lambda one: sum(end < one["queued"]["text_s"] for end in one["queued"]["videos_s"]),
        ),
        row("the same: text answered", "ms", lambda one: 1e3 * one["queued"]["text_s"]),
        row("the same: all videos answered", "ms", lambda one: 1e3 * one["queued"]["videos_s"][-1]),
    ]


def _per_minute(one: dict[str, Any]) -> float:
    """Over the time from the first video's arrival to the last one's end."""
    ends = one["videos"]["ends_s"]
    return float(60 * len(ends) / (max(ends) - 0.5))


def _p(values: list[float], percentile: float) -> float:
    return float(np.percentile(values, percentile))


def _notes(targets: list[float]) -> list[str]:
    engine = mixed_engine
    return [
        f"text: {engine.TEXT_PROMPT} tokens in, {engine.TEXT_ANSWER} out, every "
        f"{engine.TEXT_EVERY_S:g} s; a video of {engine.VIDEO_FRAMES} frames every "
        f"{engine.VIDEO_EVERY_S:g} s; {engine.SECONDS:g} s of arrivals, rendered beforehand; "
        f"steps of at most {engine.BATCHED_TOKENS} tokens",
        f"plugin: segments of {engine.SEGMENT_TOKENS} tokens, target_itl_ms "
        + ", ".join(f"{target:.0f}" for target in targets)
        + f" (the lower of {TARGET_OF_ALONE:g}x the ITL p99 of text alone on stock and "
        f"{TARGET_OF_STALLED:g}x that beside videos, medians of the runs so far)",
    ]
