"""``media-robustness``: damaged files, impostors and bombs through a real server.

Every file must get an answer that is either a 4xx or, where enough of it is still decodable, an
ordinary completion; text requests running all the while must be answered as if nothing happened.
"""

from __future__ import annotations

import asyncio
import statistics
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

import aiohttp

from vllm_mm_ext.testing.checkpoints import checkpoint
from vllm_mm_ext.testing.corrupt import BadFile, bad_files
from vllm_mm_ext.testing.server import MODEL_NAME, Server, serve
from vllm_mm_ext.tools.bench.harness import BenchContext, BenchResult, Row

FILES = 2000
CONCURRENCY = 8
# A job may take the configured decode limit; an answer later than twice that is a hang.
DECODE_TIMEOUT_S = 10
HANG_S = 2 * DECODE_TIMEOUT_S
TEXT_EVERY_S = 0.5
CONFIG = {"mm_ext": {"media": {"decode": {"timeout_s": DECODE_TIMEOUT_S}}}}


@dataclass
class Outcome:
    """What one server did with the whole set."""

    statuses: Counter[str] = field(default_factory=Counter)
    seconds: list[float] = field(default_factory=list)
    unclear: list[str] = field(default_factory=list)
    server_errors: list[str] = field(default_factory=list)
    text_seconds: list[float] = field(default_factory=list)
    text_failures: int = 0
    alive: bool = True


def run(context: BenchContext) -> BenchResult:
    """Send the same damaged files to stock vLLM and to the plugin."""
    folder = context.work_dir / "bad-media"
    context.console.print(f"writing {FILES} damaged files")
    files = list(bad_files(folder, FILES))
    model = checkpoint("qwen2_5_omni")
    outcomes: dict[bool, Outcome] = {}
    with context.steps("files", 2 * len(files)) as step:
        for plugin in (False, True):
            args = ["--allowed-local-media-path", str(folder), "--max-model-len", "8192"]
            config = CONFIG if plugin else None
            with serve(model, plugin=plugin, args=args, additional_config=config) as server:
                outcomes[plugin] = asyncio.run(attack(server, files, step))
    return summarise(files, outcomes[False], outcomes[True])


async def attack(server: Server, files: list[BadFile], step: Callable[[str], None]) -> Outcome:
    """Send every file, a few at a time, with text requests alongside.

    Args:
        server: Where to.
        files: What.
        step: Called once per file, for progress.
    """
    outcome = Outcome()
    slots = asyncio.Semaphore(CONCURRENCY)
    timeout = aiohttp.ClientTimeout(total=HANG_S)
    url = f"{server.url}/v1/chat/completions"
    async with aiohttp.ClientSession(timeout=timeout) as session:

        async def send(bad: BadFile) -> None:
            async with slots:
                step(bad.kind)
                started = time.perf_counter()
                try:
                    async with session.post(url, json=media_request(bad)) as response:
                        body = await response.text()
                        status = response.status
                except TimeoutError:
                    outcome.statuses["no answer"] += 1
                    outcome.server_errors.append(f"{bad.path.name}: no answer in {HANG_S} s")
                    return
                except aiohttp.ClientError as error:
                    outcome.statuses["broken"] += 1
                    outcome.server_errors.append(f"{bad.path.name}: {error!r}")
                    return
                outcome.seconds.append(time.perf_counter() - started)
                outcome.statuses[f"{status // 100}xx"] += 1
                if status >= 500:
                    outcome.server_errors.append(f"{bad.path.name}: {body[:200]}")
                elif status >= 400 and '"message"' not in body:
                    outcome.unclear.append(bad.path.name)

        async def chat_until(done: asyncio.Event) -> None:
            while not done.is_set():
                started = time.perf_counter()
                try:
                    async with session.post(url, json=text_request()) as response:
                        outcome.text_failures += response.status != 200
                        await response.read()
                    outcome.text_seconds.append(time.perf_counter() - started)
                except (TimeoutError, aiohttp.ClientError):
                    outcome.text_failures += 1
                await asyncio.sleep(TEXT_EVERY_S)

        done = asyncio.Event()
        texts = asyncio.create_task(chat_until(done))
        await asyncio.gather(*(send(bad) for bad in files))
        done.set()
        await texts
    outcome.alive = server.alive()
    return outcome


def media_request(bad: BadFile) -> dict[str, object]:
    """A one-token question about a file."""
    kind = f"{bad.modality}_url"
    content = [
        {"type": kind, kind: {"url": bad.path.as_uri()}},
        {"type": "text", "text": "What is this?"},
    ]
    return _request(content)


def text_request() -> dict[str, object]:
    """A one-token question without media."""
    return _request("Hello")


def _request(content: object) -> dict[str, object]:
    return {
        "model": MODEL_NAME,
        "messages": [{"role": "user", "content": content}],
        "max_tokens": 1,
        "temperature": 0,
    }


def summarise(files: list[BadFile], stock: Outcome, plugin: Outcome) -> BenchResult:
    """Rows and notes from both outcomes."""

    def row(name: str, unit: str, measure: Callable[[Outcome], float]) -> Row:
        return Row.of(name, unit, stock=[measure(stock)], plugin=[measure(plugin)])

    rows = [
        row("refused with a 4xx", "files", lambda o: o.statuses["4xx"]),
        row("still decodable, answered", "files", lambda o: o.statuses["2xx"]),
        row("server errors (5xx)", "files", lambda o: o.statuses["5xx"]),
        row(f"no answer in {HANG_S} s", "files", lambda o: o.statuses["no answer"]),
        row("connection broken", "files", lambda o: o.statuses["broken"]),
        row("4xx without a message", "files", lambda o: len(o.unclear)),
        row("slowest answer", "s", lambda o: max(o.seconds, default=0.0)),
        row("median answer", "ms", lambda o: statistics.median(o.seconds) * 1e3),
        row("text requests alongside", "requests", lambda o: len(o.text_seconds)),
        row("text requests failed", "requests", lambda o: o.text_failures),
        row("text answer, slowest", "s", lambda o: max(o.text_seconds, default=0.0)),
        row("server alive at the end", "yes/no", lambda o: float(o.alive)),
    ]
    kinds = Counter(bad.kind for bad in files)
    notes = [
        f"{len(files)} files: " + ", ".join(f"{n} {kind}" for kind, n in sorted(kinds.items())),
        f"{CONCURRENCY} at a time; decode limit of the plugin {DECODE_TIMEOUT_S} s",
    ]
    for name, outcome in (("stock", stock), ("plugin", plugin)):
        notes += [f"{name}: {error}" for error in outcome.server_errors[:5]]
    return BenchResult("media-robustness", rows, notes)
