"""What happens in a synthetic clip: scenes, flashes and tones, drawn from a seed. Pure numpy."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np

Shape = Literal["circle", "bar", "triangle", "cross", "ring"]
Motion = Literal["left", "right", "up", "down", "still"]
Pitch = Literal["high", "low"]
Glide = Literal["rise", "fall", "level"]

SHAPES: tuple[Shape, ...] = ("circle", "bar", "triangle", "cross", "ring")
MOTIONS: tuple[Motion, ...] = ("left", "right", "up", "down", "still")
PITCHES: tuple[Pitch, ...] = ("high", "low")
GLIDES: tuple[Glide, ...] = ("rise", "fall", "level")
COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (220, 30, 30),
    "green": (30, 175, 50),
    "blue": (40, 70, 230),
    "yellow": (240, 225, 40),
    "purple": (165, 50, 200),
    "orange": (245, 130, 20),
    "white": (240, 240, 240),
    "cyan": (60, 215, 225),
}

MIN_DURATION_S, MAX_DURATION_S = 4, 120
# Short enough to fall between the frames of even sampling at 2 fps, long enough for four frames of
# a 20 fps clip.
FLASH_S = (0.2, 0.5)
TONE_S = (0.6, 1.2)
_FLASH_APART_S = 1.2
_TONE_APART_S = 0.6
# Nothing short happens this close to a cut or an end of the clip.
_MARGIN_S = 0.4
_MIN_SCENE_S = 1.8
_HZ: dict[Pitch, tuple[float, float]] = {"low": (220.0, 400.0), "high": (1000.0, 1900.0)}
# A glide ends this much above where it began.
_GLIDE_RATIO = 1.8
_MAX_SCENES, _MAX_FLASHES, _MAX_TONES = 4, 4, 4


@dataclass(frozen=True)
class Scene:
    """One object on a plain background, from ``start`` to ``end`` seconds.

    Attributes:
        shape, colour, motion: Of the object. It crosses the picture once, evenly, or stands.
        start, end: Seconds.
        rgb: Its exact colour.
        radius: Half its size, in heights of the picture.
        across: Where it is across its direction of motion, 0 to 1 of the picture.
        along: Where it stands on the other axis, if it stands.
        background: Exact colour behind it.
    """

    shape: Shape
    colour: str
    motion: Motion
    start: float
    end: float
    rgb: tuple[int, int, int]
    radius: float
    across: float
    along: float
    background: tuple[int, int, int]


@dataclass(frozen=True)
class Flash:
    """The background takes another colour from ``start`` to ``end`` seconds."""

    colour: str
    rgb: tuple[int, int, int]
    start: float
    end: float


@dataclass(frozen=True)
class ToneEvent:
    """A tone from ``start`` to ``end`` seconds that glides from ``hz[0]`` to ``hz[1]``."""

    pitch: Pitch
    glide: Glide
    start: float
    end: float
    hz: tuple[float, float]
    amplitude: float


@dataclass(frozen=True)
class Clip:
    """All that a clip shows and sounds.

    Attributes:
        seed: What it was drawn from, with the duration.
        duration: Whole seconds.
        scenes: In order, without gaps. No two share a shape or a colour.
        flashes: In order. Each has a colour of its own, that of no object.
        tones: In order, none overlapping; None for a clip without a sound track.
        hiss: Amplitude of the noise under the tones.
    """

    seed: int
    duration: int
    scenes: tuple[Scene, ...]
    flashes: tuple[Flash, ...]
    tones: tuple[ToneEvent, ...] | None
    hiss: float

    @property
    def has_sound(self) -> bool:
        """There is a sound track, be it silent."""
        return self.tones is not None

    def scene_at(self, second: float) -> Scene:
        """The scene on screen at a time."""
        return next((scene for scene in self.scenes if second < scene.end), self.scenes[-1])

    def flash_at(self, second: float) -> Flash | None:
        """The flash on screen at a time, if any."""
        return next((f for f in self.flashes if f.start <= second < f.end), None)


def draw_clip(seed: int, duration: int, sound: bool = True) -> Clip:
    """The clip of a seed. The same arguments always give the same clip.

    Args:
        seed: Any whole number.
        duration: Seconds, 4 to 120.
        sound: With a sound track.

    Raises:
        ValueError: The duration is out of range.
    """
    if not MIN_DURATION_S <= duration <= MAX_DURATION_S:
        raise ValueError(
            f"duration is {duration}; it must be {MIN_DURATION_S} to {MAX_DURATION_S} seconds"
        )
    rng = np.random.default_rng((seed % (1 << 63), duration, sound))
    most = min(_MAX_SCENES, int(duration / (1.3 * _MIN_SCENE_S)))
    weights = np.array((0.25, 0.3, 0.3, 0.15))[:most]
    scenes = int(rng.choice(most, p=weights / weights.sum())) + 1
    colours = [str(c) for c in rng.permutation(list(COLOURS))]
    cuts = _cuts(rng, duration, scenes)
    most = min(_MAX_FLASHES, len(COLOURS) - scenes, int((duration - 1) / 1.7))
    weights = np.array((0.2, 0.25, 0.25, 0.15, 0.15))[: most + 1]
    flashes = int(rng.choice(most + 1, p=weights / weights.sum()))
    return Clip(
        seed=seed,
        duration=duration,
        scenes=_scenes(rng, cuts, colours[:scenes]),
        flashes=_flashes(rng, cuts, colours[scenes : scenes + flashes]),
        tones=_tones(rng, cuts) if sound else None,
        hiss=float(rng.choice((0.0, 10 ** rng.uniform(-4, -2)))),
    )


def _cuts(rng: np.random.Generator, duration: int, scenes: int) -> list[float]:
    """Start, cuts and end: scenes of random length, none too short."""
    shares = rng.dirichlet(np.full(scenes, 4.0))
    lengths = _MIN_SCENE_S + shares * (duration - scenes * _MIN_SCENE_S)
    edges = np.concatenate(([0.0], np.cumsum(lengths)))
    return [round(float(edge), 2) for edge in edges[:-1]] + [float(duration)]


def _scenes(rng: np.random.Generator, cuts: list[float], colours: list[str]) -> tuple[Scene, ...]:
    shapes = rng.permutation(len(SHAPES))
    return tuple(
        draw_scene(rng, SHAPES[shapes[index]], colour, start, end)
        for index, (start, end, colour) in enumerate(zip(cuts[:-1], cuts[1:], colours, strict=True))
    )


def draw_scene(
    rng: np.random.Generator, shape: Shape, colour: str, start: float, end: float
) -> Scene:
    """A scene of some shape and colour, with all else drawn."""
    level = rng.uniform(15, 115)
    radius = float(rng.uniform(0.19, 0.27))
    return Scene(
        shape=shape,
        colour=colour,
        motion=MOTIONS[int(rng.integers(len(MOTIONS)))],
        start=start,
        end=end,
        rgb=jittered(rng, COLOURS[colour], 14),
        radius=radius,
        across=float(rng.uniform(radius + 0.03, 0.97 - radius)),
        along=float(rng.uniform(radius + 0.03, 0.97 - radius)),
        background=jittered(rng, (level, level, level), 8),
    )


def _flashes(rng: np.random.Generator, cuts: list[float], colours: list[str]) -> tuple[Flash, ...]:
    lengths = [float(rng.uniform(*FLASH_S)) for _ in colours]
    spans = _spans(rng, cuts, lengths, _FLASH_APART_S, within_second=True)
    return tuple(
        Flash(colour, jittered(rng, COLOURS[colour], 14), start, end)
        for colour, (start, end) in zip(colours, spans, strict=False)
    )


def _tones(rng: np.random.Generator, cuts: list[float]) -> tuple[ToneEvent, ...]:
    most = min(_MAX_TONES, int((cuts[-1] - 1) / 2))
    weights = np.array((0.12, 0.28, 0.25, 0.2, 0.15))[: most + 1]
    count = int(rng.choice(most + 1, p=weights / weights.sum()))
    lengths = [float(rng.uniform(*TONE_S)) for _ in range(count)]
    spans = _spans(rng, cuts, lengths, _TONE_APART_S, within_second=False)
    return tuple(draw_tone(rng, start, end) for start, end in spans)


def draw_tone(rng: np.random.Generator, start: float, end: float) -> ToneEvent:
    """A tone of some span, with all else drawn."""
    pitch = PITCHES[int(rng.integers(2))]
    glide = GLIDES[int(rng.integers(3))]
    middle = float(np.exp(rng.uniform(*np.log(_HZ[pitch]))))
    half = _GLIDE_RATIO**0.5 if glide != "level" else 1.0
    hz = (middle / half, middle * half)
    return ToneEvent(
        pitch=pitch,
        glide=glide,
        start=start,
        end=end,
        hz=hz if glide != "fall" else hz[::-1],
        amplitude=float(rng.uniform(0.15, 0.5)),
    )


def _spans(
    rng: np.random.Generator,
    cuts: list[float],
    lengths: list[float],
    apart: float,
    within_second: bool,
) -> list[tuple[float, float]]:
    """Places for short events, in order: within one scene each, ``apart`` seconds apart.

    Those that find no place after many tries are left out.
    """
    found: list[tuple[float, float]] = []
    for length in lengths:
        for _ in range(60):
            if within_second:
                second = int(rng.integers(0, round(cuts[-1])))
                start = second + float(rng.uniform(0.15, 0.85 - length))
            else:
                start = float(rng.uniform(_MARGIN_S, cuts[-1] - length - _MARGIN_S))
            end = start + length
            near_cut = any(start - _MARGIN_S < cut < end + _MARGIN_S for cut in cuts)
            if not near_cut and all(end + apart < s or e + apart < start for s, e in found):
                found.append((round(start, 3), round(end, 3)))
                break
    return sorted(found)


def jittered(
    rng: np.random.Generator, rgb: tuple[float, float, float], by: float
) -> tuple[int, int, int]:
    """A colour near another: each part moved by at most ``by``."""
    red, green, blue = (int(np.clip(round(c + rng.uniform(-by, by)), 0, 255)) for c in rgb)
    return red, green, blue
