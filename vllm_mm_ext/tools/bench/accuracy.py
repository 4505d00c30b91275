"""``accuracy``: are answers about clips of known content right, and what do tokens buy.

Clips that training never saw, as encoded files through the server. Stock vLLM spaces frames evenly
and reduces no tokens, so ``uniform`` frames and no reduction stand for it.
"""

from __future__ import annotations

import contextlib
import itertools
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from statistics import mean
from typing import Any

import numpy as np
from transformers import AutoConfig

from vllm_mm_ext.composer.configuration import register_config
from vllm_mm_ext.composer.training.clips import draw_clip
from vllm_mm_ext.composer.training.questions import (
    SHORT_EVENT_TASKS,
    TASKS,
    Question,
    normalised,
    questions,
)
from vllm_mm_ext.composer.training.render import encode_clip
from vllm_mm_ext.composer.training.samples import HELD_OUT, balanced
from vllm_mm_ext.testing.server import Server, serve
from vllm_mm_ext.tools.bench.accuracy_plot import Curve, write_plot
from vllm_mm_ext.tools.bench.bench_clips import variant
from vllm_mm_ext.tools.bench.chat import Answer, ask
from vllm_mm_ext.tools.bench.harness import BenchContext, BenchResult, Row
from vllm_mm_ext.tools.cli.demo import shipped_model

FRAMES = (8, 16, 32, 64)
# As the checkpoint was trained and as its configuration says: 4 frames a second, 64 at most.
FULL = 0
_FULL_OPTIONS = {"fps": 4.0, "min_frames": 8, "max_frames": 64}
# The adaptive policy at a budget is held against uniform frames at twice of it.
_HALVED = (16, 32)
REDUCTIONS: Mapping[str, dict[str, Any]] = {
    "pool 2": {"pool": 2},
    "temporal 4": {"temporal": 4},
    "pool 2 and temporal 4": {"pool": 2, "temporal": 4},
    "static merge to 1/4": {"static": "merge", "keep": 0.25},
    "static prune to 1/4": {"static": "prune", "keep": 0.25},
}
_CLIPS_PER_REPEAT, _QUESTIONS = 24, 16
_DURATIONS = (8, 12, 16, 20, 24, 30)
# Not those of the demo and of the held-out clips that training shows.
_FIRST_SEED = HELD_OUT + 1_000_000
# As many as a server allows unless told otherwise: the shortest clip has 64 frames then.
_FPS = 8.0
_ANSWER = 16
_AT_ONCE = 16
_SIDES = ("uniform", "adaptive")


@dataclass(frozen=True)
class Asked:
    """A clip as a file, and what is asked about it."""

    path: Path
    questions: tuple[Question, ...]


@dataclass
class Outcome:
    """What one setting did over all clips.

    Attributes:
        right: Outcomes of the questions of each task.
        visual: Visual tokens of each clip.
        prompt: Prompt tokens of each question.
        ttft_s: Time to first token of the first question about each clip.
    """

    right: dict[str, list[bool]] = field(default_factory=lambda: defaultdict(list))
    visual: list[float] = field(default_factory=list)
    prompt: list[float] = field(default_factory=list)
    ttft_s: list[float] = field(default_factory=list)

    def share(self, tasks: Sequence[str] = TASKS) -> float:
        """Mean over tasks of the share of right answers, in per cent."""
        return 100 * mean(mean(self.right[task]) for task in tasks)


