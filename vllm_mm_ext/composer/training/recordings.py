"""Recordings of up to four hours with few short events, drawn from a seed. Pure numpy.

A recording is a chain of scenes like those of clips. Any window of it is a clip, so drawing,
encoding and training use the same code for both.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import TypeVar

import numpy as np

from vllm_mm_ext.composer.training.clips import (
    COLOURS,
    FLASH_S,
    SHAPES,
    TONE_S,
    Clip,
    Flash,
    Scene,
    Shape,
    ToneEvent,
    draw_scene,
    draw_tone,
    jittered,
)
from vllm_mm_ext.composer.training.note_language import (
    Asked,
    Entry,
    clip_entries,
    note_line,
    note_questions,
)
from vllm_mm_ext.composer.training.questions import Question

MIN_RECORDING_S, MAX_RECORDING_S = 10, 4 * 3600
MAX_FLASHES, MAX_TONES = 8, 6
SCENE_S = (5.0, 40.0)
# No two events are closer: what comes first can be told, whatever is counted.
_APART_S = 2.5
# Nothing short happens this close to a cut.
_MARGIN_S = 0.4
# A flash's colour is that of no object within so many seconds of it. More flashes within a longer
# span would leave scenes no colour.
_NEAR_S = 35.0
_MOST_NEAR = 4


_Event = TypeVar("_Event", Scene, Flash, ToneEvent)


@dataclass(frozen=True)
class Recording:
    """All that a recording shows and sounds.

    Attributes:
        seed: What it was drawn from, with the duration.
        duration: Whole seconds.
        scenes: In order, without gaps. Neighbours share neither shape nor colour.
        flashes: In order, each of a colour of its own, and within one whole second.
        tones: In order; None without a sound track.
        hiss: Amplitude of the noise under the tones.
    """

    seed: int
    duration: int
    scenes: tuple[Scene, ...]
    flashes: tuple[Flash, ...]
    tones: tuple[ToneEvent, ...] | None
    hiss: float

    def window(self, start: int, end: int) -> Clip:
        """A part of the recording as a clip; times count from its start.

        Scenes and tones keep their length, so the first one may begin before 0 and the last one end
        after the end.

        Args:
            start, end: Whole seconds.

        Raises:
            ValueError: The part is empty or not within the recording.
        """
        if not 0 <= start < end <= self.duration:
            raise ValueError(
                f"the window is {start} to {end}; it must lie within 0 to {self.duration}"
            )
        first = bisect_left(self.scenes, start + 1e-9, key=lambda scene: scene.end)
        last = bisect_left(self.scenes, float(end), key=lambda scene: scene.start)
        return Clip(
            seed=self.seed,
            duration=end - start,
            scenes=tuple(_earlier(scene, start) for scene in self.scenes[first:last]),
            flashes=tuple(
                _earlier(flash, start)
                for flash in self.flashes
                if flash.start < end and flash.end > start
            ),
            tones=None
            if self.tones is None
            else tuple(
                _earlier(tone, start)
                for tone in self.tones
                if tone.start < end and tone.end > start
            ),
            hiss=self.hiss,
        )

    def note(self, start: int, end: int) -> str:
        """The right note about a window; times count from its start."""
        return note_line(clip_entries(self.window(start, end)))

    def events(self) -> list[Entry]:
        """Flashes and tones as entries with times in the recording."""
        found = [Entry(int(flash.start), f"{flash.colour} flash") for flash in self.flashes]
        for tone in self.tones or ():
            shape = self._shape_at(tone.start)
            found.append(Entry(int(tone.start), f"{tone.pitch} tone {tone.glide}, {shape}"))
        return sorted(found)

    def _shape_at(self, second: float) -> Shape:
        index = bisect_left(self.scenes, second + 1e-9, key=lambda scene: scene.end)
        return self.scenes[index].shape

    def asked(self, rng: np.random.Generator) -> list[Asked]:
        """All questions about the whole recording, in random order and wording."""
        return note_questions(self.events(), rng)

    def questions(self, rng: np.random.Generator) -> list[Question]:
        """All questions about the whole recording, in random order and wording."""
        return [asked.question for asked in self.asked(rng)]


def _earlier(event: _Event, by: float) -> _Event:
    return replace(event, start=event.start - by, end=event.end - by)


def draw_recording(
    seed: int,
    duration: int,
    *,
    sound: bool = True,
    flashes: int | None = None,
    tones: int | None = None,
) -> Recording:
    """The recording of a seed. The same arguments always give the same recording.

    Args:
        seed: Any whole number.
        duration: Seconds, 10 to 14,400.
        sound: With a sound track.
        flashes: How many, 0 to 8; None: drawn. Those that find no place are left out.
        tones: How many, 0 to 6; None: drawn.

    Raises:
        ValueError: The duration is out of range.
    """
    if not MIN_RECORDING_S <= duration <= MAX_RECORDING_S:
        raise ValueError(
            f"duration is {duration}; it must be {MIN_RECORDING_S} to {MAX_RECORDING_S} seconds"
        )
    rng = np.random.default_rng((seed % (1 << 63), duration, sound, 7))
    cuts = _cuts(rng, duration)
    drawn = int(rng.integers(min(MAX_FLASHES, duration // 8) + 1))
    count = drawn if flashes is None else flashes
    colours = [str(colour) for colour in rng.permutation(list(COLOURS))][:count]
    lengths = [float(rng.uniform(*FLASH_S)) for _ in colours]
    # Whole within a second, so that no window on whole seconds cuts a flash.
    bright = _places(rng, cuts, [(0.15, 0.85 - length, length) for length in lengths], [])
    drawn = int(rng.integers(min(MAX_TONES, duration // 10) + 1))
    count = (drawn if tones is None else tones) if sound else 0
    lengths = [float(rng.uniform(*TONE_S)) for _ in range(count)]
    loud = _places(rng, cuts, [(0.2, 0.8, length) for length in lengths], bright)
    shown = tuple(
        Flash(colour, jittered(rng, COLOURS[colour], 14), start, end)
        for colour, (start, end) in zip(colours, bright, strict=False)
    )
    return Recording(
        seed=seed,
        duration=duration,
        scenes=_scenes(rng, cuts, shown),
        flashes=tuple(sorted(shown, key=lambda flash: flash.start)),
        tones=tuple(draw_tone(rng, start, end) for start, end in sorted(loud)) if sound else None,
        hiss=float(rng.choice((0.0, 10 ** rng.uniform(-4, -2)))),
    )


def _cuts(rng: np.random.Generator, duration: int) -> list[float]:
    """Start, cuts and end."""
    least, most = SCENE_S
    cuts = [0.0]
    while (left := duration - cuts[-1]) > 0:
        length = least + (most - least) * float(rng.beta(1.2, 2.4))
        if left - length < least:
            length = left if left <= most else left / 2
        cuts.append(round(cuts[-1] + length, 2) if length < left else float(duration))
    return cuts


def _places(
    rng: np.random.Generator,
    cuts: Sequence[float],
    wanted: Sequence[tuple[float, float, float]],
    taken: Sequence[tuple[float, float]],
) -> list[tuple[float, float]]:
    """Places for short events, in the order wanted: within one scene each, apart from others.

    Args:
        rng: Decides.
        cuts: Of the recording.
        wanted: Of each event: earliest and latest part of a second at which it begins, its length.
        taken: Places of other events.
    """
    found: list[tuple[float, float]] = []
    for earliest, latest, length in wanted:
        for _ in range(80):
            start = round(
                int(rng.integers(1, int(cuts[-1]) - 2)) + rng.uniform(earliest, latest), 3
            )
            end = round(start + length, 3)
            near = bisect_left(cuts, start - _MARGIN_S)
            if cuts[near] < end + _MARGIN_S:
                continue
            if any(end + _APART_S > s and e + _APART_S > start for s, e in (*found, *taken)):
                continue
            span = SCENE_S[1] + 2 * _NEAR_S
            if sum(abs(s - start) < span for s, _ in found) <= _MOST_NEAR:
                found.append((start, end))
                break
    return found


def _scenes(
    rng: np.random.Generator, cuts: Sequence[float], flashes: Sequence[Flash]
) -> tuple[Scene, ...]:
    found: list[Scene] = []
    for start, end in pairwise(cuts):
        near = {
            flash.colour
            for flash in flashes
            if flash.end > start - _NEAR_S and flash.start < end + _NEAR_S
        }
        if found:
            near.add(found[-1].colour)
        colours = [colour for colour in COLOURS if colour not in near]
        shapes = [shape for shape in SHAPES if not found or shape != found[-1].shape]
        colour = colours[int(rng.integers(len(colours)))]
        shape = shapes[int(rng.integers(len(shapes)))]
        found.append(draw_scene(rng, shape, colour, start, end))
    return tuple(found)
