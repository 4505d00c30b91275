"""Videos as segments: what is served, encoded again, kept, and how soon the first token comes."""

from __future__ import annotations

import contextlib
import shutil
from collections import defaultdict
from pathlib import Path
from typing import Any

import openai

from vllm_mm_ext.testing.checkpoints import build
from vllm_mm_ext.testing.remux import keep_first
from vllm_mm_ext.testing.server import Server, serve_both
from vllm_mm_ext.tools.bench import segments_engine
from vllm_mm_ext.tools.bench.bench_clips import other_pictures
from vllm_mm_ext.tools.bench.chat import Answer, ask, conversation
from vllm_mm_ext.tools.bench.harness import BenchContext, BenchResult, Row
from vllm_mm_ext.tools.bench.inprocess import measure
from vllm_mm_ext.tools.bench.segments_engine import CHUNK, CONFIG, CONTEXT, FPS, MAX_FRAMES

_SIDES = ("stock", "plugin")
# Tokens of a frame pair of 448 x 224 pixels, in patches of 28 x 28 pixels.
GRID_TOKENS = 128
# What vLLM profiles for this checkpoint: 14 frames of 448 x 448 pixels.
STOCK_ENCODER_CACHE = 1792


def checkpoint(context: BenchContext) -> Path:
    """A tiny Qwen2.5-VL that takes frames of up to 448 x 448 pixels."""
    return build("qwen2_5_vl", context.work_dir / "qwen2_5_vl-448", video_max_pixels=448 * 448)


def make_media(context: BenchContext, media: Path) -> None:
    """The clips, all of 448 x 224 pixels: a clip and parts of it, long ones and a huge one."""

    def clip(name: str, seconds: float, number: int) -> Path:
        made = other_pictures(context.work_dir, number, width=448, height=224, duration=seconds)
        return Path(shutil.copy(made, media / name))

    whole = clip("clip.mp4", 20.0, 0)
    keep_first(whole, media / "short.mp4", seconds=16.0)
    keep_first(whole, media / "trimmed.mp4", seconds=15.0)
    clip("huge.mp4", 57.0, 1)
    # Just under what stock takes; the engines have their own.
    for repeat in range(-1, context.repeats):
        clip(f"long-{repeat}.mp4" if repeat >= 0 else "long.mp4", 13.0, 3 + repeat)


def run(context: BenchContext) -> BenchResult:
    """Engines in one process for what is encoded and cached, servers for answers and times."""
    model = checkpoint(context)
    with contextlib.ExitStack() as stack:
        media = stack.enter_context(context.scratch())
        begin = stack.enter_context(context.steps("segments", 4 + 2 * context.repeats))
        begin("clips")
        make_media(context, media)
        engines = {}
        for side in _SIDES:
            begin(f"{side}, engine")
            engines[side] = measure("segments_engine", side, [str(model), str(media)])
        begin("servers")
        both = stack.enter_context(
            serve_both(model, args=_server_args(media), additional_config=CONFIG)
        )
        servers = dict(zip(_SIDES, both, strict=True))
        served = {side: _is_served(server, media / "huge.mp4") for side, server in servers.items()}
        # The first video request of a server pays for lazy imports and worker starts.
        for server in servers.values():
            ask(server, conversation((media / "long.mp4").as_uri(), 1))
        answers: dict[str, list[Answer]] = defaultdict(list)
        for repeat in range(context.repeats):
            for side in _SIDES if repeat % 2 == 0 else _SIDES[::-1]:
                begin(f"{side}, first token, repeat {repeat + 1}")
                file = media / f"long-{repeat}.mp4"
                answers[side].append(ask(servers[side], conversation(file.as_uri(), 1)))
    _write_steps(context.work_dir / "segments-steps.txt", engines)
    rows = [*_rows(engines, served)]
    rows.append(
        Row.of(
            "TTFT, first turn, 13 segments, chunked prefill",
            "ms",
            stock=[1e3 * answer.ttft_s for answer in answers["stock"]],
            plugin=[1e3 * answer.ttft_s for answer in answers["plugin"]],
        )
    )
    return BenchResult("segments", rows, _notes(engines, answers))