def run(context: BenchContext) -> BenchResult:
    """Every clip with every setting; each repeat adds 24 clips.

    Raises:
        RuntimeError: The package has no trained checkpoint.
    """
    model = shipped_model()
    if model is None:
        raise RuntimeError("vllm_mm_ext/assets holds no trained composer; scripts/train_composer")
    settings = [(side, frames, "none") for side in _SIDES for frames in (FULL, *FRAMES)]
    settings += [("adaptive", FULL, name) for name in REDUCTIONS]
    outcomes: dict[tuple[str, int, str], Outcome] = defaultdict(Outcome)
    blind = Outcome()
    with contextlib.ExitStack() as stack:
        media = stack.enter_context(context.scratch())
        clips = context.repeats * _CLIPS_PER_REPEAT
        begin = stack.enter_context(context.steps("accuracy", 1 + clips))
        begin("servers")
        with ThreadPoolExecutor(len(_SIDES)) as pool:
            started = pool.map(
                lambda side: stack.enter_context(_server(model, media, side == "adaptive")), _SIDES
            )
            servers = dict(zip(_SIDES, started, strict=True))
        for number, asked in enumerate(known_clips(clips, media)):
            begin(f"clip {number + 1}")
            for index, setting in enumerate(settings):
                server = servers[setting[0]]
                # Files of their own, so that first questions find nothing remembered.
                file = variant(asked.path, media / f"setting-{index}.mp4", number)
                _ask_about(server, file, asked, options_of(*setting[1:]), outcomes[setting])
            _ask_about(servers["adaptive"], None, asked, None, blind)
    plot = write_plot(_curves(outcomes), context.work_dir / "accuracy.svg")
    notes = [
        f"{clips} held-out clips of {_DURATIONS[0]} to {_DURATIONS[-1]} s as H.264 and AAC files, "
        f"{sum(map(len, blind.right.values()))} questions; an answer is right when it says "
        "exactly what is true",
        "stock column: uniform frames, no reduction, as stock vLLM would sample; plugin column: "
        "adaptive frames and the named reduction; both served by the plugin, as stock vLLM has no "
        "such model",
        f"short events: {', '.join(SHORT_EVENT_TASKS)}",
        "full budget: as the checkpoint was trained, 4 frames a second, 64 at most; reductions are "
        "those of the full budget, next to none",
        f"plot of accuracy against tokens: {plot}",
    ]
    return BenchResult("accuracy", rows(outcomes, blind, kv_token_bytes(model)), notes)


def known_clips(count: int, directory: Path) -> Iterator[Asked]:
    """Held-out clips, each with questions that as a whole ask equally often for every task."""
    durations = itertools.cycle(_DURATIONS)
    for seed, duration in zip(range(_FIRST_SEED, _FIRST_SEED + count), durations, strict=False):
        clip = draw_clip(seed, duration)
        rng = np.random.default_rng(seed)
        found = balanced(questions(clip, rng), _QUESTIONS, rng, weights={})
        path = directory / "clip.mp4"
        encode_clip(clip, path)
        yield Asked(path, tuple(found))


def rows(
    outcomes: Mapping[tuple[str, int, str], Outcome], blind: Outcome, token_bytes: int
) -> list[Row]:
    """Accuracy per task, by budget of frames, and by reduction with what it costs."""
    full = {side: outcomes[side, FULL, "none"] for side in _SIDES}
    table = []
    for name, tasks in (*((task, (task,)) for task in TASKS), ("mean over tasks", TASKS)):
        table.append(_pair(f"{name}, full budget", "%", full, _share(tasks)))
    for name, tasks in (*((task, (task,)) for task in TASKS), ("mean over tasks", TASKS)):
        table.append(Row.of(f"{name}, guessed without media", "%", plugin=[blind.share(tasks)]))
    table += _costs("full budget", full, token_bytes)
    for frames in FRAMES:
        sides = {side: outcomes[side, frames, "none"] for side in _SIDES}
        table += [
            _pair(f"{frames} frames: short events", "%", sides, _share(SHORT_EVENT_TASKS)),
            _pair(f"{frames} frames: mean over tasks", "%", sides, Outcome.share),
            *_costs(f"{frames} frames", sides, token_bytes),
        ]
    for frames in _HALVED:
        sides = {
            "uniform": outcomes["uniform", 2 * frames, "none"],
            "adaptive": outcomes["adaptive", frames, "none"],
        }
        table.append(
            _pair(
                f"short events, uniform {2 * frames} against adaptive {frames} frames",
                "%",
                sides,
                _share(SHORT_EVENT_TASKS),
            )
        )
    for name in REDUCTIONS:
        sides = {
            "uniform": outcomes["adaptive", FULL, "none"],
            "adaptive": outcomes["adaptive", FULL, name],
        }
        table.append(_pair(f"{name}: mean over tasks", "%", sides, Outcome.share))
        shares = {task: sides["adaptive"].share((task,)) for task in TASKS}
        lowest = min(TASKS, key=lambda task: shares[task])
        table.append(_pair(f"{name}: lowest, {lowest}", "%", sides, _share((lowest,))))
        table += _costs(name, sides, token_bytes)
    return table


