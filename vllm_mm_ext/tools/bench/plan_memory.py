"""Servers started by written plans: memory, tokens and concurrency, planned and measured.

Each plan is written to a file, served from it, and asked for one request more than it is for at a
time: twice with media of their own, and once more with the media of the second time, which the API
server then has, so that they reach the engine together. The numbers of requests that run and wait,
and preemptions, are vLLM's own metrics; memory is the highest resident size of the processes.
"""

from __future__ import annotations

import json
import random
import re
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil  # type: ignore[import-untyped]

from vllm_mm_ext.planner.workload import Image, Video, Workload
from vllm_mm_ext.testing.checkpoints import FAMILIES, checkpoint
from vllm_mm_ext.testing.server import Server, serve
from vllm_mm_ext.tools.bench.harness import BenchContext, BenchResult, Row
from vllm_mm_ext.tools.bench.plan_engine import messages

_MIB = 1 << 20
_POLL_S = 0.05
_QUESTION = "What happens here?"
# Tokens of an answer: so long that all requests of a workload come while the first are answered.
_OUTPUT = 1024
_FAMILIES = ("qwen2_5_vl", "qwen3_vl", "qwen2_5_omni", "qwen3_omni", "llava_onevision", "composer")
_NUMBER = re.compile(
    r"^vllm:(num_requests_running|num_requests_waiting|num_preemptions_total)\{.*\} (\S+)$", re.M
)


@dataclass
class Watched:
    """What was seen of a server while it answered.

    Attributes:
        running, waiting: Most requests that ran, and that waited, at a time.
        preempted: Preemptions.
        api, engine: Highest resident bytes of the API server, and of the engine's processes.
        prompts: Prompt tokens of each answer.
    """

    running: int = 0
    waiting: int = 0
    preempted: int = 0
    api: int = 0
    engine: int = 0
    prompts: list[int] = field(default_factory=list)


def workload_of(seed: int) -> tuple[str, Workload]:
    """A family and a random workload for it."""
    rng = random.Random(seed)
    family = _FAMILIES[seed % len(_FAMILIES)]
    able = FAMILIES[family].modalities
    fps = rng.choice([1.0, 2.0])
    seconds = rng.choice([3.0, 8.0, 20.0])
    width, height = rng.choice([(320, 240), (640, 360), (854, 480)])
    videos = tuple(
        Video(seconds, fps, width, height, source_fps=10.0, sound=rng.random() < 0.6, mbit=0.5)
        for _ in range(rng.choice([1, 1, 2]))
    )
    return family, Workload(
        videos=videos,
        audios=(rng.choice([3.0, 20.0]),) if "audio" in able and rng.random() < 0.4 else (),
        images=(Image(640, 480),) if "image" in able and rng.random() < 0.4 else (),
        output=_OUTPUT,
        concurrency=rng.choice([2, 4, 8]),
    )


def run(context: BenchContext, *, seed: int, count: int) -> BenchResult:
    """Serve plans of random workloads.

    Args:
        context: Where the bench runs.
        seed: Of the first workload; each has the next one.
        count: How many.
    """
    rows: list[Row] = []
    notes: list[str] = []
    with context.steps("plan-memory", count) as begin:
        for each in range(seed, seed + count):
            family, workload = workload_of(each)
            begin(f"{each} {family}")
            found, note = _measured(f"{each} {family}", family, workload, each)
            rows += found
            notes.append(note)
    return BenchResult("memory planned (stock column) and measured (plugin column)", rows, notes)


def _measured(name: str, family: str, workload: Workload, seed: int) -> tuple[list[Row], str]:
    """The rows of a plan, and whether its requests went as planned."""
    with tempfile.TemporaryDirectory(prefix="plan-") as folder:
        planned = _planned(family, seed, Path(folder))
        if not planned["fits"]:
            return [], f"{name}: {planned['problems']}"
        seen = _serve(family, workload, seed, Path(folder))
    count = workload.concurrency
    name = f"{name}, {count} at a time"
    as_planned = (
        max(seen.prompts) <= planned["most"]
        and seen.running == count
        and seen.waiting >= 1
        and not seen.preempted
    )
    verdict = "as planned" if as_planned else "NOT AS PLANNED"
    rows = [
        _row(f"{name}: API server", planned["api"], seen.api),
        _row(f"{name}: engine", planned["engine"], seen.engine),
    ]
    return rows, (
        f"{name}: {verdict}: prompts of {planned['prompt']} to {planned['most']} planned, "
        f"{sorted(set(seen.prompts))} served; {seen.running} of {count} ran, {seen.waiting} "
        f"waited, {seen.preempted} preempted"
    )


