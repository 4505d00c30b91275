"""Parts of ``bench fleet``: encoding apart from answering, and an encoder that dies.

The sides run one after the other on the same cores, one for each engine process: two that encode
and answer, or one that encodes for one that answers. All processes of a side share these cores.
"""

from __future__ import annotations

import os
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from vllm_mm_ext.testing.apart_servers import apart
from vllm_mm_ext.testing.checkpoints import build
from vllm_mm_ext.testing.engine_arguments import EVERY_PART, as_flags
from vllm_mm_ext.testing.memory import cpu_seconds
from vllm_mm_ext.testing.server import MODEL_NAME, Server, serve, together
from vllm_mm_ext.tools.bench.bench_clips import other_pictures
from vllm_mm_ext.tools.bench.fleet_study import FleetStudy
from vllm_mm_ext.tools.bench.harness import BenchContext, Row, percentile

# The encoder multiplies 0.85 times as much for each token of a video as the text model: about 0.9
# in Qwen2.5-VL-3B, 0.4 in the 7B.
MODEL = "qwen2_5_vl-encode"
MODEL_SIZE = {"layers": 6, "hidden_size": 768, "vision_layers": 24}
VIDEO = {"width": 448, "height": 224, "duration": 6.0}
SETTINGS: dict[str, Any] = {
    # Load tiers would show the sides other videos.
    "quality": {"enabled": False},
    "segments": {"tokens": 128},
    "media": {"sampling": {"fps": 2.0, "max_frames": 12}, "decode": {"workers": 1}},
}
ARGS = (
    *("--max-model-len", "2048", "--max-num-batched-tokens", "2048", "--max-num-seqs", "16"),
    *("--limit-mm-per-prompt", '{"video": 1, "image": 0}', "--dtype", "float32"),
)
# Cores of a side. By default each server would bind its threads to cores of its own choice.
CORES = 2
ENV = {"VLLM_CPU_OMP_THREADS_BIND": "nobind", "OMP_NUM_THREADS": "1"}
# Streams of text at a time, tokens of each answer, seconds of traffic, and seconds between videos.
TEXTS, TEXT_TOKENS, SECONDS, VIDEO_EVERY_S = 2, 48, 40.0, 1.6
VIDEO_TOKENS = 8
REQUESTS, AT_A_TIME, KILLED_AFTER = 20, 4, 8


@dataclass
class Side:
    """What a side did with the traffic.

    Attributes:
        itl_s: Seconds between tokens of text while videos came.
        ttft_s: Seconds to the first token of each video's answer.
        answers: The greedy answer about each clip.
        cpu_s: CPU seconds of all processes.
    """

    itl_s: list[float] = field(default_factory=list)
    ttft_s: list[float] = field(default_factory=list)
    answers: dict[str, str] = field(default_factory=dict)
    cpu_s: float = 0.0


def encode_apart(study: FleetStudy) -> list[Row]:
    """Text between tokens while videos come: encoding apart against collocated."""
    sides: dict[str, list[Side]] = {"collocated": [], "apart": []}
    for repeat in range(study.context.repeats):
        for name, found in list(sides.items())[:: -1 if repeat % 2 else 1]:
            with TemporaryDirectory() as folder:
                media = Path(folder)
                clips = _clips(study.context, media)
                start = _apart if name == "apart" else _collocated
                with start(_model(study.context), media) as (all_servers, engines):
                    found.append(_traffic(all_servers, engines, clips))
    study.notes.append(
        f"encode-apart: {TEXTS} streams of text and a new clip every {VIDEO_EVERY_S} s for "
        f"{SECONDS:.0f} s; collocated: two engines, requests in turn; apart: one encoder, one "
        f"engine; all processes of a side share the same {CORES} cores. The encoder multiplies "
        "0.85 times as much for each token as the text model. Bar: p99 at most 0.7x, no answer "
        "differs."
    )
    before, after = sides["collocated"], sides["apart"]
    differ = [
        sum(one.answers[name] != other.answers[name] for name in one.answers)
        for one, other in zip(before, after, strict=True)
    ]

    def row(name: str, unit: str, value: Any) -> Row:
        return Row.of(
            f"encode apart: {name}",
            unit,
            stock=[value(one) for one in before],
            plugin=[value(one) for one in after],
        )

    return [
        row("text, ITL p99", "ms", lambda one: 1e3 * percentile(one.itl_s, 99)),
        row("text, ITL p50", "ms", lambda one: 1e3 * percentile(one.itl_s, 50)),
        row("video, TTFT p50", "s", lambda one: percentile(one.ttft_s, 50)),
        row("text tokens a second", "count", lambda one: len(one.itl_s) / SECONDS),
        row("CPU of all processes", "s", lambda one: one.cpu_s),
        Row.of("encode apart: videos answered otherwise", "count", plugin=differ),
    ]


