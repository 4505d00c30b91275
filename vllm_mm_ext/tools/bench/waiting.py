"""``waiting``: many requests with large videos at once, from a slow origin: memory and answers."""

from __future__ import annotations

import asyncio
import struct
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import aiohttp

from vllm_mm_ext.testing.checkpoints import checkpoint
from vllm_mm_ext.testing.server import MODEL_NAME, Server, serve
from vllm_mm_ext.testing.usage import usage
from vllm_mm_ext.tools.bench.bench_clips import cached_clip
from vllm_mm_ext.tools.bench.chat import conversation
from vllm_mm_ext.tools.bench.followup import server_args
from vllm_mm_ext.tools.bench.harness import BenchContext, BenchResult, Row

MIB = 1 << 20
CACHES = {"encoded_mb": 64, "decoded_mb": 128}
# What the API server may take beyond its budgets.
ALLOWANCE_MB = 300
_CHUNK = bytes(256 << 10)
_SAMPLE_S = 0.2
_TIMEOUT_S = 900.0


@dataclass
class Outcome:
    """What one server did.

    Attributes:
        growth: Highest memory of the API server less that before, memory files included, in bytes.
        seconds: From the first request until each has an answer, a refusal, or is lost.
        statuses: Answers by status; ``lost`` for requests without one.
        hasty: Answers with 503 and no Retry-After.
    """

    growth: int = 0
    seconds: float = 0.0
    statuses: Counter[str] = field(default_factory=Counter)
    hasty: int = 0


def run(
    context: BenchContext,
    *,
    requests: int = 200,
    mb: int = 50,
    budget_mb: int = 1024,
    stock: bool = True,
) -> BenchResult:
    """Send all requests at once, each with a video of its own.

    Args:
        context: What to run with.
        requests: How many.
        mb: MiB of a video's file.
        budget_mb: The plugin's media budget in MiB.
        stock: Give stock vLLM the same requests first.
    """
    clip = cached_clip(context.work_dir, width=640, height=360, duration=10.0, gop=60)
    cache = {**CACHES, "in_flight_mb": budget_mb}
    outcomes: dict[str, list[Outcome]] = {"stock": [], "plugin": []}
    sides = ("stock", "plugin") if stock else ("plugin",)
    with (
        _origin(clip.read_bytes(), mb * MIB) as url,
        context.scratch() as media,
        context.steps("waiting", len(sides) * context.repeats) as begin,
    ):
        for repeat in range(context.repeats):
            for side in sides:
                begin(f"{side}, repeat {repeat + 1}")
                with serve(
                    checkpoint("qwen2_5_omni"),
                    plugin=side == "plugin",
                    args=server_args(media),
                    additional_config=(
                        {"mm_ext": {"media": {"cache": cache}}} if side == "plugin" else None
                    ),
                    # Only the server's own patience is looked at.
                    env={"VLLM_VIDEO_FETCH_TIMEOUT": str(int(_TIMEOUT_S))},
                ) as server:
                    outcomes[side].append(_measure(server, url, requests))
    return _summary(outcomes, requests, mb, cache)


def _measure(server: Server, url: str, requests: int) -> Outcome:
    # The first request of a server pays for lazy imports and worker starts.
    asyncio.run(_send(server, [f"{url}/warm-up"], Outcome()))
    outcome = Outcome()
    with _watched(server.pid, outcome):
        started = time.perf_counter()
        asyncio.run(_send(server, [f"{url}/{number}" for number in range(requests)], outcome))
        outcome.seconds = time.perf_counter() - started
    return outcome


async def _send(server: Server, urls: list[str], outcome: Outcome) -> None:
    async with aiohttp.ClientSession(
        timeout=aiohttp.ClientTimeout(total=_TIMEOUT_S), connector=aiohttp.TCPConnector(limit=0)
    ) as session:

        async def one(video: str) -> None:
            body = {"model": MODEL_NAME, "messages": conversation(video, 1), "max_tokens": 1}
            try:
                async with session.post(f"{server.url}/v1/chat/completions", json=body) as answer:
                    await answer.read()
            except (TimeoutError, aiohttp.ClientError):
                outcome.statuses["lost"] += 1
                return
            outcome.statuses[str(answer.status)] += 1
            outcome.hasty += answer.status == 503 and "Retry-After" not in answer.headers

        await asyncio.gather(*map(one, urls))


@contextmanager
def _watched(pid: int, outcome: Outcome) -> Iterator[None]:
    """Record the highest memory of the API server while the block runs."""
    before = usage(pid)["api"].memory
    ended = threading.Event()

    def watch() -> None:
        while not ended.wait(_SAMPLE_S):
            if (now := usage(pid).get("api")) is not None:
                outcome.growth = max(outcome.growth, now.memory - before)

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


@contextmanager
def _origin(clip: bytes, size: int) -> Iterator[str]:
    """A server of ``size`` bytes at each path: the clip, and a ``free`` box with the path in it.

    The files are made while they are sent, so that the origin takes no memory, and in Python, so
    that all of them together come no faster than a few hundred MiB a second.
    """

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            name = self.path.encode()
            head = clip + struct.pack(">I4s", size - len(clip), b"free") + name
            self.send_response(200)
            self.send_header("Content-Length", str(size))
            self.send_header("Cache-Control", "no-store")
            self.end_headers()
            self.wfile.write(head)
            left = size - len(head)
            while left:
                left -= self.wfile.write(_CHUNK[:left])

        def log_message(self, format: str, *args: object) -> None:
            """Quiet."""

    class Origin(ThreadingHTTPServer):
        daemon_threads = True
        block_on_close = False
        request_queue_size = 1024

        def handle_error(self, request: object, client_address: object) -> None:
            """Clients close connections while they wait for room."""

    with Origin(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{server.server_address[1]}"
        server.shutdown()
        thread.join()


def _summary(
    outcomes: dict[str, list[Outcome]], requests: int, mb: int, cache: dict[str, int]
) -> BenchResult:
    total = sum(cache.values())

    def row(name: str, unit: str, values: dict[str, list[float]]) -> Row:
        return Row.of(name, unit, stock=values["stock"], plugin=values["plugin"])

    rows = [
        row(
            "API-server memory growth at most",
            "MiB",
            {side: [o.growth / MIB for o in made] for side, made in outcomes.items()},
        ),
        row(
            "until the last answer, refusal or loss",
            "s",
            {side: [o.seconds for o in made] for side, made in outcomes.items()},
            # Who refuses at once is done soon.
        ).without_ratio(),
    ]
    seen = {status for made in outcomes.values() for o in made for status in o.statuses}
    rows += [
        row(
            "requests lost" if status == "lost" else f"answered {status}",
            "count",
            {side: [float(o.statuses[status]) for o in made] for side, made in outcomes.items()},
        )
        for status in sorted(seen | {"200", "503", "lost"})
    ]
    rows.append(
        row(
            "503 without Retry-After",
            "count",
            {side: [float(o.hasty) for o in made] for side, made in outcomes.items()},
        )
    )
    notes = [
        f"{requests} requests at once, each with a {mb} MiB video of its own from a local origin",
        f"plugin budgets in MiB: {cache}; together {total}, so at most {total + ALLOWANCE_MB} MiB "
        "of growth is expected",
        "all files show the same pictures, which an engine encodes once: what is looked at is the "
        "front-end",
        "memory: proportional set size and bytes in memory files",
    ]
    return BenchResult("waiting", rows, notes)
