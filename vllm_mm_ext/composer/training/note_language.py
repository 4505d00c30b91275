"""The language of notes about a window, and questions that such notes answer. Pure Python.

A note is one line of entries in order of time, joined by ``; ``::

    [0] red circle left; [9] green bar still; [12] blue flash; [20] high tone rise, bar

``[S]`` is whole seconds from the start of the window. Notes about a longer recording have the time
in the recording instead, ``[0:28:52] blue flash``.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from typing import Literal, NamedTuple

import numpy as np

from vllm_mm_ext.composer.training.clips import Clip, Motion, Scene
from vllm_mm_ext.composer.training.questions import (
    WORDINGS,
    Question,
    ordinals,
    seen,
    tone_name,
    tone_names,
)

NOTE_PROMPT = "Note what happens."
RELEVANCE_PROMPT = "{question} Is it here?"
SELECT_PROMPT = "What matters for: {question}"
NOTHING = "none"
"""The reply to `SELECT_PROMPT` where no entry matters."""

RECORDING_TASKS = (
    "when",
    "flash_colour",
    "flash_count",
    "tone_count",
    "before",
    "on_screen",
    "pitch",
    "glide",
)
"""Tasks of `note_questions`. Answers to ``when`` are ``h:mm:ss``."""

# What a window shows for less is left to the window before or after.
_LEAST_SCENE_S = 1.0
# An object that is seen to move by less, in widths of the picture, stands for whoever looks.
_LEAST_SHIFT = 0.06
# Events are told apart in time from so many whole seconds on.
_APART_S = 2
_ENTRY = re.compile(r"\[(?:(\d+):(\d\d):)?(\d+)\] ([^;\n\[\]]+)")


@dataclass(frozen=True, order=True)
class Entry:
    """One thing that a note tells.

    Attributes:
        second: Whole second at which it begins, from the start of the window or the recording.
        text: ``red circle left``, ``blue flash`` or ``high tone rise, bar``.
    """

    second: int
    text: str

    @property
    def kind(self) -> Literal["scene", "flash", "tone"]:
        """What it tells of."""
        if self.text.endswith(" flash"):
            return "flash"
        return "tone" if " tone " in self.text else "scene"

    def at(self, offset: int) -> Entry:
        """The entry as told from another start, ``offset`` seconds before this one."""
        return replace(self, second=self.second + offset)


class Asked(NamedTuple):
    """A question and what it is about.

    Attributes:
        question: With the answer that the notes give.
        about: Kinds (``flash``, ``tone``) and texts (``blue flash``) of entries that decide it.
    """

    question: Question
    about: frozenset[str]

    def needs(self, entry: Entry) -> bool:
        """Whether the answer depends on an entry."""
        return entry.kind in self.about or entry.text in self.about


def clip_entries(clip: Clip, seconds: Sequence[float] | None = None) -> list[Entry]:
    """What a note about a clip tells, in order.

    A scene that has begun before the clip begins at 0. A tone is told if all of it sounds within
    the clip. Motion is what is seen of it: what moves slowly out of a long scene stands.

    Args:
        clip: A clip, or a window of a recording.
        seconds: Times of the frames seen; None: all of them.
    """
    times = None if seconds is None else np.asarray(seconds)
    found: list[tuple[float, str]] = []
    for scene in clip.scenes:
        first, last = max(scene.start, 0.0), min(scene.end, float(clip.duration))
        if last - first < _LEAST_SCENE_S:
            continue
        if times is not None:
            inside = times[(times >= first) & (times < last)]
            if not len(inside):
                continue
            first, last = (float(inside[0]) if scene.start > 0 else 0.0), float(inside[-1])
        motion = _motion_seen(scene, first, last)
        found.append((first, f"{scene.colour} {scene.shape} {motion}"))
    for flash in clip.flashes:
        if flash.start >= 0 and seen(flash, times):
            found.append((flash.start, f"{flash.colour} flash"))
    for tone in clip.tones or ():
        if tone.start >= 0 and tone.end <= clip.duration:
            shape = clip.scene_at(tone.start).shape
            found.append((tone.start, f"{tone.pitch} tone {tone.glide}, {shape}"))
    return [Entry(int(start), text) for start, text in sorted(found)]


def _motion_seen(scene: Scene, first: float, last: float) -> Motion:
    shift = 0.52 * (last - first) / (scene.end - scene.start)
    return scene.motion if shift >= _LEAST_SHIFT else "still"


def note_line(entries: Iterable[Entry]) -> str:
    """The note about a window; ``none`` for no entries."""
    return "; ".join(f"[{entry.second}] {entry.text}" for entry in entries) or NOTHING


def recording_line(entries: Iterable[Entry]) -> str:
    """Entries with their times in the recording; ``none`` for no entries."""
    return "; ".join(f"[{clock(entry.second)}] {entry.text}" for entry in entries) or NOTHING


def read_entries(text: str) -> list[Entry]:
    """The entries of notes of either kind; what has another form is left out."""
    return [entry for entry, _ in entry_ends(text)]


def entry_ends(text: str) -> list[tuple[Entry, int]]:
    """The entries of notes, and where in the text each ends."""
    found = []
    for match in _ENTRY.finditer(text):
        hour, minute, second = (int(part or 0) for part in match.groups()[:3])
        told = match[4].rstrip()
        entry = Entry(hour * 3600 + minute * 60 + second, told.strip())
        found.append((entry, match.start(4) + len(told)))
    return found


def clock(second: int) -> str:
    """``h:mm:ss``."""
    return f"{second // 3600}:{second // 60 % 60:02}:{second % 60:02}"


def note_questions(entries: Iterable[Entry], rng: np.random.Generator) -> list[Asked]:
    """All questions that entries answer, in random order and wording.

    Args:
        entries: With times in the recording. The same entry twice, as of windows that overlap, is
            one event.
        rng: Decides.
    """
    events = sorted(set(entries))
    flashes = [entry for entry in events if entry.kind == "flash"]
    tones = [entry for entry in events if entry.kind == "tone"]
    found = [
        Asked(Question(task, text.format(*names), answer), about)
        for task, wording, names, about, answer in (
            *_about_flashes(flashes),
            *_about_tones(tones),
            *_about_order(flashes, tones),
        )
        for text in (WORDINGS[wording][int(rng.integers(len(WORDINGS[wording])))],)
    ]
    return [found[int(index)] for index in rng.permutation(len(found))]


_Found = Iterator[tuple[str, str, tuple[str, ...], frozenset[str], str]]
_FLASHES, _TONES = frozenset({"flash"}), frozenset({"tone"})


def _about_flashes(flashes: Sequence[Entry]) -> _Found:
    for flash in flashes:
        yield "when", "when", (flash.text,), frozenset({flash.text}), clock(flash.second)
    yield "flash_count", "flash_count", (), _FLASHES, str(len(flashes))
    if len(flashes) == 1:
        yield "flash_colour", "only_flash", (), _FLASHES, flashes[0].text.split()[0]
    for name, index in ordinals(len(flashes)):
        colour = flashes[index].text.split()[0]
        yield "flash_colour", "flash_colour", (f"{name} flash",), _FLASHES, colour


def _about_tones(tones: Sequence[Entry]) -> _Found:
    yield "tone_count", "tone_count", (), _TONES, str(len(tones))
    for ordinal, index in tone_names(len(tones)):
        pitch, _, glide, shape = tones[index].text.replace(",", "").split()
        name = (tone_name(ordinal),)
        yield "on_screen", "shape_heard", name, _TONES, shape
        yield "pitch", "pitch", name, _TONES, pitch
        yield "glide", "glide", name, _TONES, glide


def _about_order(flashes: Sequence[Entry], tones: Sequence[Entry]) -> _Found:
    named = [(flash.text, frozenset({flash.text}), flash.second) for flash in flashes]
    heard = [(tone_name(name), _TONES, tones[i].second) for name, i in tone_names(len(tones))]
    pairs = [*combinations(named, 2), *((tone, flash) for tone in heard for flash in named)]
    for pair in pairs:
        (first, one, start), (second, other, later) = sorted(pair, key=lambda event: event[2])
        if later - start >= _APART_S:
            yield "before", "before", (first, second), one | other, "yes"
            yield "before", "before", (second, first), one | other, "no"
