"""Questions about a clip with their answers, in several wordings. Pure Python."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations, pairwise
from string import Formatter
from typing import Literal, NamedTuple, get_args

import numpy as np

from vllm_mm_ext.composer.training.clips import Clip, Flash, Scene, ToneEvent

Task = Literal[
    "colour",
    "shape",
    "motion",
    "flash_count",
    "flash_time",
    "flash_colour",
    "order",
    "before",
    "tone_count",
    "pitch",
    "glide",
    "on_screen",
]
TASKS: tuple[Task, ...] = get_args(Task)
SHORT_EVENT_TASKS: tuple[Task, ...] = ("flash_count", "flash_time", "flash_colour")
"""Tasks that need a frame within each flash."""

# Up to this length of a clip, times are asked for in whole seconds, above it in tens of seconds.
WHOLE_SECONDS_UP_TO = 20

WORDINGS: dict[str, tuple[str, ...]] = {
    "colour": (
        "What colour is the {0}?",
        "Which colour does the {0} have?",
        "Tell me the colour of the {0}.",
        "The {0} is what colour?",
        "Name the colour of the {0}.",
    ),
    "shape": (
        "What shape is the {0} object?",
        "Which shape is {0}?",
        "Name the {0} shape.",
        "Tell me the shape of the {0} object.",
        "The {0} object has what shape?",
    ),
    "only_shape": (
        "What shape is shown?",
        "Which shape is on screen?",
        "Name the shape in the video.",
        "What shape can be seen?",
    ),
    "motion": (
        "Which way does the {0} move?",
        "In which direction does the {0} go?",
        "Where does the {0} move to?",
        "Tell me the direction of the {0}.",
        "How does the {0} move?",
    ),
    "flash_count": (
        "How many flashes are there?",
        "How often does the screen flash?",
        "Count the flashes.",
        "How many times does the picture flash?",
        "What is the number of flashes?",
    ),
    "flash_second": (
        "At which second is the {0}?",
        "When is the {0} seen, in whole seconds?",
        "In which second does the {0} come?",
        "Tell me the second of the {0}.",
    ),
    "flash_tens": (
        "In which ten seconds is the {0}?",
        "Between which tens of seconds is the {0}?",
        "Which ten seconds of the video have the {0}?",
    ),
    "when": (
        "When is the {0}?",
        "At what time is the {0}?",
        "When does the {0} come?",
        "Tell me the time of the {0}.",
    ),
    "only_flash": (
        "What colour is the flash?",
        "Which colour does the screen flash?",
        "Name the colour of the flash.",
    ),
    "flash_colour": (
        "What colour is the {0}?",
        "Which colour does the {0} have?",
        "Name the colour of the {0}.",
        "The {0} is what colour?",
    ),
    "end_shape": (
        "Which shape comes {0}?",
        "What shape is shown {0}?",
        "Name the shape that appears {0}.",
    ),
    "next_shape": (
        "Which shape comes right after the {0}?",
        "What shape follows the {0}?",
        "What is shown next after the {0}?",
    ),
    "all_shapes": (
        "In which order do the shapes appear?",
        "List the shapes in order.",
        "Name all shapes in the order they are shown.",
    ),
    "before": (
        "Does the {0} come before the {1}?",
        "Is the {0} before the {1}?",
        "Does the {0} appear earlier than the {1}?",
        "Did the {0} happen before the {1}?",
    ),
    "tone_count": (
        "How many tones are heard?",
        "Count the tones.",
        "How many tones are there?",
        "How often does a tone sound?",
        "What is the number of tones?",
    ),
    "pitch": (
        "Is the {0} high or low?",
        "What pitch does the {0} have, high or low?",
        "Does the {0} sound high or low?",
        "Tell me the pitch of the {0}.",
    ),
    "glide": (
        "Does the {0} rise, fall or stay level?",
        "How does the {0} change, rise, fall or level?",
        "Is the {0} rising, falling or level?",
        "Does the pitch of the {0} rise, fall or stay level?",
    ),
    "shape_heard": (
        "Which shape is on screen when the {0} sounds?",
        "What shape is shown during the {0}?",
        "When the {0} is heard, which shape is seen?",
    ),
    "colour_heard": (
        "Which colour is the object on screen when the {0} sounds?",
        "What colour is shown during the {0}?",
        "When the {0} is heard, which colour is the object?",
    ),
}


Thing = Scene | Flash | ToneEvent


class Reference(NamedTuple):
    """A name in a question, ``text[start:end]``, and what of the clip it means."""

    start: int
    end: int
    thing: Thing


@dataclass(frozen=True)
class Question:
    """One question with the one right answer; ``task`` is one of `TASKS` where it was generated."""

    task: str
    text: str
    answer: str
    references: tuple[Reference, ...] = ()


def normalised(answer: str) -> str:
    """An answer as it is compared: lower case, without outer blanks and a final full stop."""
    return answer.strip().lower().removesuffix(".").strip()


def questions(
    clip: Clip, rng: np.random.Generator, seconds: Sequence[float] | None = None
) -> list[Question]:
    """All questions about a clip that its frames decide, in random order and wording.

    Args:
        clip: What is asked about.
        rng: Decides wordings and order.
        seconds: Times of the frames seen; None: all of them, so that everything is decided.
    """
    times = None if seconds is None else np.asarray(seconds)
    found = [
        _worded(rng, task, wording, names, answer)
        for task, wording, names, answer in (
            *_about_scenes(clip, times),
            *_about_flashes(clip, times),
            *_about_order(clip, times),
            *_about_tones(clip, times),
        )
    ]
    return [found[int(index)] for index in rng.permutation(len(found))]


_Name = tuple[str, Thing]
_Asked = Iterator[tuple[Task, str, tuple[_Name, ...], str]]
_Times = np.ndarray[tuple[int], np.dtype[np.float64]] | None


def _worded(
    rng: np.random.Generator, task: Task, wording: str, names: tuple[_Name, ...], answer: str
) -> Question:
    texts = WORDINGS[wording]
    text, references = "", []
    for part, place, _, _ in Formatter().parse(texts[int(rng.integers(len(texts)))]):
        text += part
        if place is not None:
            name, thing = names[int(place)]
            references.append(Reference(len(text), len(text) + len(name), thing))
            text += name
    return Question(task, text, answer, tuple(references))


def _about_scenes(clip: Clip, times: _Times) -> _Asked:
    for scene in clip.scenes:
        if not seen(scene, times):
            continue
        names = [scene.shape, f"{scene.colour} object"]
        if len(clip.scenes) == 1:
            names.append("object")
            yield "colour", "colour", (("object", scene),), scene.colour
            yield "shape", "only_shape", (), scene.shape
        yield "colour", "colour", ((scene.shape, scene),), scene.colour
        yield "shape", "shape", ((scene.colour, scene),), scene.shape
        if path_seen(scene, times):
            for name in names:
                yield "motion", "motion", ((name, scene),), scene.motion


def _about_flashes(clip: Clip, times: _Times) -> _Asked:
    shown = [flash for flash in clip.flashes if seen(flash, times)]
    for flash in shown:
        name = (f"{flash.colour} flash", flash)
        if clip.duration <= WHOLE_SECONDS_UP_TO:
            yield "flash_time", "flash_second", (name,), str(int(flash.start))
        else:
            tens = int(flash.start // 10) * 10
            yield "flash_time", "flash_tens", (name,), f"{tens} to {tens + 10}"
    if len(shown) < len(clip.flashes):
        return
    yield "flash_count", "flash_count", (), str(len(shown))
    if len(shown) == 1:
        yield "flash_colour", "only_flash", (), shown[0].colour
    for ordinal, index in ordinals(len(shown)):
        flash = shown[index]
        yield "flash_colour", "flash_colour", ((f"{ordinal} flash", flash),), flash.colour


def _about_order(clip: Clip, times: _Times) -> _Asked:
    scenes = clip.scenes
    if len(scenes) > 1 and all(seen(scene, times) for scene in scenes):
        yield "order", "end_shape", (("first", scenes[0]),), scenes[0].shape
        yield "order", "end_shape", (("last", scenes[-1]),), scenes[-1].shape
        yield "order", "all_shapes", (), ", ".join(scene.shape for scene in scenes)
        for scene, following in pairwise(scenes):
            yield "order", "next_shape", ((scene.shape, scene),), following.shape
    shown: list[_Name] = [(scene.shape, scene) for scene in scenes if seen(scene, times)]
    flashes: list[_Name] = [(f"{f.colour} flash", f) for f in clip.flashes if seen(f, times)]
    tones = clip.tones or ()
    sounds: list[_Name] = [(tone_name(n), tones[index]) for n, index in tone_names(len(tones))]
    pairs = [*combinations(shown, 2), *combinations(flashes, 2)]
    # A tone and a flash far enough apart to be told apart from a token of sound.
    pairs += [(s, f) for s in sounds for f in flashes if abs(s[1].start - f[1].start) > 1.5]
    for one, other in pairs:
        first, second = (one, other) if one[1].start < other[1].start else (other, one)
        yield "before", "before", (first, second), "yes"
        yield "before", "before", (second, first), "no"


def _about_tones(clip: Clip, times: _Times) -> _Asked:
    tones = clip.tones or ()
    yield "tone_count", "tone_count", (), str(len(tones))
    for ordinal, index in tone_names(len(tones)):
        tone = tones[index]
        name = (tone_name(ordinal), tone)
        yield "pitch", "pitch", (name,), tone.pitch
        yield "glide", "glide", (name,), tone.glide
        scene = clip.scene_at(tone.start)
        if len(clip.scenes) > 1 and known_at(scene, tone.start, times):
            yield "on_screen", "shape_heard", (name,), scene.shape
            yield "on_screen", "colour_heard", (name,), scene.colour


def tone_names(count: int) -> list[tuple[str, int]]:
    """Ordinals for `tone_name`, with indices; the only tone needs none."""
    return [("", 0)] if count == 1 else ordinals(count)


def ordinals(count: int) -> list[tuple[str, int]]:
    """Words for some of several things in order, with their indices; none for a single one."""
    if count < 2:
        return []
    middle = ("second", "third")[: count - 2]
    return [("first", 0), *((name, i + 1) for i, name in enumerate(middle)), ("last", count - 1)]


def tone_name(ordinal: str) -> str:
    """What a tone is called: ``first tone``, or ``tone`` where there is only one."""
    return f"{ordinal} tone".strip()


def seen(span: Scene | Flash, times: _Times) -> bool:
    """A frame shows a scene or a flash.

    Args:
        span: Of the clip.
        times: Of the frames seen; None: all of them.
    """
    # Half a frame of a 20 fps clip from both edges.
    return times is None or bool(((times > span.start) & (times < span.end - 0.02)).any())


def known_at(scene: Scene, second: float, times: _Times) -> bool:
    """The frames around a second tell that a scene is on screen then.

    Args:
        scene: The one that is.
        second: Within it.
        times: Of the frames seen; None: all of them.
    """
    if times is None:
        return True
    around = [*times[times <= second][-1:], *times[times >= second][:1]]
    return seen(scene, times) and all(scene.start <= time < scene.end for time in around)


def path_seen(scene: Scene, times: _Times) -> bool:
    """Enough of the scene lies between its first and last frame to tell where things move.

    Args:
        scene: Of the clip.
        times: Of the frames seen; None: all of them.
    """
    if times is None:
        return True
    inside = times[(times > scene.start) & (times < scene.end - 0.02)]
    if len(inside) < 2:
        return False
    return bool(inside[-1] - inside[0] >= 0.35 * (scene.end - scene.start))
