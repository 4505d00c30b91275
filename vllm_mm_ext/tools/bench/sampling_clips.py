"""Clips with sub-second events for the ``sampling`` benchmark, drawn from a seed.

The sampler was designed on ``TUNING_SEEDS`` only. The benchmark measures on ``HELD_OUT_SEEDS``
and ``COLOUR_SEEDS``, which share no clip with them.
"""

from __future__ import annotations

import pickle
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from vllm_mm_ext.synthetic.scenes import (
    EVENT_KINDS,
    Event,
    EventKind,
    SceneName,
    random_events,
)
from vllm_mm_ext.testing.media import ClipTruth, make_clip

TUNING_SEEDS = range(48)
HELD_OUT_SEEDS = range(50_000, 50_032)
# Of clips whose events are as bright as what they hide.
COLOUR_SEEDS = range(60_000, 60_016)

SCENE_ORDER: tuple[SceneName, ...] = (
    "static",
    "talking_head",
    "fade",
    "noise",
    "flicker",
    "shapes",
    "cuts",
    "pan",
)
_GOPS = (30, 60, 120, 250, 500, 1000)


@dataclass(frozen=True)
class Case:
    """One clip to make: everything about it follows from ``seed``.

    Attributes:
        seed: Seed of the case and of the clip's pictures.
        scene: Background, by ``seed`` modulo the number of scenes.
        codec: FFmpeg encoder.
        gop: Most frames between keyframes, 30 to 1000.
        bframes: Most B frames in a row.
        duration: Seconds, 60 to 120.
        events: One to four events of 0.2 to 0.8 s.
        colour_only: Whether all of them are as bright as what they hide.
    """

    seed: int
    scene: SceneName
    codec: str
    gop: int
    bframes: int
    duration: float
    events: tuple[Event, ...]
    colour_only: bool


def case(seed: int, *, colour_only: bool = False) -> Case:
    """The case of a seed: codec, GOP, length and events are drawn from it.

    Args:
        seed: Any.
        colour_only: Whether the events are as bright as what they hide.
    """
    rng = np.random.default_rng([seed, 7])
    duration = float(rng.integers(60, 121))
    kinds: list[EventKind] = [
        EVENT_KINDS[int(k)] for k in rng.integers(0, len(EVENT_KINDS), int(rng.integers(1, 5)))
    ]
    return Case(
        seed=seed,
        scene=SCENE_ORDER[seed % len(SCENE_ORDER)],
        codec="mpeg4" if rng.random() < 0.35 else "libx264",
        gop=int(rng.choice(_GOPS)),
        bframes=int(rng.integers(0, 4)),
        duration=duration,
        events=tuple(
            replace(event, colour_only=colour_only)
            for event in random_events(seed, duration, kinds)
        ),
        colour_only=colour_only,
    )


def build(item: Case, directory: Path, *, width: int, height: int) -> ClipTruth:
    """Make the clip of a case, or reuse the one made before in ``directory``."""
    colours = "-colours" if item.colour_only else ""
    path = directory / f"sampling-{item.seed}{colours}-{width}x{height}.mp4"
    known = path.with_suffix(".truth")
    if known.exists():
        truth: ClipTruth = pickle.loads(known.read_bytes())
        return truth
    truth = make_clip(
        path,
        width=width,
        height=height,
        duration=item.duration,
        codec=item.codec,
        gop=item.gop,
        bframes=item.bframes,
        scene=item.scene,
        events=item.events,
        seed=item.seed,
        quality=26,
        preset="superfast" if item.scene == "noise" else "veryfast",
    )
    known.write_bytes(pickle.dumps(truth))
    return truth
