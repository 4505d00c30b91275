"""Many video requests at once: memory of the front-end, and work done for one shared video."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vllm_mm_ext.testing.checkpoints import checkpoint
from vllm_mm_ext.testing.memory import cpu_seconds
from vllm_mm_ext.testing.server import Server, serve
from vllm_mm_ext.tools.bench.bench_clips import other_minute_720p
from vllm_mm_ext.tools.bench.chat import ask, conversation
from vllm_mm_ext.tools.bench.followup import encoded_tokens, server_args
from vllm_mm_ext.tools.bench.harness import BenchContext, BenchResult, Row

DISTINCT = 16
SHARED = 64
MIB = 1 << 20
# Small on purpose: a bound shows only where the work would like more.
BUDGET = {"encoded_mb": 64, "decoded_mb": 128, "in_flight_mb": 128}
_CONFIG = {
    "mm_ext": {
        "media": {
            "cache": BUDGET,
        }
    }
}


@dataclass(frozen=True)
class _Measured:
    """One server's answers to both loads; what stock does not tell is None."""

    api_mib: float
    front_end_mib: float
    distinct_s: float
    shared_s: float
    shared_cpu_s: float
    jobs: float | None
    encoded: float | None


def run(context: BenchContext) -> BenchResult:
    """16 distinct 60 s 720p videos at once, then 64 requests for one; one server at a time."""
    sides: dict[str, list[_Measured]] = {"stock": [], "plugin": []}
    with context.steps("load", 1 + 2 * context.repeats) as begin:
        begin("clips")
        # Without a picture in common: caches know videos by their pictures.
        files = [other_minute_720p(context.work_dir, number) for number in range(DISTINCT + 2)]
        for repeat in range(context.repeats):
            for side, measured in sides.items():
                begin(f"{side}, repeat {repeat + 1}")
                measured.append(_measure(context.work_dir, files, side == "plugin"))
    many = f"{DISTINCT} distinct 60 s 720p videos at once"
    same = f"{SHARED} concurrent requests for one video"

    def row(name: str, unit: str, field: str) -> Row:
        runs = {
            side: [value for m in measured if (value := getattr(m, field)) is not None]
            for side, measured in sides.items()
        }
        return Row.of(name, unit, **runs)

    rows = [
        row(f"API-server memory growth, {many}", "MiB", "api_mib"),
        row(f"memory growth with decode workers, {many}", "MiB", "front_end_mib"),
        row(f"all answered, {many}", "s", "distinct_s"),
        row(f"tokens encoded, {many}", "tokens", "encoded"),
        row(f"decode jobs, its probe among them, {same}", "count", "jobs"),
        row(f"all answered, {same}", "s", "shared_s"),
        row(f"CPU time of API server and workers, {same}", "s", "shared_cpu_s"),
    ]
    total = sum(BUDGET.values())
    notes = [
        f"plugin budgets: {json.dumps(BUDGET)}; together {total} MiB, so at most {total + 300} "
        "MiB of growth is expected",
        "memory: highest proportional set size during the load, less that of the idle server",
        "stock keeps no count of its decodes; its CPU time tells",
    ]
    return BenchResult("load", rows, notes)


def _measure(media: Path, files: Sequence[Path], plugin: bool) -> _Measured:
    """What a new server does with the files: the first one warms it up, the last is shared."""
    warm_up, *distinct, shared = files
    with serve(
        checkpoint("qwen2_5_omni"),
        plugin=plugin,
        args=server_args(media),
        additional_config=_CONFIG if plugin else None,
    ) as server:
        _ask_all(server, [warm_up])
        encoded = encoded_tokens(server) if plugin else None
        api_before = _pss(server, "api")
        with server.peak_memory() as watch:
            started = time.perf_counter()
            _ask_all(server, distinct)
            distinct_s = time.perf_counter() - started
        if encoded is not None:
            encoded = encoded_tokens(server) - encoded
        jobs, cpu = _jobs(server) if plugin else None, _cpu_s(server)
        started = time.perf_counter()
        _ask_all(server, [shared] * SHARED)
        shared_s = time.perf_counter() - started
        return _Measured(
            api_mib=(watch.peak["api"] - api_before) / MIB,
            front_end_mib=(watch.front_end - watch.before) / MIB,
            distinct_s=distinct_s,
            shared_s=shared_s,
            shared_cpu_s=_cpu_s(server) - cpu,
            jobs=_jobs(server) - jobs if jobs is not None else None,
            encoded=encoded,
        )


def _ask_all(server: Server, files: Sequence[Path]) -> None:
    def one(file: Path) -> None:
        ask(server, conversation(file.as_uri(), 1), max_tokens=1)

    with ThreadPoolExecutor(len(files)) as pool:
        # Errors of any request surface here.
        list(pool.map(one, files))


def _jobs(server: Server) -> float:
    stats: dict[str, Any] = json.loads(server.get("/mm_ext/stats"))
    return float(stats["decode"]["jobs"])


def _pss(server: Server, role: str) -> int:
    return sum(process.pss for process in server.memory() if process.role == role)


def _cpu_s(server: Server) -> float:
    """CPU seconds used so far by everything but the engine."""
    return sum(seconds for role, seconds in cpu_seconds(server.pid).items() if role != "engine")
