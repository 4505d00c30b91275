"""A two-hour video asked of a model with a 32k context."""

from __future__ import annotations

import contextlib
import json
import shutil
import time
from pathlib import Path
from typing import Any

import openai

from vllm_mm_ext.testing.checkpoints import build
from vllm_mm_ext.testing.server import Server, serve_both
from vllm_mm_ext.tools.bench.bench_clips import cached_clip, variant
from vllm_mm_ext.tools.bench.chat import Answer, ask, conversation
from vllm_mm_ext.tools.bench.harness import BenchContext, BenchResult, Row

MIB = 1 << 20
CONTEXT = 32768
HOURS = 2
# Frames asked for: 98,304 tokens at the size that the model takes.
MAX_FRAMES = 768
# What cannot fit, however much its tokens are reduced.
IMPOSSIBLE = {"total_tokens": 1024, "floor": {"frames": 384, "resolution": 448}}


def run(context: BenchContext) -> BenchResult:
    """The whole video as the server is configured, then with floors that do not fit."""
    model = build("qwen2_5_vl", context.work_dir / "qwen2_5_vl-448", video_max_pixels=448 * 448)
    with contextlib.ExitStack() as stack:
        media = stack.enter_context(context.scratch())
        begin = stack.enter_context(context.steps("fit", 5))
        begin("clip")
        clip = _two_hours(context, media)
        begin("servers")
        stock, plugin = stack.enter_context(
            serve_both(
                model,
                args=[
                    *("--allowed-local-media-path", str(media)),
                    *("--max-model-len", str(CONTEXT)),
                    *(
                        "--media-io-kwargs",
                        f'{{"video": {{"fps": 1, "max_frames": {MAX_FRAMES}}}}}',
                    ),
                    *("--limit-mm-per-prompt", '{"video": 1, "image": 0}'),
                ],
            )
        )
        begin("stock")
        before, refused = _timed(stock, clip, None)
        begin("plugin")
        served_s, served = _timed(plugin, clip, None)
        begin("plugin, floors that do not fit")
        decoded = _decoded_mib(plugin)
        # Another file, so that nothing is remembered of it.
        other = variant(clip, media / "other.mp4", 1)
        floor_s, floored = _timed(plugin, other, IMPOSSIBLE)
        decoded = _decoded_mib(plugin) - decoded
    answered = [[float(isinstance(outcome, Answer))] for outcome in (refused, served)]
    rows = [
        Row.of("answered", "1 = yes", stock=answered[0], plugin=answered[1]),
        Row.of("until the answer, or the error", "s", stock=[before], plugin=[served_s]),
    ]
    notes = [f"{HOURS} h of 448 x 256 pixels; {MAX_FRAMES} frames asked, {CONTEXT} tokens context"]
    if isinstance(served, Answer):
        rows.append(Row.of("prompt", "tokens", plugin=[float(served.prompt_tokens)]))
        video = {k: v for k, v in served.report["videos"][0].items() if k != "times"}
        notes.append(f"applied: {json.dumps(video)}")
    rows.append(Row.of("floors that do not fit: until the error", "s", plugin=[floor_s]))
    rows.append(Row.of("floors that do not fit: frames decoded", "MiB", plugin=[decoded]))
    for name, outcome in (("stock", refused), ("floors", floored)):
        notes.append(f"{name}: {outcome if isinstance(outcome, str) else 'answered'}")
    return BenchResult("fit", rows, notes)


def _two_hours(context: BenchContext, media: Path) -> Path:
    made = cached_clip(
        context.work_dir,
        width=448,
        height=256,
        duration=3600.0 * HOURS,
        fps=1,
        gop=10,
        preset="ultrafast",
    )
    return Path(shutil.copy(made, media / "hours.mp4"))


def _timed(
    server: Server, file: Path, options: dict[str, Any] | None
) -> tuple[float, Answer | str]:
    """Seconds, and the answer or the error."""
    started = time.perf_counter()
    outcome: Answer | str
    try:
        outcome = ask(server, conversation(file.as_uri(), 1), options=options)
    except openai.APIError as error:
        # Stock tells of it inside a stream that began well.
        outcome = f"{getattr(error, 'status_code', 'in the stream')}: {error.message}"
    return time.perf_counter() - started, outcome


def _decoded_mib(server: Server) -> float:
    """Decoded frames that the front-end keeps."""
    stats: dict[str, Any] = json.loads(server.get("/mm_ext/stats"))
    return float(stats["decoded_cache"]["num_bytes"]) / MIB
