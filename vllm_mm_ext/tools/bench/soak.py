"""``soak``: mixed work for minutes or hours, and what each process holds over time."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Mapping
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import IO, Any, Literal

from vllm_mm_ext.testing.checkpoints import build
from vllm_mm_ext.testing.engine_arguments import EVERY_PART, as_flags
from vllm_mm_ext.testing.memory import Role
from vllm_mm_ext.testing.origin import Origin
from vllm_mm_ext.testing.server import serve
from vllm_mm_ext.tools.bench.harness import BenchContext, BenchResult, Row
from vllm_mm_ext.tools.bench.soak_clients import Course, Sample, Soak
from vllm_mm_ext.tools.bench.soak_media import CLIPS, SoakMedia

Caches = Literal["tiny", "default"]
MIB = 1 << 20
# Until then caches fill, and code is loaded that the first request of each kind needs.
WARM_UP_S = 120.0
# Moments between the end of the warm-up and the end that are shown.
_MOMENTS = 5
TINY = {
    "media": {"cache": {"decoded_mb": 16, "encoded_mb": 4}},
    "encoder_cache": {"host_mb": 16.0},
}
_ROLES: dict[Role, str] = {"api": "API server", "engine": "engine", "decode": "decode workers"}


def run(
    context: BenchContext,
    *,
    minutes: float = 5.0,
    caches: Caches = "tiny",
    clients: int = 6,
    seed: int = 0,
    stock: bool = True,
    series: Path | None = None,
) -> BenchResult:
    """Work of the same kinds, drawn from the same seed, on one server after the other.

    Args:
        context: Of the benchmark; nothing is repeated.
        minutes: Of work for each server.
        caches: ``tiny`` ones of the plugin and of vLLM's processor, or all as they are by default.
        clients: Conversations at a time.
        seed: Of the work.
        stock: Whether stock vLLM is measured too.
        series: File for all samples: a JSON object a line, written as they are taken.
    """
    sides = ("stock", "plugin") if stock else ("plugin",)
    model = small_model(context.work_dir)
    courses: dict[str, Course] = {}
    with contextlib.ExitStack() as stack:
        out = None if series is None else stack.enter_context(open(series, "w"))
        step = stack.enter_context(context.steps("soak", len(sides) * int(60 * minutes)))
        for side in sides:
            directory = stack.enter_context(context.scratch())
            origin = stack.enter_context(Origin())
            media = SoakMedia(context.work_dir, directory, origin)
            log = context.work_dir / f"soak-{side}.log"
            with server_for(model, directory, side == "plugin", caches, log) as server:
                soak = Soak(server, media, clients=clients, seed=seed)
                show = partial(_show, step, side)
                courses[side] = soak.run(60 * minutes, show, _writer(out, side))
    return BenchResult("soak", _rows(courses), _notes(courses, caches, clients, minutes))


def small_model(work_dir: Path) -> Path:
    """A Qwen2.5-Omni that takes little of the machine, so that most of the work is around it."""
    layers = {"layers": 1, "vision_layers": 1, "audio_layers": 1}
    return build(
        "qwen2_5_omni", work_dir / "qwen2_5_omni-soak", video_max_pixels=168 * 168, **layers
    )


def server_for(model: Path, media: Path, plugin: bool, caches: Caches, log: Path) -> Any:
    """A server that may read ``media``, with all parts of the plugin or without it."""
    return serve(
        model,
        plugin=plugin,
        args=[
            *("--dtype", "float32"),
            *("--allowed-local-media-path", str(media)),
            *("--max-model-len", "8192", "--max-num-seqs", "16"),
            # Few, so that all are in use before the warm-up ends: memory comes with first use.
            *("--block-size", "32", "--num-gpu-blocks-override", "1024"),
            *("--limit-mm-per-prompt", '{"video": 2, "audio": 2, "image": 2}'),
            *(["--mm-processor-cache-gb", "0.1"] if caches == "tiny" else []),
            *(as_flags(EVERY_PART) if plugin else []),
        ],
        additional_config={"mm_ext": TINY if caches == "tiny" else {}} if plugin else None,
        log=log,
    )


def _show(step: Callable[[str], None], side: str, text: str) -> None:
    step(f"{side}, {text}")


def _writer(out: IO[str] | None, side: str) -> Callable[[Sample], None]:
    def write(sample: Sample) -> None:
        if out is not None:
            roles = {role: asdict(held) for role, held in sample.usage.items()}
            print(json.dumps({"side": side, "at_s": sample.at_s, **roles}), file=out, flush=True)

    return write


def _rows(courses: Mapping[str, Course]) -> list[Row]:
    end_s = min(course.samples[-1].at_s for course in courses.values())
    warm_s = min(WARM_UP_S, end_s / 4)
    moments = [warm_s + (end_s - warm_s) * part / _MOMENTS for part in range(_MOMENTS + 1)]
    rows = []

    def row(name: str, unit: str, values: Mapping[str, float]) -> None:
        rows.append(Row.of(name, unit, **{side: [value] for side, value in values.items()}))

    def held(what: str, at_s: float, role: Role | None = None) -> dict[str, float]:
        return {
            side: course.at(at_s, lambda sample: getattr(sample.of(role), what))
            for side, course in courses.items()
        }

    for role, name in _ROLES.items():
        for at_s in (0.0, *moments):
            of_side = held("memory", at_s, role)
            row(
                f"{name}: memory after {at_s / 60:.1f} min",
                "MiB",
                {side: size / MIB for side, size in of_side.items()},
            )
        first, last = held("memory", warm_s, role), held("memory", end_s, role)
        row(
            f"{name}: change since {warm_s / 60:.1f} min",
            "%",
            {side: 100 * (last[side] / first[side] - 1) for side in courses if first[side]},
        )
    for what in ("descriptors", "threads"):
        for at_s in (warm_s, end_s):
            row(f"{what} of all processes after {at_s / 60:.1f} min", "count", held(what, at_s))
    for outcome in ("answered", "refused", "left", "failed"):
        counts = {side: float(course.count(outcome)) for side, course in courses.items()}
        row(f"requests {outcome}", "count", counts)
        # Not the same work: see the notes.
        rows[-1] = rows[-1].without_ratio()
    return rows


def _notes(
    courses: Mapping[str, Course], caches: Caches, clients: int, minutes: float
) -> list[str]:
    notes = [
        f"{clients} conversations at a time for {minutes:g} min, {caches} caches"
        + (f" ({json.dumps(TINY)}, processor cache 0.1 GB)" if caches == "tiny" else ""),
        f"{CLIPS} clips known to all, as many new ones; options, names, sessions, damage, hang-ups",
        "memory: proportional set sizes, and bytes in memory files; medians of a twentieth of the "
        "time before each moment",
    ]
    if "stock" in courses:
        notes.append(
            "counts of requests do not compare the sides' speed. Stock ignores mm_ext blocks and "
            "takes 2 frames a second; the plugin takes what a block says, else 1 a second and 32 "
            "at most. Half of the new clips show the pictures of a known one, whose encoder "
            "outputs and KV the plugin finds again"
        )
    for side, course in courses.items():
        if not course.alive:
            notes.append(f"{side}: the server ended before the work did")
        notes += [f"{side}: {words}" for words in course.faults]
    return notes