def encoder_killed(study: FleetStudy) -> list[Row]:
    """An encoder is killed while requests about videos are served."""
    model = _model(study.context)
    with TemporaryDirectory() as folder:
        media = Path(folder)
        clips = _clips(study.context, media)[:REQUESTS]
        with _collocated(model, media) as (_, engines):
            expected, _ = _asked(engines, clips)
        loaded_before = 0.0
        with _apart(model, media) as ((encoder, _), engines):

            def kill() -> None:
                nonlocal loaded_before
                loaded_before = _items(engines[0], "loaded")
                os.killpg(encoder.pid, signal.SIGKILL)

            answers, longest = _asked(engines, clips, kill)
            missed = _items(engines[0], "missed")
    if not loaded_before:
        raise RuntimeError("the engine loaded nothing from the encoder before that was killed")
    study.notes.append(
        f"encoder-killed: {REQUESTS} requests, {AT_A_TIME} at a time; the encoder is killed after "
        f"{KILLED_AFTER} answers. Bar: all answered, all equal."
    )
    same = sum(answers.get(name) == answer for name, answer in expected.items())
    return [
        Row.of("encoder killed: answered", "count", stock=[len(expected)], plugin=[len(answers)]),
        Row.of("encoder killed: equal answers", "count", stock=[len(expected)], plugin=[same]),
        Row.of("encoder killed: longest answer", "s", plugin=[longest]),
        Row.of("encoder killed: items loaded before", "count", plugin=[loaded_before]),
        Row.of("encoder killed: items that the engine encoded", "count", plugin=[missed]),
    ]


# --- servers --------------------------------------------------------------------------------------


def _model(context: BenchContext) -> Path:
    return build("qwen2_5_vl", context.work_dir / MODEL, **MODEL_SIZE)


def _clips(context: BenchContext, media: Path) -> list[Path]:
    """Clips without a picture in common, in the folder from which servers may read."""
    count = max(REQUESTS, int(SECONDS / VIDEO_EVERY_S) + 1) + 2
    made = [other_pictures(context.work_dir, 900 + number, **VIDEO) for number in range(count)]
    return [Path(shutil.copy(clip, media / f"{n}.mp4")) for n, clip in enumerate(made)]


@contextmanager
def _on_the_cores() -> Iterator[None]:
    """Processes that are started in the block run on the cores of a side."""
    allowed = os.sched_getaffinity(0)
    if len(allowed) < CORES:
        raise RuntimeError(f"there are {len(allowed)} cores; encode-apart needs {CORES}")
    os.sched_setaffinity(0, sorted(allowed)[:CORES])
    try:
        yield
    finally:
        os.sched_setaffinity(0, allowed)


@contextmanager
def _apart(model: Path, media: Path) -> Iterator[tuple[list[Server], list[Server]]]:
    args = [*ARGS, "--allowed-local-media-path", str(media)]
    with TemporaryDirectory() as store, ExitStack() as stack:
        sides = apart(model, Path(store), args=args, env=ENV, settings=SETTINGS)
        with _on_the_cores():
            found = stack.enter_context(sides)
        yield [*found.encoders, *found.engines], found.engines


@contextmanager
def _collocated(model: Path, media: Path) -> Iterator[tuple[list[Server], list[Server]]]:
    args = [*ARGS, "--allowed-local-media-path", str(media), *as_flags(EVERY_PART)]
    sides = [
        serve(model, plugin=True, args=args, env=ENV, additional_config={"mm_ext": SETTINGS})
        for _ in range(2)
    ]
    with ExitStack() as stack:
        # Threads take over the cores of the one that starts them.
        with _on_the_cores():
            servers = stack.enter_context(together(sides))
        yield servers, servers


