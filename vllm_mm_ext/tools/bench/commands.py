"""The benchmarks by name. Their modules are imported only when they run."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import StrEnum
from types import MappingProxyType

from vllm_mm_ext.tools.bench.harness import BenchContext, BenchResult


class LongVideoPart(StrEnum):
    """What `long-video` measures, each part by itself."""

    accuracy = "accuracy"
    tokens = "tokens"
    second = "second"
    repeated = "repeated"
    disconnect = "disconnect"
    sequential = "sequential"
    memory = "memory"
    decode = "decode"
    text = "text"


class LivePart(StrEnum):
    """What `live` measures, each part by itself."""

    first_token = "first-token"
    units = "units"
    sessions = "sessions"
    dropped = "dropped"
    answers = "answers"
    fuzz = "fuzz"
    senses = "senses"
    hour = "hour"


class FleetPart(StrEnum):
    """What `fleet` measures, each part by itself."""

    routing = "routing"
    balance = "balance"
    moves = "moves"
    encode_apart = "encode-apart"
    decode_once = "decode-once"
    encoder_killed = "encoder-killed"
    simulated = "simulated"


class TrafficKind(StrEnum):
    """What traffic `scheduler` serves."""

    mixed = "mixed"
    steady = "steady"
    videos = "videos"
    six_on_four = "six-on-four"
    aging = "aging"


class AccessKind(StrEnum):
    """What traffic `kv-replay` has recorded."""

    rounds = "rounds"
    conversations = "conversations"
    text_churn = "text-churn"
    scans = "scans"
    growing = "growing"
    mix = "mix"


@dataclass(frozen=True)
class Benchmark:
    """One benchmark.

    Attributes:
        name: Its name on the command line.
        shows: One line: what it shows.
        target: ``module:function`` under ``vllm_mm_ext.tools.bench``; takes a ``BenchContext``.
        repeats: Default number of repeats.
        repeatable: Whether it can be told to repeat its measurements.
    """

    name: str
    shows: str
    target: str
    repeats: int = 3
    repeatable: bool = True

    def load(self) -> Callable[[BenchContext], BenchResult]:
        """Import and return its function."""
        module, _, function = self.target.partition(":")
        loaded: Callable[[BenchContext], BenchResult] = getattr(
            importlib.import_module(f"vllm_mm_ext.tools.bench.{module}"), function
        )
        return loaded


BENCHMARKS: Mapping[str, Benchmark] = MappingProxyType(
    {
        benchmark.name: benchmark
        for benchmark in (
            Benchmark(
                "frontend",
                "Time to frames ready on first sight, per clip and sampling policy.",
                "frontend_bench:run",
                repeats=5,
            ),
            Benchmark(
                "followup",
                "Time to first token of follow-up turns about one video, file and http.",
                "followup:run",
            ),
            Benchmark(
                "load",
                "Many videos at once: API-server memory, and one video asked for 64 times.",
                "load_bench:run",
                repeats=1,
            ),
            Benchmark(
                "distinct",
                "48 different clips of real footage, 16 at a time: requests a second, CPU time.",
                "distinct:run",
            ),
            Benchmark(
                "waiting",
                "200 requests with 50 MiB videos at once: API-server memory, and who is refused.",
                "waiting:run",
                repeats=1,
            ),
            Benchmark(
                "soak",
                "Mixed work for minutes or hours: memory, descriptors and threads over time.",
                "soak:run",
                repeats=1,
            ),
            Benchmark(
                "media-robustness",
                "2,000 damaged files, impostors and bombs through the server; text alongside.",
                "robustness:run",
                repeats=1,
                repeatable=False,
            ),
            Benchmark(
                "sampling",
                "Short events caught, or with --footage what frames stand for: uniform, adaptive.",
                "sampling:run",
                repeats=1,
            ),
            Benchmark(
                "segments",
                "Videos larger than the encoder cache, clips that grew, lost KV, first tokens.",
                "segments_bench:run",
            ),
            Benchmark(
                "preprocessing",
                "Time on the preprocessing thread per video, first and later turns.",
                "preprocessing_bench:run",
            ),
            Benchmark(
                "reduction",
                "Tokens, prefill time, first token and KV cache per token reduction.",
                "reduction:run",
            ),
            Benchmark(
                "fit",
                "Two hours of video asked of a 32k context: fitted, or refused before decoding.",
                "fit_bench:run",
                repeats=1,
                repeatable=False,
            ),
            Benchmark(
                "load-ramp",
                "Load up to twice the capacity and back: quality tiers on against off.",
                "load_ramp:run",
                repeats=1,
            ),
            Benchmark(
                "cache-policies",
                "Cost saved by eviction on Zipf, session and scan traces, next to the optimum.",
                "cache_policies:run",
                repeats=1,
            ),
            Benchmark(
                "encoder-cache",
                "Many videos asked about again: encoder work and first token, device and host.",
                "encoder_cache_bench:run",
                repeats=1,
            ),
            Benchmark(
                "conversations",
                "12 conversations about their own videos with KV for half: what is found again.",
                "conversations:run",
                repeats=1,
                repeatable=False,
            ),
            Benchmark(
                "kv-replay",
                "KV accesses of an engine through both block pools, next to the optimum.",
                "kv_replay:run",
                repeats=1,
            ),
            Benchmark(
                "kv-pool",
                "Time per KV block allocated, cached and freed, in pools of 10^3 to 10^6 blocks.",
                "kv_pool:run",
            ),
            Benchmark(
                "mixed-traffic",
                "Text beside a new video every 2 s: ITL, TTFT and videos per minute; full slots.",
                "mixed_traffic:run",
                repeats=1,
            ),
            Benchmark(
                "scheduler",
                "Traffic on a simulated clock through both schedulers; what each rule gains.",
                "scheduler_bench:run",
                repeats=1,
            ),
            Benchmark(
                "scheduler-step",
                "CPU time of a scheduling step with 100 to 10,000 requests waiting.",
                "scheduler_step:run",
            ),
            Benchmark(
                "plan-estimates",
                "First tokens and throughput of random workloads: estimated, and measured.",
                "plan_estimates:run",
                repeats=1,
            ),
            Benchmark(
                "accuracy",
                "Right answers about known clips: by sampling, frames and token reduction.",
                "accuracy:run",
                repeats=1,
            ),
            Benchmark(
                "long-video",
                "Minutes to hours of video by windows: answers, tokens, time, memory, second look.",
                "long_video_bench:run",
                repeats=1,
            ),
            Benchmark(
                "live",
                "Live sessions: first token, cost of a unit, many at once, dropped ones, answers.",
                "live_bench:run",
                repeats=1,
            ),
            Benchmark(
                "fleet",
                "Replicas behind a router: by media key or in turn, a hot video, encoders apart.",
                "fleet_bench:run",
                repeats=1,
            ),
            Benchmark(
                "sight",
                "Text and videos at once with the plugin's metrics off and on: what these cost.",
                "sight_bench:run",
            ),
            Benchmark(
                "decoders",
                "Decode time per backend over codecs and GOPs, next to stock's decoder.",
                "decoders:run",
            ),
            Benchmark(
                "window-decode",
                "10 min to 2 h in windows: CPU against one sequential decode, memory of workers.",
                "window_decode:run",
                repeats=1,
                repeatable=False,
            ),
            Benchmark(
                "plan-memory",
                "Written plans served: memory, tokens and concurrency, planned and measured.",
                "plan_memory:run",
                repeats=1,
            ),
        )
    }
)
