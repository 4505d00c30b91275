"""What metrics and the open page cost: text and videos at once, off and on in the same run."""

from __future__ import annotations

import itertools
import threading
import time
import urllib.error
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil  # type: ignore[import-untyped]

from vllm_mm_ext.testing.checkpoints import checkpoint
from vllm_mm_ext.testing.media import make_clip
from vllm_mm_ext.testing.server import Server, serve
from vllm_mm_ext.tools.bench.chat import ask, conversation
from vllm_mm_ext.tools.bench.harness import BenchContext, BenchResult, Row, percentile

# Of one block: the sides take turns, so that a change of the machine's speed meets both.
TEXT_CLIENTS = 6
TEXTS = 36
ANSWER = 48
VIDEO_CLIENTS = 2
VIDEOS = 12
CLIPS = 4
BLOCKS = 4
SCRAPE_EVERY_S = 1.0
# An open page asks every other second.
PAGE_EVERY = 2


@dataclass
class _Block:
    itl_s: list[float] = field(default_factory=list)
    requests_per_s: float = 0.0
    cpu_s: float = 0.0


def run(context: BenchContext) -> BenchResult:
    """Both servers stand side by side; one has work at a time, and both are scraped."""
    found: dict[str, list[_Block]] = {"stock": [], "plugin": []}
    numbers = itertools.count()
    with context.scratch() as media, ExitStack() as stack:
        clips = [media / f"{number}.mp4" for number in range(CLIPS)]
        for number, clip in enumerate(clips):
            make_clip(clip, duration=4.0, seed=number)
        servers = {
            side: stack.enter_context(_server(media, metrics=side == "plugin")) for side in found
        }
        steps = 2 * (1 + BLOCKS * context.repeats)
        with context.steps("sight", steps) as begin:
            for block in range(-1, BLOCKS * context.repeats):
                for side in list(found)[:: -1 if block % 2 else 1]:
                    name = "metrics on" if side == "plugin" else "metrics off"
                    begin(f"{name}, {'warm-up' if block < 0 else f'block {block + 1}'}")
                    measured = _block(servers[side], clips, numbers)
                    if block >= 0:
                        found[side].append(measured)
    return BenchResult("sight", _rows(found), _notes())


def _server(media: Path, *, metrics: bool) -> Any:
    return serve(
        checkpoint("qwen2_5_vl"),
        plugin=True,
        args=(
            *("--allowed-local-media-path", str(media), "--max-model-len", "4096"),
            *("--scheduler-cls", "vllm_mm_ext.scheduler.MMExtScheduler"),
        ),
        additional_config={"mm_ext": {"sight": {"metrics": metrics, "page": metrics}}},
    )


def _block(server: Server, clips: list[Path], numbers: Iterator[int]) -> _Block:
    found = _Block()

    def text(number: int) -> None:
        # A prompt of its own, so that the prefix cache has none of it.
        found.itl_s += _gaps(server, f"{number} is a number. Write about it.")

    def video(number: int) -> None:
        # Now and then a clip that the caches have.
        ask(server, conversation(clips[number % len(clips)].as_uri(), 1 + number % 3))

    with _scraped(server):
        before, started = _cpu_s(server), time.perf_counter()
        with ThreadPoolExecutor(TEXT_CLIENTS) as texts, ThreadPoolExecutor(VIDEO_CLIENTS) as videos:
            jobs = [texts.submit(text, next(numbers)) for _ in range(TEXTS)]
            jobs += [videos.submit(video, next(numbers)) for _ in range(VIDEOS)]
            for job in jobs:
                job.result()
        found.requests_per_s = len(jobs) / (time.perf_counter() - started)
        found.cpu_s = _cpu_s(server) - before
    return found


def _gaps(server: Server, question: str) -> list[float]:
    """Seconds between the chunks of a streamed answer."""
    times = []
    with server.client(timeout=600.0) as client:
        for chunk in client.chat.completions.create(
            model=server.model,
            messages=[{"role": "user", "content": question}],
            max_tokens=ANSWER,
            temperature=0.0,
            stream=True,
            extra_body={"ignore_eos": True},
        ):
            if chunk.choices:
                times.append(time.perf_counter())
    return [after - before for before, after in itertools.pairwise(times)]


@contextmanager
def _scraped(server: Server) -> Iterator[None]:
    """Read ``/metrics`` again and again, as Prometheus does, if more often, and what the page does.

    Without the page the second is a 404.
    """
    stop = threading.Event()

    def scrape() -> None:
        for number in itertools.count():
            if stop.wait(SCRAPE_EVERY_S):
                return
            server.get("/metrics")
            if number % PAGE_EVERY:
                with suppress(urllib.error.HTTPError):
                    server.get("/mm_ext/sight")

    thread = threading.Thread(target=scrape, daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()


def _cpu_s(server: Server) -> float:
    """CPU seconds so far of the server's processes, and of those that have ended."""
    root, total = psutil.Process(server.pid), 0.0
    for process in (root, *root.children(recursive=True)):
        with suppress(psutil.NoSuchProcess):
            times = process.cpu_times()
            total += times.user + times.system + times.children_user + times.children_system
    return total


def _rows(found: dict[str, list[_Block]]) -> list[Row]:
    def row(name: str, unit: str, value: Any) -> Row:
        return Row.of(name, unit, **{side: [value(b) for b in of] for side, of in found.items()})

    each = TEXTS + VIDEOS
    return [
        row("text ITL p99, beside videos", "ms", lambda one: 1e3 * percentile(one.itl_s, 99)),
        row("requests per second", "1/s", lambda one: one.requests_per_s),
        row("CPU time of all processes, per request", "ms", lambda one: 1e3 * one.cpu_s / each),
    ]


def _notes() -> list[str]:
    return [
        "stock: the plugin with mm_ext.sight.metrics and page off; plugin: both on, and "
        "the page open",
        f"a block: {TEXTS} texts by {TEXT_CLIENTS} clients, {ANSWER} tokens each, beside {VIDEOS} "
        f"questions about {CLIPS} clips by {VIDEO_CLIENTS} clients; {BLOCKS} blocks a repeat, in "
        f"turns; /metrics read every {SCRAPE_EVERY_S:g} s on both sides",
    ]
