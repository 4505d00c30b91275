"""Text and videos at once: what videos do to text, and what helping text does to videos."""

from __future__ import annotations

import os
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from vllm_mm_ext.testing.checkpoints import build
from vllm_mm_ext.tools.bench import mixed_engine
from vllm_mm_ext.tools.bench.harness import BenchContext, BenchResult, Row, percentile
from vllm_mm_ext.tools.bench.inprocess import Measurer

_SIDES = ("stock", "plugin")
# Wide and deep, so that prompts take far longer than tokens, and a token long enough that a stall
# for each video is more than one gap in a hundred: p99 sees it.
MODEL = "qwen2_5_vl-mixed"
MODEL_SIZE = {"layers": 6, "hidden_size": 640, "vision_layers": 4}
# The target between tokens that the plugin is given: so many times what a text alone waits for its
# first token, about what its prompt makes others wait.
TARGET_OF_TEXT = 1.72
# In turns, each side first in every other one, so that a change of the machine's speed meets both.
ROUNDS = 2
SLOTS = 16
# Of a step, while the load is not known.
_CALIBRATION_TOKENS = 1024


def run(context: BenchContext) -> BenchResult:
    """Both sides in turns, the same arrivals; what stock takes sets load and target."""
    model = build("qwen2_5_vl", context.work_dir / MODEL, **MODEL_SIZE)
    found: dict[str, list[Any]] = {side: [] for side in _SIDES}
    queued: dict[str, list[Any]] = {side: [] for side in _SIDES}
    settings: list[tuple[mixed_engine.Load, float, list[float]]] = []
    with context.steps("mixed-traffic", (2 + 2 * ROUNDS) * context.repeats + 2) as begin:
        for repeat in range(context.repeats):
            number = f"repeat {repeat + 1}"
            begin(f"{number}: how fast stock is")
            with _engine("stock", model, 0.0, SLOTS, _CALIBRATION_TOKENS) as stock:
                alone = stock.ask(["alone"])
            load = mixed_engine.Load.of(alone["token_s"], alone["video_s"], alone["video_tokens"])
            with _engine("stock", model, 0.0, SLOTS, load.step_tokens) as stock:
                begin(f"{number}: how long stock's text waits")
                target_ms = 1e3 * TARGET_OF_TEXT * float(stock.ask(["alone"])["text_s"])
                spaces: list[float] = []
                settings.append((load, target_ms, spaces))
                with _engine("plugin", model, target_ms, SLOTS, load.step_tokens) as plugin:
                    sides = list(zip(_SIDES, (stock, plugin), strict=True))
                    for turn in range(ROUNDS):
                        load = load.paced(stock.ask(["pace"]))
                        spaces.append(load.text_every_s)
                        for side, engine in sides[:: -1 if turn % 2 else 1]:
                            begin(f"{number}: {side}, round {turn + 1}")
                            found[side].append(engine.ask(["mixed", asdict(load)]))
        for side in _SIDES:
            begin(f"{side}, more videos than slots")
            load, target_ms, _ = settings[-1]
            slots = mixed_engine.QUEUE_SLOTS
            with _engine(side, model, target_ms, slots, load.step_tokens) as engine:
                for _ in range(context.repeats):
                    queued[side].append(engine.ask(["queued", asdict(load)]))
    return BenchResult("mixed-traffic", _rows(found, queued), _notes(settings))


def _engine(side: str, model: Path, target_ms: float, slots: int, step_tokens: int) -> Measurer:
    arguments = [str(model), str(target_ms), str(slots), str(step_tokens)]
    # On a CPU one core is left to the process that sends: on the engine's, it would stop all of the
    # engine's threads, as they wait for each other.
    threads = max(1, len(os.sched_getaffinity(0)) - 1)
    return Measurer("mixed_engine", side, arguments, {"OMP_NUM_THREADS": str(threads)})


def _rows(found: dict[str, list[Any]], queued: dict[str, list[Any]]) -> list[Row]:
    def row(name: str, unit: str, value: Any, of: dict[str, list[Any]] = found) -> Row:
        runs = {side: [float(value(one)) for one in ones] for side, ones in of.items()}
        return Row.of(name, unit, **runs)

    return [
        row("text alone: ITL p99", "ms", lambda one: 1e3 * percentile(one["alone"]["itl_s"], 99)),
        row(
            "with videos: text ITL p99",
            "ms",
            lambda one: 1e3 * percentile(one["text"]["itl_s"], 99),
        ),
        row(
            "text ITL p99, with videos / alone",
            "ratio",
            lambda one: (
                percentile(one["text"]["itl_s"], 99) / percentile(one["alone"]["itl_s"], 99)
            ),
        ),
        row("text alone: TTFT p95", "ms", lambda one: 1e3 * percentile(one["alone"]["ttft_s"], 95)),
        row(
            "with videos: text TTFT p95",
            "ms",
            lambda one: 1e3 * percentile(one["text"]["ttft_s"], 95),
        ),
        row("with videos: videos finished per minute", "1/min", _per_minute),
        row(
            "with videos: mean video TTFT", "ms", lambda one: 1e3 * np.mean(one["videos"]["ttft_s"])
        ),
        row(
            f"{mixed_engine.QUEUED_VIDEOS} videos on {mixed_engine.QUEUE_SLOTS} slots, then text: "
            "videos finished before it",
            "count",
            lambda one: sum(end < one["text_s"] for end in one["videos_s"]),
            queued,
        ),
        row("the same: text answered", "ms", lambda one: 1e3 * one["text_s"], queued),
        row("the same: all videos answered", "ms", lambda one: 1e3 * one["videos_s"][-1], queued),
    ]


def _per_minute(one: dict[str, Any]) -> float:
    """Over the time from the first video's arrival to the last one's end."""
    ends = one["videos"]["ends_s"]
    return float(60 * len(ends) / (max(ends) - mixed_engine.FIRST_VIDEO_S))


def _notes(settings: list[tuple[mixed_engine.Load, float, list[float]]]) -> list[str]:
    engine = mixed_engine
    return [
        f"text: {engine.TEXT_PROMPT} tokens in, {engine.TEXT_ANSWER} out, one in the time of "
        f"{engine.TEXT_EVERY_TOKENS} tokens; a video every {engine.VIDEO_EVERY_S:g} s, of as many "
        f"frames as stock alone takes {engine.VIDEO_S:g} s for, at most {engine.VIDEO_FRAMES_MOST},"
        f" whose prompt fills {engine.STEPS_PER_VIDEO:g} steps, from the time "
        f"{engine.FIRST_VIDEO_S:g} s on; {engine.SECONDS:g} s of arrivals a run, rendered "
        "beforehand",
        "frames, tokens of a step, the plugin's target_itl_ms, and seconds between texts by round, "
        "by repeat: "
        + "; ".join(
            f"{load.video_frames}, {load.step_tokens}, {target:.0f}, "
            + " and ".join(f"{every:.2f}" for every in spaces)
            for load, target, spaces in settings
        ),
        f"the target is {TARGET_OF_TEXT:g}x what a lone text waits on stock for its first token; "
        f"plugin: segments of {engine.SEGMENT_TOKENS} tokens",
    ]
