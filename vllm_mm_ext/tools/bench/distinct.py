"""Many different clips through the server: requests a second, and CPU time of the front-end."""

from __future__ import annotations

import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from vllm_mm_ext.testing.checkpoints import checkpoint
from vllm_mm_ext.testing.memory import cpu_seconds
from vllm_mm_ext.testing.server import Server, serve
from vllm_mm_ext.tools.bench.bench_clips import cached_clip
from vllm_mm_ext.tools.bench.chat import ask, conversation
from vllm_mm_ext.tools.bench.distinct_clips import footage_clips
from vllm_mm_ext.tools.bench.followup import server_args
from vllm_mm_ext.tools.bench.harness import BenchContext, BenchResult, Row

CLIPS = 48
AT_A_TIME = 16


@dataclass(frozen=True)
class _Measured:
    """One server's work.

    Attributes:
        first_s, second_s: Seconds to the first token of the first and the second request of the
            server's life, each about a clip of its own.
        rate: Requests a second, ``AT_A_TIME`` at a time.
        front_end_s: CPU seconds of the API server and its decode workers per request.
        all_s: CPU seconds of all processes per request.
    """

    first_s: float
    second_s: float
    rate: float
    front_end_s: float
    all_s: float


def run(context: BenchContext) -> BenchResult:
    """Both servers, one after the other, with the same clips; stock first in every other repeat."""
    clips = footage_clips(context.work_dir, CLIPS)
    sides: dict[str, list[_Measured]] = {"stock": [], "plugin": []}
    with context.steps("distinct", 2 * context.repeats) as begin:
        for repeat in range(context.repeats):
            for side in list(sides) if repeat % 2 == 0 else list(sides)[::-1]:
                begin(f"{side}, repeat {repeat + 1}")
                sides[side].append(_measure(context, clips, side == "plugin"))

    def row(name: str, unit: str, field: str) -> Row:
        runs = {side: [getattr(m, field) for m in done] for side, done in sides.items()}
        return Row.of(name, unit, **runs)

    many = f"{CLIPS} clips of 10 s, 360p, {AT_A_TIME} at a time"
    rows = [
        row(f"requests a second, {many}", "1/s", "rate"),
        row(f"CPU of API server and workers a request, {many}", "s", "front_end_s"),
        row(f"CPU of all processes a request, {many}", "s", "all_s"),
        row("first token of the first request after start", "ms", "first_s"),
        row("first token of the second request, another clip", "ms", "second_s"),
    ]
    notes = [
        "the clips are cut from real footage and have no sound; a tiny Qwen2.5-Omni, 1 token",
        "a server has answered two requests about other clips before the clips",
    ]
    return BenchResult("distinct", rows, notes)


def _measure(context: BenchContext, clips: Sequence[Path], plugin: bool) -> _Measured:
    first, second = (
        cached_clip(context.work_dir, width=640, height=360, duration=10.0, gop=250, seed=seed)
        for seed in (11, 12)
    )
    with serve(
        checkpoint("qwen2_5_omni"), plugin=plugin, args=server_args(context.work_dir)
    ) as server:
        # What a server does in the background after its start is done when a client comes.
        time.sleep(5.0)
        first_s = _ask(server, first)
        second_s = _ask(server, second)
        api_before, engine_before = _cpu_s(server)
        started = time.perf_counter()
        with ThreadPoolExecutor(AT_A_TIME) as pool:
            # Errors of any request surface here.
            list(pool.map(lambda clip: _ask(server, clip), clips))
        seconds = time.perf_counter() - started
        api, engine = _cpu_s(server)
    api, engine = api - api_before, engine - engine_before
    return _Measured(
        first_s=1e3 * first_s,
        second_s=1e3 * second_s,
        rate=len(clips) / seconds,
        front_end_s=api / len(clips),
        all_s=(api + engine) / len(clips),
    )


def _ask(server: Server, clip: Path) -> float:
    return ask(server, conversation(clip.as_uri(), 1), max_tokens=1).ttft_s


def _cpu_s(server: Server) -> tuple[float, float]:
    """CPU seconds used so far: by the API server and its workers, and by the engine."""
    spent = cpu_seconds(server.pid)
    engine = spent.pop("engine")
    return sum(spent.values()), engine