# --- traffic --------------------------------------------------------------------------------------


def _traffic(servers: Sequence[Server], engines: Sequence[Server], clips: Sequence[Path]) -> Side:
    found = Side()
    # The first requests pay for lazy imports and worker starts.
    for number, engine in enumerate(engines):
        streamed(engine, about(clips[-1 - number]), VIDEO_TOKENS)
        streamed(engine, _text(number), 4)
    before = _cpu_s(servers)
    ends = time.monotonic() + SECONDS

    def texts(stream: int) -> None:
        number = 0
        while time.monotonic() < ends:
            engine = engines[(stream + number) % len(engines)]
            times, _ = streamed(engine, _text(100 * stream + number), TEXT_TOKENS)
            # Before the first token there is a chunk that says whose answer it is.
            found.itl_s += [later - one for one, later in pairwise(times[2:])]
            number += 1

    def video(number: int, at: float) -> None:
        time.sleep(max(0.0, at - time.monotonic()))
        times, said = streamed(engines[number % len(engines)], about(clips[number]), VIDEO_TOKENS)
        found.ttft_s.append(times[1] - times[0])
        found.answers[clips[number].name] = said

    count = int(SECONDS / VIDEO_EVERY_S)
    starts = [time.monotonic() + VIDEO_EVERY_S * number for number in range(count)]
    with ThreadPoolExecutor(TEXTS + count) as pool:
        work = [pool.submit(texts, stream) for stream in range(TEXTS)]
        work += [pool.submit(video, number, at) for number, at in enumerate(starts)]
        for one in work:
            one.result()
    found.cpu_s = _cpu_s(servers) - before
    return found


def _asked(
    engines: Sequence[Server], clips: Sequence[Path], kill: Callable[[], None] | None = None
) -> tuple[dict[str, str], float]:
    """Answers about clips, and the seconds that the slowest took; ``kill`` ends a server amid."""
    answers: dict[str, str] = {}
    longest: list[float] = [0.0]
    killing = threading.Lock()

    def one(number: int) -> None:
        times, said = streamed(engines[number % len(engines)], about(clips[number]), VIDEO_TOKENS)
        with killing:
            answers[clips[number].name] = said
            longest[0] = max(longest[0], times[-1] - times[0])
            if kill is not None and len(answers) == KILLED_AFTER:
                kill()

    with ThreadPoolExecutor(AT_A_TIME) as pool:
        for done in [pool.submit(one, number) for number in range(len(clips))]:
            done.result()
    return answers, longest[0]


def streamed(server: Server, messages: Any, tokens: int) -> tuple[list[float], str]:
    """When a request was sent and when each token came, and the answer."""
    times = [time.monotonic()]
    said = []
    with server.client(timeout=300.0) as client:
        chunks = client.chat.completions.create(
            model=MODEL_NAME,
            messages=messages,
            max_tokens=tokens,
            temperature=0,
            stream=True,
            extra_body={"ignore_eos": True},
        )
        for chunk in chunks:
            if chunk.choices and chunk.choices[0].delta.content is not None:
                times.append(time.monotonic())
                said.append(chunk.choices[0].delta.content)
    if len(times) < 2:
        raise RuntimeError("the answer held no token")
    return times, "".join(said)


def _text(number: int) -> list[dict[str, Any]]:
    return [{"role": "user", "content": f"Question {number}: what comes after {number}?"}]


def about(clip: Path) -> list[dict[str, Any]]:
    video = {"type": "video_url", "video_url": {"url": clip.as_uri()}}
    return [{"role": "user", "content": [video, {"type": "text", "text": "What happens?"}]}]


def _cpu_s(servers: Sequence[Server]) -> float:
    return sum(sum(cpu_seconds(server.pid).values()) for server in servers)


def _items(server: Server, outcome: str) -> float:
    """Items that an engine has ``loaded`` from elsewhere, or ``missed`` there."""
    return server.metric("mm_ext_encoder_transfer_items_total", outcome=outcome)
