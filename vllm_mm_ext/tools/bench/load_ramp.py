"""Load that rises to twice the capacity and falls again, with quality tiers on and off."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import openai

from vllm_mm_ext.testing.checkpoints import build
from vllm_mm_ext.testing.server import Server, serve
from vllm_mm_ext.tools.bench.bench_clips import other_pictures
from vllm_mm_ext.tools.bench.chat import Answer, ask, conversation
from vllm_mm_ext.tools.bench.harness import BenchContext, BenchResult, Row, percentile

# Arrivals as a share of what the server manages with tiers off, and for how many seconds.
PHASES = ((0.5, 6.0), (1.0, 6.0), (2.0, 60.0), (1.0, 6.0), (0.5, 10.0))
SEQUENCES = 8
# Conversations that tell the capacity, and how often; the best time is the least disturbed.
_PROBES = 12
_PROBE_ROUNDS = 3
_SIDES = ("stock", "tiers off", "tiers on")


@dataclass
class _Side:
    """What one server did.

    Attributes:
        first, second: Answers to the first and second turn of conversations.
        refused: Requests that got an error.
        asked: Requests sent.
        moved: Conversations whose second turn was served at another tier.
        levels: Tier of each first turn.
    """

    first: list[Answer] = field(default_factory=list)
    second: list[Answer] = field(default_factory=list)
    refused: int = 0
    asked: int = 0
    moved: int = 0
    levels: list[int] = field(default_factory=list)

    def p95_s(self) -> float:
        """95th percentile of the time to first token of first turns."""
        return percentile([answer.ttft_s for answer in self.first], 95)

    def cached_share(self) -> float:
        """Share of the prompts of second turns that came from the prefix cache."""
        return sum(a.cached_tokens for a in self.second) / sum(a.prompt_tokens for a in self.second)


def run(context: BenchContext) -> BenchResult:
    """One server after the other, the same arrivals; every conversation has a video of its own."""
    # Wide and deep enough that the engine is what is short, not the decode workers.
    model = build(
        "qwen2_5_vl",
        context.work_dir / "qwen2_5_vl-busy",
        video_max_pixels=448 * 448,
        hidden_size=256,
        layers=4,
    )

    def clip(number: int) -> Path:
        return other_pictures(context.work_dir, number, width=448, height=448, duration=8.0)

    sides: dict[str, list[_Side]] = {name: [] for name in _SIDES}
    capacity = 0.0
    with context.steps("load-ramp", 1 + len(_SIDES) * context.repeats) as begin:
        begin("capacity, tiers off")
        with _server(model, context.work_dir, "tiers off") as server:
            capacity = _capacity(server, clip)
        for repeat in range(context.repeats):
            for name in _SIDES:
                begin(f"{name}, repeat {repeat + 1}")
                with _server(model, context.work_dir, name) as server:
                    sides[name].append(_ramp(server, clip, capacity))
    return BenchResult("load-ramp", _rows(sides), _notes(sides, capacity))


def _server(model: Path, media: Path, side: str) -> Any:
    config = {"mm_ext": {"quality": {"enabled": side == "tiers on"}}}
    return serve(
        model,
        plugin=side != "stock",
        args=[
            *("--allowed-local-media-path", str(media)),
            *("--max-model-len", "8192", "--max-num-seqs", str(SEQUENCES)),
            *("--max-num-batched-tokens", "4096", "--block-size", "32"),
            *("--limit-mm-per-prompt", '{"video": 1, "image": 0}'),
            *("--media-io-kwargs", '{"video": {"fps": 1, "max_frames": 32}}'),
            "--enable-prompt-tokens-details",
        ],
        additional_config=config if side != "stock" else None,
    )


def _capacity(server: Server, clip: Callable[[int], Path]) -> float:
    """Conversations a second that the server manages when it is never short of requests."""
    files = [clip(number) for number in range(_PROBES * _PROBE_ROUNDS + 1)]
    side, lock = _Side(), threading.Lock()
    # The first video request of a server pays for lazy imports and worker starts.
    _converse(server, files.pop(), side, lock)
    best = 0.0
    with ThreadPoolExecutor(SEQUENCES) as pool:
        for first in range(0, len(files), _PROBES):
            started = time.perf_counter()
            part = files[first : first + _PROBES]
            list(pool.map(lambda file: _converse(server, file, side, lock), part))
            best = max(best, _PROBES / (time.perf_counter() - started))
    return best


def _ramp(server: Server, clip: Callable[[int], Path], capacity: float) -> _Side:
    arrivals = timetable(capacity)
    files = [clip(number) for number in range(len(arrivals) + 1)]
    side, lock = _Side(), threading.Lock()
    _converse(server, files[0], _Side(), lock)
    started = time.perf_counter()

    def one(number: int) -> None:
        time.sleep(max(0.0, started + arrivals[number] - time.perf_counter()))
        _converse(server, files[number + 1], side, lock)

    # A thread each, so that nobody waits for an earlier answer before asking.
    with ThreadPoolExecutor(len(arrivals)) as pool:
        list(pool.map(one, range(len(arrivals))))
    return side


def timetable(capacity: float) -> list[float]:
    """Seconds at which conversations begin, evenly within each phase."""
    times = []
    begin = 0.0
    for share, seconds in PHASES:
        count = max(1, round(share * capacity * seconds))
        times += [begin + seconds * (i + 0.5) / count for i in range(count)]
        begin += seconds
    return times


def _converse(server: Server, file: Path, side: _Side, lock: threading.Lock) -> None:
    """Two turns about one video."""
    answers: list[Answer] = []
    for turn in (1, 2):
        try:
            answers.append(ask(server, conversation(file.as_uri(), turn)))
        except openai.APIError:
            break
    with lock:
        side.asked += len(answers) + (len(answers) < 2)
        side.refused += len(answers) < 2
        side.first += answers[:1]
        side.second += answers[1:]
        levels = [answer.report["videos"][0]["level"] for answer in answers if answer.report]
        side.levels += levels[:1]
        side.moved += len(set(levels)) > 1


def _rows(sides: dict[str, list[_Side]]) -> list[Row]:
    off, on = sides["tiers off"], sides["tiers on"]
    rows = []
    for name, plugin in (("tiers on", on), ("tiers off", off)):

        def row(what: str, unit: str, value: Any, name: str = name, plugin: Any = plugin) -> Row:
            return Row.of(
                f"{name}: {what}",
                unit,
                stock=[value(side) for side in sides["stock"]],
                plugin=[value(side) for side in plugin],
            )

        rows += [
            row("p95 TTFT of first turns", "ms", lambda side: 1e3 * side.p95_s()),
            row("requests refused", "%", lambda side: 100 * side.refused / side.asked),
            row("follow-up prompts from cache", "%", lambda side: 100 * side.cached_share()),
        ]
    ratios = [a.p95_s() / b.p95_s() for a, b in zip(on, off, strict=True)]
    rows.append(Row.of("p95 TTFT, tiers on / tiers off", "ratio", plugin=ratios))
    moved = [float(side.moved) for side in on]
    rows.append(Row.of("conversations that changed tier", "count", plugin=moved))
    return rows


def _notes(sides: dict[str, list[_Side]], capacity: float) -> list[str]:
    levels = [level for side in sides["tiers on"] for level in side.levels]
    shares = ", ".join(f"{share:g}x for {seconds:g} s" for share, seconds in PHASES)
    return [
        f"capacity with tiers off: {capacity:.2f} conversations of two turns a second; arrivals "
        f"{shares}; --max-num-seqs {SEQUENCES}",
        f"first turns per tier: {_counts(levels)}",
    ]


def _counts(levels: Sequence[int]) -> str:
    return ", ".join(f"{level}: {levels.count(level)}" for level in sorted(set(levels)))
