"""``encoder-cache``: encoder work of follow-up turns whose KV is lost, and their first tokens."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from vllm_mm_ext.tools.bench.bench_clips import other_pictures
from vllm_mm_ext.tools.bench.encoder_cache_engine import CHUNK, TURNS, VIDEO_TOKENS, VIDEOS
from vllm_mm_ext.tools.bench.harness import BenchContext, BenchResult, Row
from vllm_mm_ext.tools.bench.inprocess import measure
from vllm_mm_ext.tools.bench.segments_bench import checkpoint

_RUNS = {"stock": ("stock", "own"), "device": ("plugin", "device"), "host": ("plugin", "host")}
_TIERS = {"device": "device tier of the same size", "host": "device and host tier"}


def run(context: BenchContext) -> BenchResult:
    """The same conversations through vLLM's cache, the device tier, and both tiers."""
    model = checkpoint(context)
    found: dict[str, list[Any]] = {name: [] for name in _RUNS}
    with (
        context.scratch() as media,
        context.steps("encoder-cache", len(_RUNS) * context.repeats + 1) as begin,
    ):
        begin("clips")
        _make_media(context, media)
        for repeat in range(context.repeats):
            for name, (side, tiers) in _RUNS.items():
                begin(f"{name}, repeat {repeat + 1}")
                arguments = [str(model), str(media), tiers]
                found[name].append(measure("encoder_cache_engine", side, arguments))
    rows = [row for name in _TIERS for row in _rows(name, found["stock"], found[name])]
    kv = sum(turn["kv_tokens"] for turn in found["stock"][0])
    return BenchResult(
        "encoder-cache",
        rows,
        [
            f"{VIDEOS} conversations in turn, {TURNS} turns, videos of {VIDEO_TOKENS} tokens; "
            f"vLLM's encoder cache and the device tier hold {CHUNK} tokens, the KV cache "
            f"(vLLM's own) about four of the conversations ({kv} tokens of it found again)",
            "follow-ups: turns 2 on; TTFT: from the engine's queue to the first token",
        ],
    )


def _make_media(context: BenchContext, media: Path) -> None:
    for number in range(VIDEOS):
        made = other_pictures(context.work_dir, number, width=448, height=224, duration=8.0)
        shutil.copy(made, media / f"{number}.mp4")


def _rows(name: str, stock: list[Any], plugin: list[Any]) -> list[Row]:
    def follow_ups(runs: list[Any], key: str) -> list[float]:
        return [float(sum(turn[key] for turn in turns[1:])) for turns in runs]

    def first(runs: list[Any]) -> list[float]:
        return [1e3 * s for turns in runs for turn in turns[1:] for s in turn["first_s"]]

    what = _TIERS[name]
    return [
        Row.of(
            f"{what}: tokens encoded in follow-ups",
            "tokens",
            stock=follow_ups(stock, "tokens"),
            plugin=follow_ups(plugin, "tokens"),
        ),
        Row.of(
            f"{what}: items encoded in follow-ups (stock: whole videos)",
            "count",
            stock=follow_ups(stock, "items"),
            plugin=follow_ups(plugin, "items"),
        ),
        Row.of(f"{what}: TTFT of follow-ups", "ms", stock=first(stock), plugin=first(plugin)),
    ]
