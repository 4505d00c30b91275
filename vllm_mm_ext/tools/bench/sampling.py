"""``sampling``: which policy sees sub-second events with 32 frames, how evenly, at what cost.

Stock vLLM spaces frames evenly, so ``uniform`` stands for it in what is caught; its time is that
of its own loader.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from vllm_mm_ext.media.decode.job import run_job
from vllm_mm_ext.media.types import DecodeRequest, DecodeResult, SamplingSpec
from vllm_mm_ext.testing.media import ClipTruth
from vllm_mm_ext.tools.bench.harness import BenchContext, BenchResult, Row
from vllm_mm_ext.tools.bench.sampling_clips import (
    COLOUR_SEEDS,
    HELD_OUT_SEEDS,
    Case,
    build,
    case,
)

FRAMES = 32
_SIZE = (640, 360)
# Scenes with one kind of difficulty, and scenes that change all the time by themselves.
_CALM = ("static", "talking_head", "fade", "noise")


@dataclass(frozen=True)
class Outcome:
    """What both policies did on one clip.

    Attributes:
        case: The clip.
        events: Events in it.
        caught: Events with at least one frame inside, per policy.
        gap: Widest gap between chosen frames, in multiples of uniform's mean spacing.
        seconds: Per policy, probe to decoded frames; ``stock`` is vLLM's own loader.
    """

    case: Case
    events: int
    caught: dict[str, int]
    gap: float
    seconds: dict[str, float]


def run(context: BenchContext) -> BenchResult:
    """All held-out clips at 640x360; every repeat times each side once more."""
    directory = context.work_dir / "sampling"
    cases = [*map(case, HELD_OUT_SEEDS), *(case(seed, colour_only=True) for seed in COLOUR_SEEDS)]
    with context.steps("sampling", len(cases)) as begin:
        outcomes = list(measure(cases, directory, repeats=context.repeats, begin=begin))
    return BenchResult("sampling", rows(outcomes), _NOTES)


def measure(
    cases: Iterable[Case],
    directory: Path,
    *,
    repeats: int = 1,
    size: tuple[int, int] = _SIZE,
    begin: Callable[[str], None] = lambda _name: None,
) -> Iterator[Outcome]:
    """Make the clip of each case (kept in ``directory``) and sample it with both policies.

    Args:
        cases: The clips.
        directory: Where the clips are kept between runs.
        repeats: Timings of each side, interleaved; the median counts.
        size: Width and height of the clips in pixels.
        begin: Told the name of each clip as it starts.
    """
    directory.mkdir(parents=True, exist_ok=True)
    for item in cases:
        begin(f"{item.scene} {item.codec} GOP {item.gop}")
        yield _outcome(item, build(item, directory, width=size[0], height=size[1]), repeats)


def rows(outcomes: Iterable[Outcome]) -> list[Row]:
    """Share caught per kind of scene and over all, widest gap, and time per second of video."""
    outcomes = list(outcomes)
    groups: dict[str, list[Outcome]] = defaultdict(list)
    for outcome in outcomes:
        if not outcome.case.colour_only:
            calm = outcome.case.scene in _CALM
            groups["calm scenes" if calm else "busy scenes"].append(outcome)
            groups[outcome.case.scene].append(outcome)
            groups["all clips"].append(outcome)
        else:
            groups["in colour alone"].append(outcome)
    table = [
        Row.of(
            f"sub-second events caught, {name} ({sum(o.events for o in group)} events)",
            "share",
            stock=[_share(group, "uniform")],
            plugin=[_share(group, "adaptive")],
        )
        for name, group in groups.items()
    ]
    table.append(
        Row.of(
            "widest gap in uniform spacings, worst clip",
            "x",
            plugin=[max(outcome.gap for outcome in outcomes)],
        )
    )
    table.extend(
        Row.of(
            f"{FRAMES} frames of one clip, {policy}",
            "s",
            stock=[outcome.seconds["stock"] for outcome in outcomes],
            plugin=[outcome.seconds[policy] for outcome in outcomes],
        )
        for policy in ("uniform", "adaptive")
    )
    return table


_NOTES = [
    f"{FRAMES} frames from 60-120 s clips, GOP 30-1000, H.264 and MPEG-4, events of 0.2-0.8 s; "
    "no clip was used to design the sampler.",
    "Caught: stock's even spacing against adaptive. Calm scenes: "
    f"{', '.join(_CALM)}; the others change all the time by themselves.",
    "In colour alone: other clips, whose events are as bright as what they hide.",
    "Times run from a file in the page cache to frames at native size.",
]


def _outcome(item: Case, truth: ClipTruth, repeats: int) -> Outcome:
    seconds: dict[str, list[float]] = defaultdict(list)
    chosen: dict[str, np.ndarray[tuple[int], np.dtype[np.float64]]] = {}
    for _ in range(repeats):
        started = time.perf_counter()
        _stock(truth.path)
        seconds["stock"].append(time.perf_counter() - started)
        for policy in ("uniform", "adaptive"):
            started = time.perf_counter()
            result = _sample(truth.path, policy)
            seconds[policy].append(time.perf_counter() - started)
            assert result.selection is not None
            chosen[policy] = result.selection.times
    spacing = float(np.diff(chosen["uniform"]).mean())
    return Outcome(
        case=item,
        events=len(truth.events),
        caught={policy: truth.caught(times) for policy, times in chosen.items()},
        gap=float(np.diff(chosen["adaptive"]).max()) / spacing,
        seconds={side: float(np.median(values)) for side, values in seconds.items()},
    )


def _stock(path: Path) -> None:
    from vllm.multimodal.video import VIDEO_LOADER_REGISTRY

    # Its frames are spread evenly, as those of ``uniform``.
    VIDEO_LOADER_REGISTRY.load("opencv").load_bytes(path.read_bytes(), num_frames=FRAMES)


def _sample(path: Path, policy: str) -> DecodeResult:
    spec = SamplingSpec(policy="adaptive" if policy == "adaptive" else "uniform", max_frames=FRAMES)
    return run_job(str(path), DecodeRequest(sampling=spec))


def _share(outcomes: Iterable[Outcome], policy: str) -> float:
    outcomes = list(outcomes)
    total = sum(outcome.events for outcome in outcomes)
    return sum(outcome.caught[policy] for outcome in outcomes) / max(1, total)