def _server_args(media: Path) -> list[str]:
    return [
        *("--allowed-local-media-path", str(media)),
        *("--max-model-len", str(CONTEXT)),
        *("--max-num-batched-tokens", str(CHUNK)),
        *("--limit-mm-per-prompt", '{"video": 1, "image": 0}'),
        *("--media-io-kwargs", f'{{"video": {{"fps": {FPS}, "max_frames": {MAX_FRAMES}}}}}'),
        *("--block-size", "32"),
    ]


def _is_served(server: Server, file: Path) -> bool:
    # Not streamed: stock would send its error as an event of a stream with status 200.
    messages: Any = conversation(file.as_uri(), 1)
    try:
        with server.client(timeout=600.0) as client:
            client.chat.completions.create(model=server.model, messages=messages, max_tokens=4)
    except openai.BadRequestError:
        return False
    return True


def _rows(engines: dict[str, Any], served: dict[str, bool]) -> list[Row]:
    def row(name: str, unit: str, *path: str) -> Row:
        values: dict[str, list[float]] = {}
        for side, found in engines.items():
            value = found
            for key in path:
                value = value[key]
            values[side] = [float(value)]
        return Row.of(name, unit, **values)

    answered = {side: [float(value)] for side, value in served.items()}
    rows = [Row.of("4x the encoder cache: answered (stock: 400)", "1 = yes", **answered)]
    rows.append(row("largest encoder call (stock: a 13 s video)", "patches", "long", "max_patches"))
    for case in ("extended", "trimmed", "partial KV loss"):
        what = {"extended": "clip extended by 25 %", "trimmed": "clip trimmed by 25 %"}
        name = what.get(case, "last KV blocks evicted")
        rows.append(row(f"{name}: tokens encoded", "tokens", "reuse", case, "encoded_tokens"))
        rows.append(row(f"{name}: items encoded", "count", "reuse", case, "encoded_items"))
        rows.append(row(f"{name}: prompt from KV", "share", "reuse", case, "cached_share"))
    rows.append(
        row("steps that encode and prefill with more to come", "count", "long", "overlapping_steps")
    )
    return rows


def _notes(engines: dict[str, Any], answers: dict[str, list[Answer]]) -> list[str]:
    huge, again = engines["plugin"]["long"], engines["plugin"]["reuse"]
    clip = again["partial KV loss"]["prompt"]
    return [
        f"segments of {segments_engine.SEGMENT_TOKENS} tokens, encoder calls of at most "
        f"{segments_engine.ENCODER_PATCHES} patches; the clip's prompt: {clip:.0f} tokens",
        f"4x the encoder cache: prompt of {huge['prompt']} tokens, {huge['items']} segments, "
        f"steps of {CHUNK} tokens; stock's encoder cache holds {STOCK_ENCODER_CACHE}",
        f"TTFT: prompts of {answers['stock'][0].prompt_tokens} tokens stock, "
        f"{answers['plugin'][0].prompt_tokens} plugin",
        "evicted KV: by text prompts; the encoder cache is emptied, as its outputs would be there",
        "engine steps of both sides: segments-steps.txt in the work directory",
    ]


def _write_steps(target: Path, engines: dict[str, Any]) -> None:
    lines = []
    for side, found in engines.items():
        lines.append(f"{side}: items encoded / their tokens / prompt tokens / answer tokens")
        for number, step in enumerate(found["steps"]):
            for work in step["work"]:
                tokens = sum(item["embeddings"] for item in work["encoded"])
                indices = [item["index"] for item in work["encoded"]]
                lines.append(
                    f"{number:4} {1e3 * step['started_s']:8.0f} ms  {indices!s:24} {tokens:6} "
                    f"{work['prefill']:6} {work['decode']:4}"
                )
    target.write_text("\n".join(lines) + "\n")
