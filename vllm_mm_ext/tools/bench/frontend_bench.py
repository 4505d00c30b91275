"""Time and CPU from a URL to sampled frames on first sight, through the media connectors."""

from __future__ import annotations

import asyncio
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil  # type: ignore[import-untyped]
from vllm.multimodal.media import MediaConnector

from vllm_mm_ext.adapters.media.media_connector import MMExtMediaConnector
from vllm_mm_ext.adapters.runtime import attach_runtime, detach_runtime
from vllm_mm_ext.config.root import MMExtConfig
from vllm_mm_ext.media.traits import ModelTraits
from vllm_mm_ext.media.types import SizeRule
from vllm_mm_ext.tools.bench.bench_clips import (
    cached_clip,
    clip_1080p,
    minute_720p,
    ten_minutes_720p,
    variant,
)
from vllm_mm_ext.tools.bench.harness import BenchContext, BenchResult, Row

FRAMES = 32
# The size rule of Qwen2.5-VL and Qwen2.5-Omni as published: 28 x 28 pixels a token, 128 to 768
# tokens a frame pair.
_QWEN_SIZE = SizeRule(kind="qwen_vl", factor=28, min_pixels=128 * 28 * 28, max_pixels=768 * 28 * 28)


@dataclass(frozen=True)
class _Case:
    """One row: a clip, the plugin's policy, and whether frames are resized while decoding."""

    name: str
    clip: Callable[[Path], Path]
    policy: str = "uniform"
    resize: bool = False


_CASES = (
    _Case("60 s 720p GOP 250", minute_720p),
    _Case("10 min 720p GOP 60", ten_minutes_720p),
    _Case("30 s 1080p GOP 120", clip_1080p),
    _Case("60 s 720p GOP 250", minute_720p, policy="adaptive"),
    _Case("60 s 720p GOP 250", minute_720p, resize=True),
    _Case("10 min 720p GOP 60", ten_minutes_720p, resize=True),
    _Case("30 s 1080p GOP 120", clip_1080p, resize=True),
)


def run(context: BenchContext) -> BenchResult:
    """32 frames of each clip through stock's connector and the plugin's, alternating.

    Every measurement has a file nobody saw before (same frames, other bytes). Frames are at
    native size on both sides unless a row says otherwise.
    """
    rows: list[Row] = []
    with context.scratch() as media:
        for number, case in enumerate(_CASES):
            source = case.clip(context.work_dir)
            wall: dict[str, list[float]] = defaultdict(list)
            cpu: dict[str, list[float]] = defaultdict(list)
            with (
                _plugin_runtime(case, context.work_dir, media) as workers,
                context.steps(f"frontend, {_label(case)}", 2 * context.repeats) as begin,
            ):
                for repeat in range(context.repeats):
                    sides = ("stock", "plugin") if repeat % 2 == 0 else ("plugin", "stock")
                    for side in sides:
                        begin(side)
                        file = variant(source, media / f"{side}-{number}-{repeat}.mp4", repeat)
                        before = _cpu_s(workers())
                        wall[side].append(_frames_ready(side, file, media))
                        cpu[side].append(1e3 * (_cpu_s(workers()) - before))
                        file.unlink()
            rows.append(Row.of(f"frames ready, {_label(case)}", "ms", **wall))
            rows.append(Row.of(f"CPU of it, {_label(case)}", "ms", **cpu))
    notes = [
        f"{FRAMES} frames; stock samples uniformly in every row",
        "CPU: of this process and its decode workers",
        "'at model size': the plugin's decoder delivers what the model's processor would resize "
        "to (Qwen2.5 rule); stock's frames are at native size and still have to be resized",
    ]
    return BenchResult("frontend", rows, notes)


def _label(case: _Case) -> str:
    return f"{case.policy}, {case.name}{', at model size' if case.resize else ''}"


@contextmanager
def _plugin_runtime(case: _Case, work_dir: Path, media: Path) -> Iterator[Callable[[], list[int]]]:
    """The plugin's front-end; yields what tells the ids of its decode workers."""
    config = MMExtConfig.model_validate(
        {
            "media": {
                "resize": "target" if case.resize else "native",
                "sampling": {
                    "policy": case.policy,
                    "fps": 1.0,
                    "max_frames": FRAMES,
                    "min_frames": FRAMES,
                },
            }
        }
    )
    runtime = attach_runtime(config, ModelTraits(size_rule=_QWEN_SIZE))
    # Decode workers start on first use; serving pays for that once.
    tiny = cached_clip(work_dir, width=320, height=180, duration=2.0, gop=30)
    for number in range(4):
        _frames_ready("plugin", variant(tiny, media / f"tiny-{number}.mp4", number), media)
    try:
        yield runtime.frontend.pool.worker_pids
    finally:
        detach_runtime()


def _cpu_s(workers: Sequence[int]) -> float:
    """CPU seconds used so far by this process and by decode workers."""
    times = [psutil.Process(pid).cpu_times() for pid in workers]
    return time.process_time() + float(sum(each.user + each.system for each in times))


def _frames_ready(side: str, file: Path, media: Path) -> float:
    """Milliseconds until the connector returned the frames of ``file``."""
    options: dict[str, Any] = {"allowed_local_media_path": str(media)}
    if side == "stock":
        connector = MediaConnector(media_io_kwargs={"video": {"num_frames": FRAMES}}, **options)
    else:
        connector = MMExtMediaConnector(**options)
    started = time.perf_counter()
    result = asyncio.run(connector.fetch_video_async(file.as_uri()))
    seconds = time.perf_counter() - started
    media_item = getattr(result, "media", result)
    if len(media_item[0]) != FRAMES and "tiny" not in file.name:
        raise RuntimeError(f"{side} delivered {len(media_item[0])} frames, not {FRAMES}")
    return 1e3 * seconds