def _row(name: str, planned: int, measured: int) -> Row:
    return Row.of(name, "MiB", stock=[planned / _MIB], plugin=[measured / _MIB])


def _planned(family: str, seed: int, folder: Path) -> dict[str, Any]:
    """The plan, made in a process of its own as the command is."""
    done = subprocess.run(
        [sys.executable, "-m", "vllm_mm_ext.tools.bench.plan_memory", family, str(seed), folder],
        capture_output=True,
        text=True,
        timeout=300,
    )
    if done.returncode:
        raise RuntimeError(f"no plan for {family}: {done.stderr[-2000:]}")
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def _write(family: str, seed: int, folder: Path) -> None:
    """Write ``plan.yaml`` and print what was planned."""
    from dataclasses import replace

    from vllm_mm_ext.adapters.planning.planner import Planner, Wishes
    from vllm_mm_ext.planner.gpu_facts import Site, gpu_of
    from vllm_mm_ext.planner.memory_parts import total
    from vllm_mm_ext.planner.plan_yaml import plan_yaml
    from vllm_mm_ext.plugin import register

    register()
    planner = Planner(str(checkpoint(family)))
    _, workload = workload_of(seed)
    text = planner.loaded.tokenizer.encode(_QUESTION, add_special_tokens=False)
    workload = replace(workload, text=len(text))
    memory = psutil.virtual_memory().total
    cores = psutil.cpu_count() or 1
    site = Site(gpu_of("cpu", memory), 1, 1, memory, cores, planner.process_bytes)
    plan = planner.plan(workload, site, Wishes())
    kwargs = planner.mm_processor_kwargs
    (folder / "plan.yaml").write_text(
        plan_yaml(plan, command="bench", file_name="plan.yaml", mm_processor_kwargs=kwargs)
    )
    print(
        json.dumps(
            {
                "fits": plan.fits,
                "problems": plan.problems(),
                "prompt": plan.request.prompt,
                "most": plan.request.most_prompt,
                "api": total(plan.front.memory),
                "engine": total(plan.engine) + plan.kv_bytes,
            }
        )
    )


def _serve(family: str, workload: Workload, seed: int, folder: Path) -> Watched:
    count = 2 * (workload.concurrency + 1)
    asked = [messages(workload, folder, _QUESTION, 100 * seed + n) for n in range(count)]
    arguments = ["--config", str(folder / "plan.yaml"), "--allowed-local-media-path", str(folder)]
    with serve(checkpoint(family), plugin=True, args=arguments, kv_cache_bytes=None) as server:
        watched = Watched()
        with _watching(server, watched), ThreadPoolExecutor(workload.concurrency + 1) as pool:
            # As clients do by default: items may get lost between vLLM's two processor caches.
            client = server.client(timeout=300.0, max_retries=2)

            def ask(conversation: Any) -> int:
                answer = client.chat.completions.create(
                    model=server.model,
                    messages=conversation,
                    max_tokens=workload.output,
                    temperature=0,
                    extra_body={"ignore_eos": True},
                )
                assert answer.usage is not None
                return int(answer.usage.prompt_tokens)

            watched.prompts = list(pool.map(ask, asked))
            watched.prompts += pool.map(ask, asked[count // 2 :])
        _note(server, watched)
        for process in _processes(server):
            peak = _peak(process.pid)
            if process.pid == server.pid:
                watched.api = peak
            elif "VLLM::" in " ".join(process.cmdline()):
                watched.engine += peak
    return watched


@contextmanager
def _watching(server: Server, watched: Watched) -> Iterator[None]:
    stop = threading.Event()

    def watch() -> None:
        while not stop.wait(_POLL_S):
            _note(server, watched)

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()


def _note(server: Server, watched: Watched) -> None:
    found = {name: float(value) for name, value in _NUMBER.findall(server.get("/metrics"))}
    watched.running = max(watched.running, int(found.get("num_requests_running", 0)))
    watched.waiting = max(watched.waiting, int(found.get("num_requests_waiting", 0)))
    watched.preempted = int(found.get("num_preemptions_total", 0))


def _processes(server: Server) -> list[Any]:
    root = psutil.Process(server.pid)
    return [root, *root.children(recursive=True)]


def _peak(pid: int) -> int:
    """Highest resident bytes that a process has had."""
    status = Path(f"/proc/{pid}/status").read_text()
    found = re.search(r"VmHWM:\s+(\d+) kB", status)
    assert found is not None
    return int(found[1]) << 10


if __name__ == "__main__":
    _write(sys.argv[1], int(sys.argv[2]), Path(sys.argv[3]))
