"""A part of ``bench long-video``: text of another client while a long video is looked through."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from vllm_mm_ext.testing.checkpoints import build
from vllm_mm_ext.testing.engine_arguments import SCHEDULER, as_flags
from vllm_mm_ext.testing.server import Server, serve
from vllm_mm_ext.tools.bench.harness import Row, percentile
from vllm_mm_ext.tools.bench.long_video_client import Asker
from vllm_mm_ext.tools.bench.long_video_parts import Study
from vllm_mm_ext.tools.bench.long_video_sides import MAP_REDUCE, QUESTION
from vllm_mm_ext.tools.bench.mixed_engine import (
    SEGMENT_TOKENS,
    TEXT_ANSWER,
    TEXT_EVERY_TOKENS,
    TEXT_PROMPT,
)
from vllm_mm_ext.tools.bench.mixed_traffic import SLOTS, TARGET_OF_TEXT

_SECONDS = 40.0
_CALIBRATIONS = 5
_STEP_TOKENS = 512
# Videos that are looked through beside the texts of a repeat.
_FILMS = 3
# The texts begin once so many windows are done.
_WINDOWS_FIRST = 2


def text(study: Study) -> list[Row]:
    """Time between tokens of texts, alone and while the longest video is looked through.

    The model, the texts and the target between tokens are those of ``bench mixed-traffic``.
    """
    model = build(
        "qwen2_5_vl",
        study.context.work_dir / "qwen2_5_vl-mixed",
        layers=6,
        hidden_size=640,
        vision_layers=4,
    )
    with _server(study, model, target_ms=50.0) as server:
        target_ms = 1e3 * TARGET_OF_TEXT * Texts(server, 0).alone()[1]
    alone: list[float] = []
    beside: list[float] = []
    windows: list[int] = []
    with _server(study, model, target_ms) as server:
        # The server loads what it needs, and learns what steps cost.
        Asker(server).ask(study.films.film(759, 1).path, QUESTION, options=MAP_REDUCE)
        for repeat in range(study.context.repeats):
            films = [
                study.films.film(760 + _FILMS * repeat + number, study.minutes[-1]).path
                for number in range(_FILMS)
            ]
            texts = Texts(server, 1 + repeat)
            every_s = TEXT_EVERY_TOKENS * texts.alone()[0]
            alone.append(1e3 * percentile(texts.stream(every_s), 99))
            with _looked_through(server, films) as seen:
                beside.append(1e3 * percentile(texts.stream(every_s), 99))
                windows.append(seen())
    study.notes.append(
        f"texts: {TEXT_PROMPT} tokens in, {TEXT_ANSWER} out, {_SECONDS:g} s of arrivals; "
        f"target_itl_ms {target_ms:.0f}; windows done meanwhile: {', '.join(map(str, windows))}"
    )
    name = f"text ITL p99, alone against beside a video of {study.minutes[-1]} min"
    return [Row.of(name, "ms", stock=alone, plugin=beside)]


@contextmanager
def _server(study: Study, model: Path, target_ms: float) -> Iterator[Server]:
    settings = {
        "media": {"sampling": {"fps": 1.0, "max_frames": 32}},
        "segments": {"tokens": SEGMENT_TOKENS},
        "scheduler": {"target_itl_ms": target_ms},
        "long_video": {"note_tokens": 24},
    }
    # As in `mixed-traffic`: on the engine's core, others would stop all of its threads.
    threads = max(1, len(os.sched_getaffinity(0)) - 1)
    with serve(
        model,
        plugin=True,
        args=[
            *("--allowed-local-media-path", str(study.context.work_dir)),
            *("--max-model-len", "8192", "--max-num-seqs", str(SLOTS), "--dtype", "float32"),
            *("--max-num-batched-tokens", str(_STEP_TOKENS), "--block-size", "32"),
            *("--limit-mm-per-prompt", '{"video": 1, "image": 0}'),
            *("--scheduling-policy", "priority"),
            *as_flags(SCHEDULER),
        ],
        env={"OMP_NUM_THREADS": str(threads)},
        additional_config={"mm_ext": settings},
    ) as server:
        yield server


@contextmanager
def _looked_through(server: Server, paths: Sequence[Path]) -> Iterator[Callable[[], int]]:
    """Have videos looked through one by one while the block runs; yields what counts their windows.

    Raises:
        RuntimeError: They were over before the block was.
    """
    seen, ready, ended = [0], threading.Event(), threading.Event()

    def watch() -> None:
        for path in paths:
            before = seen[0]

            def progress(done: int, before: int = before) -> bool:
                seen[0] = before + done
                if seen[0] >= _WINDOWS_FIRST:
                    ready.set()
                return ended.is_set()

            Asker(server).follow(path, QUESTION, MAP_REDUCE, progress)
            if ended.is_set():
                return
        raise RuntimeError(
            "the videos were over before the texts were; --minutes makes them longer"
        )

    with ThreadPoolExecutor(1) as pool:
        watched = pool.submit(watch)
        watched.add_done_callback(lambda _: ready.set())
        ready.wait()
        try:
            yield lambda: seen[0]
        finally:
            ended.set()
            watched.result()


class Texts:
    """Texts that never repeat, sent to a server.

    Args:
        server: Who is asked.
        seed: Of the texts.
    """

    def __init__(self, server: Server, seed: int) -> None:
        self._server = server
        self._client = server.client(timeout=600.0)
        self._rng = np.random.default_rng(seed)

    def alone(self) -> tuple[float, float]:
        """Seconds for each token, and until the first one, of a text that is alone."""
        token, first = [], []
        for _ in range(_CALIBRATIONS):
            sent = time.perf_counter()
            times = self._one(self._prompt())
            # From the sending on: tokens that come quicker than they are read come in bursts.
            token.append((times[-1] - sent) / TEXT_ANSWER)
            first.append(times[0] - sent)
        return float(np.median(token)), float(np.median(first))

    def stream(self, every_s: float) -> list[float]:
        """Seconds between tokens of texts that arrive so often, for a while."""
        spaces = self._rng.uniform(0.5, 1.5, max(1, int(_SECONDS / every_s)))
        arrivals = every_s * (np.cumsum(spaces) - 0.5)
        prompts = [self._prompt() for _ in arrivals]
        started = time.perf_counter()

        def one(number: int) -> list[float]:
            time.sleep(max(0.0, started + float(arrivals[number]) - time.perf_counter()))
            return [float(gap) for gap in np.diff(self._one(prompts[number]))]

        # A thread each, so that no text waits for an earlier one's answer.
        with ThreadPoolExecutor(len(prompts)) as pool:
            return [gap for gaps in pool.map(one, range(len(prompts))) for gap in gaps]

    def _prompt(self) -> list[int]:
        return [int(token) for token in self._rng.integers(5, 250, TEXT_PROMPT)]

    def _one(self, prompt: list[int]) -> list[float]:
        """When each token came."""
        stream = self._client.completions.create(
            model=self._server.model,
            prompt=prompt,
            max_tokens=TEXT_ANSWER,
            temperature=0.0,
            stream=True,
            extra_body={"ignore_eos": True},
        )
        with stream:
            return [time.perf_counter() for chunk in stream if chunk.choices]
