"""``worker-inputs``: what pixels of cached videos cost on their way to the worker, first and later.

Both sides have the plugin's scheduler and encoder cache. On the side "stock" each request takes all
its pixels to the worker, as with V1 model runners it did before they were held back.
"""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import Any

import openai

from vllm_mm_ext.adapters.scheduler.mm_scheduler import MMExtScheduler
from vllm_mm_ext.testing.checkpoints import build
from vllm_mm_ext.testing.engine_arguments import EVERY_PART, as_flags
from vllm_mm_ext.testing.memory import cpu_seconds
from vllm_mm_ext.testing.server import Server, serve
from vllm_mm_ext.tools.bench.bench_clips import minute_720p, variant
from vllm_mm_ext.tools.bench.chat import ask, conversation
from vllm_mm_ext.tools.bench.harness import BenchContext, BenchResult, Row

FRAMES = 32
FRAME_PIXELS = 640 * 360
# Of a prompt token: two frames of 28x28 pixels, three colours, 4 bytes for each value.
_TOKEN_BYTES = 2 * 28 * 28 * 3 * 4
FOLLOW_UPS = 20
_SIDES = ("stock", "plugin")


class WithTheRequest(MMExtScheduler):
    """The plugin's scheduler, with all inputs sent at once."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._sends_late = False


def run(context: BenchContext) -> BenchResult:
    """One server after the other; each repeat has a new video, and follow-ups about it."""
    model = build(
        "qwen2_5_vl", context.work_dir / "qwen2_5_vl-inputs", video_max_pixels=FRAME_PIXELS
    )
    clip = minute_720p(context.work_dir)
    found: dict[str, dict[str, list[float]]] = {}
    with contextlib.ExitStack() as stack:
        media = stack.enter_context(context.scratch())
        videos = [
            variant(clip, media / f"{number}.mp4", number) for number in range(context.repeats + 1)
        ]
        begin = stack.enter_context(context.steps("worker-inputs", len(_SIDES)))
        for side in _SIDES:
            begin(side)
            with _server(model, media, side) as server:
                found[side] = _asked(server, [video.as_uri() for video in videos])
    tokens = found["plugin"].pop("tokens")[0]
    rows = [
        Row.of(name, unit, **{side: found[side][name] for side in _SIDES})
        for name, unit in (
            ("first turn: time to first token", "ms"),
            ("follow-ups: CPU of the engine and its worker, each", "ms"),
            ("follow-ups: CPU of the API server, each", "ms"),
            ("follow-ups: time to first token", "ms"),
        )
    ]
    notes = [
        f"60 s of 720p in {FRAMES} frames, a prompt of {tokens:.0f} tokens: "
        f"{tokens * _TOKEN_BYTES / 1e6:.0f} MB of pixels; {FOLLOW_UPS} follow-ups a repeat, one at "
        "a time",
        "stock: the plugin, with all inputs sent with each request",
    ]
    return BenchResult("worker-inputs", rows, notes)


def _server(model: Path, media: Path, side: str) -> Any:
    parts = dict(EVERY_PART)
    if side == "stock":
        parts["scheduler_cls"] = f"{__name__}.{WithTheRequest.__name__}"
    return serve(
        model,
        plugin=True,
        args=[
            *("--allowed-local-media-path", str(media)),
            *("--max-model-len", "8192", "--dtype", "float32"),
            *("--limit-mm-per-prompt", '{"video": 1, "image": 0}'),
            *("--media-io-kwargs", json.dumps({"video": {"fps": 1, "max_frames": FRAMES}})),
            *as_flags(parts),
        ],
    )


def _asked(server: Server, videos: list[str]) -> dict[str, list[float]]:
    """Each measurement by name, one for each video but the first."""
    tokens: list[float] = []
    first: list[float] = []
    engine: list[float] = []
    api: list[float] = []
    later: list[float] = []
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="-") as client:
        for number, url in enumerate(videos):
            answer = ask(server, conversation(url, 1), client=client)
            before = cpu_seconds(server.pid)
            # Each turn finds the KV of the one before, up to its question.
            times = [
                ask(server, conversation(url, 2 + place), client=client).ttft_s
                for place in range(FOLLOW_UPS)
            ]
            after = cpu_seconds(server.pid)
            if number:
                tokens.append(answer.prompt_tokens)
                first.append(1e3 * answer.ttft_s)
                engine.append(1e3 * (after["engine"] - before["engine"]) / FOLLOW_UPS)
                api.append(1e3 * (after["api"] - before["api"]) / FOLLOW_UPS)
                later += [1e3 * each for each in times]
    return {
        "tokens": tokens,
        "first turn: time to first token": first,
        "follow-ups: CPU of the engine and its worker, each": engine,
        "follow-ups: CPU of the API server, each": api,
        "follow-ups: time to first token": later,
    }