def kv_token_bytes(model: Path) -> int:
    """Bytes of KV cache that a token takes in all layers of the text model of a checkpoint."""
    register_config()
    config = AutoConfig.from_pretrained(model)
    text = config.text_config
    element = 4 if "32" in str(config.dtype) else 2
    return int(2 * text.num_hidden_layers * text.num_key_value_heads * text.head_dim * element)


def options_of(frames: int, reduction: str) -> dict[str, Any]:
    """The ``mm_ext`` block of a request with so many frames (or `FULL`) and a reduction."""
    budget = {"fps": _FPS, "min_frames": frames, "max_frames": frames} if frames else _FULL_OPTIONS
    return {**budget, "quality": "fixed", "reduction": REDUCTIONS.get(reduction, {})}


@contextlib.contextmanager
def _server(model: Path, media: Path, adaptive: bool) -> Iterator[Server]:
    sampling = {"policy": "adaptive" if adaptive else "uniform", "max_frames": FRAMES[-1]}
    with serve(
        model,
        plugin=True,
        args=[
            *("--allowed-local-media-path", str(media)),
            *("--max-model-len", "8192", "--max-num-batched-tokens", "4096"),
            *("--limit-mm-per-prompt", '{"video": 1, "audio": 1}'),
        ],
        additional_config={"mm_ext": {"media": {"sampling": sampling}}},
    ) as server:
        yield server


def _ask_about(
    server: Server,
    file: Path | None,
    asked: Asked,
    options: Mapping[str, Any] | None,
    into: Outcome,
) -> None:
    """Ask everything about a clip: the first question alone and timed, then the rest."""

    def one(question: Question) -> Answer:
        parts: list[dict[str, Any]] = [{"type": "text", "text": question.text}]
        if file is not None:
            parts.insert(0, {"type": "video_url", "video_url": {"url": file.as_uri()}})
        return ask(
            server,
            [{"role": "user", "content": parts}],
            max_tokens=_ANSWER,
            options=options,
            ignore_end=False,
            client=client,
        )

    with server.client(timeout=600.0) as client, ThreadPoolExecutor(_AT_ONCE) as pool:
        first = one(asked.questions[0])
        answers = [first, *pool.map(one, asked.questions[1:])]
    for question, answer in zip(asked.questions, answers, strict=True):
        right = normalised(answer.text) == normalised(question.answer)
        into.right[question.task].append(right)
        into.prompt.append(float(answer.prompt_tokens))
    into.ttft_s.append(first.ttft_s)
    if file is not None:
        into.visual.append(float(first.report["tokens"]["visual"]))


_Value = Callable[[Outcome], float]


def _share(tasks: Sequence[str]) -> _Value:
    return lambda outcome: outcome.share(tasks)


def _pair(name: str, unit: str, sides: Mapping[str, Outcome], value: _Value) -> Row:
    """Stock's stand-in beside the plugin."""
    stock, plugin = (value(sides[side]) for side in _SIDES)
    return Row.of(name, unit, stock=[stock], plugin=[plugin])


def _costs(name: str, sides: Mapping[str, Outcome], token_bytes: int) -> list[Row]:
    def row(what: str, unit: str, values: Callable[[Outcome], list[float]]) -> Row:
        stock, plugin = (values(sides[side]) for side in _SIDES)
        return Row.of(f"{name}: {what}", unit, stock=stock, plugin=plugin)

    return [
        row("visual tokens", "tokens", lambda o: o.visual),
        row("first question, TTFT", "ms", lambda o: [1e3 * ttft for ttft in o.ttft_s]),
        row("KV cache of a prompt", "KiB", lambda o: [n * token_bytes / 1024 for n in o.prompt]),
    ]


def _curves(outcomes: Mapping[tuple[str, int, str], Outcome]) -> list[Curve]:
    """Accuracy over visual tokens: a line per policy, a point per reduction."""

    def point(setting: tuple[str, int, str]) -> tuple[float, float, float]:
        outcome = outcomes[setting]
        return mean(outcome.visual), outcome.share(), outcome.share(SHORT_EVENT_TASKS)

    lines = [
        Curve(f"{side} frames", tuple(point((side, frames, "none")) for frames in FRAMES))
        for side in _SIDES
    ]
    return lines + [Curve(name, (point(("adaptive", FULL, name)),)) for name in REDUCTIONS]
