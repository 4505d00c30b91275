"""Token reduction: tokens, prefill time, time to first token and KV cache per setting."""

from __future__ import annotations

import contextlib
import threading
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping
from typing import Any

from vllm_mm_ext.testing.checkpoints import build
from vllm_mm_ext.testing.server import Server, serve_both
from vllm_mm_ext.tools.bench.bench_clips import other_pictures
from vllm_mm_ext.tools.bench.chat import ask, conversation
from vllm_mm_ext.tools.bench.harness import BenchContext, BenchResult, Row

# Name of a row to the request's reduction; the first is also what stock is asked.
REDUCTIONS: Mapping[str, Mapping[str, Any] | None] = {
    "as it is": None,
    "static merge, keep 0.5": {"static": "merge", "keep": 0.5},
    "prune, keep 0.25": {"static": "prune", "keep": 0.25},
    "pool 2": {"pool": 2},
    "temporal 2": {"temporal": 2},
    "pool 2, temporal 2, merge 0.5": {"pool": 2, "temporal": 2, "static": "merge", "keep": 0.5},
}
FRAMES = 32
_POLL_S = 0.01
# Long enough for a poll to see the blocks in use.
_ANSWER = 24


def run(context: BenchContext) -> BenchResult:
    """A 32 s clip of 448 x 448 pixels, new to the server every time, with every reduction."""
    # Wide and deep enough that prefill, not the request itself, is what takes the time.
    model = build(
        "qwen2_5_vl",
        context.work_dir / "qwen2_5_vl-wide",
        video_max_pixels=448 * 448,
        hidden_size=512,
        layers=6,
    )

    def clip(number: int) -> str:
        """A clip of its own for every request, or caches would answer."""
        size = {"width": 448, "height": 448, "duration": 32.0}
        return other_pictures(context.work_dir, number, **size).as_uri()

    measured: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    asked = [("stock", "as it is"), *(("plugin", name) for name in REDUCTIONS)]
    with contextlib.ExitStack() as stack:
        both = stack.enter_context(
            serve_both(
                model,
                args=[
                    *("--allowed-local-media-path", str(context.work_dir)),
                    *("--max-model-len", "8192", "--max-num-batched-tokens", "8192"),
                    *("--media-io-kwargs", f'{{"video": {{"fps": 1, "max_frames": {FRAMES}}}}}'),
                    *("--block-size", "32", "--limit-mm-per-prompt", '{"video": 1, "image": 0}'),
                ],
            )
        )
        servers = dict(zip(("stock", "plugin"), both, strict=True))
        for server in servers.values():
            ask(server, conversation(clip(0), 1))
        begin = stack.enter_context(context.steps("reduction", context.repeats * len(asked)))
        for repeat in range(context.repeats):
            for number, (side, name) in enumerate(asked):
                begin(f"{side}, {name}, repeat {repeat + 1}")
                url = clip(1 + number + repeat * len(asked))
                for what, value in _ask(servers[side], url, REDUCTIONS[name]).items():
                    measured[f"{name}: {what}"][side].append(value)
    units = {"prompt tokens": "tokens", "KV cache": "% of it"}
    rows = [
        Row.of(name, units.get(name.rpartition(": ")[2], "ms"), **sides)
        for name, sides in measured.items()
    ]
    notes = [
        f"{FRAMES} frames of 448 x 448 pixels; stock is asked without a reduction",
        "KV cache: highest usage while the answer is generated",
        "prefill: the engine's own time from scheduling a request to its first token, the "
        "encoder's work included",
    ]
    return BenchResult("reduction", rows, notes)


def _ask(server: Server, url: str, reduction: Mapping[str, Any] | None) -> dict[str, float]:
    before = server.metric("vllm:request_prefill_time_seconds_sum")
    with _highest_usage(server) as usage:
        options = {"reduction": reduction} if reduction else None
        answer = ask(server, conversation(url, 1), max_tokens=_ANSWER, options=options)
    prefill = server.metric("vllm:request_prefill_time_seconds_sum") - before
    return {
        "prompt tokens": answer.prompt_tokens,
        "prefill": 1e3 * prefill,
        "TTFT": 1e3 * answer.ttft_s,
        "KV cache": 100 * max(usage),
    }


@contextlib.contextmanager
def _highest_usage(server: Server) -> Iterator[list[float]]:
    """Usage of the KV cache (0..1), polled while the block runs."""
    seen = [0.0]
    ended = threading.Event()

    def poll() -> None:
        while not ended.is_set():
            seen.append(server.metric("vllm:kv_cache_usage_perc"))
            time.sleep(_POLL_S)

    thread = threading.Thread(target=poll)
    thread.start()
    try:
        yield seen
    finally:
        ended.set()
        thread.join()
