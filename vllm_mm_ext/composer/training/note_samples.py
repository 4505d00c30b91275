"""Samples that teach notes: about windows of recordings, and from lines of notes alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise

import numpy as np

from vllm_mm_ext.composer.training.clips import COLOURS, GLIDES, PITCHES, SHAPES, Clip
from vllm_mm_ext.composer.training.frame_times import pick_seconds
from vllm_mm_ext.composer.training.note_language import (
    NOTE_PROMPT,
    RELEVANCE_PROMPT,
    SELECT_PROMPT,
    Asked,
    Entry,
    clip_entries,
    note_line,
    note_questions,
    recording_line,
)
from vllm_mm_ext.composer.training.questions import WORDINGS, Question
from vllm_mm_ext.composer.training.recordings import (
    MAX_FLASHES,
    MAX_RECORDING_S,
    MAX_TONES,
    Recording,
    draw_recording,
)
from vllm_mm_ext.composer.training.samples import (
    Sample,
    balanced,
    heard_sound,
    seen_frames,
)

WINDOW_S, STRIDE_S = 30, 28
# With fewer frames a note would be a guess.
_LEAST_NOTED = 16
# Share of notes that were sorted out before.
_SELECTED = 0.45
# Questions about all that happens or is shown, the share of notes of which they are asked, and how
# many entries these may have.
_WHOLE = (
    *((text, frozenset({"scene"})) for text in WORDINGS["all_shapes"]),
    *(
        (text, frozenset({"scene", "flash", "tone"}))
        for text in ("What happens?", "Describe the video.", "What is seen and heard?")
    ),
)
_ABOUT_ALL, _MOST_COPIED = 0.6, 20
_WEIGHTS = {"when": 3.0, "flash_count": 2.0, "tone_count": 2.0, "before": 2.0, "on_screen": 2.0}


def window_sample(
    seed: int, frames: int, turns: int, size: int, *, sound: bool = True, augment: bool = True
) -> Sample:
    """A window of a recording, with its note and questions whether something is to be seen in it.

    Args:
        seed: Decides the recording, the window, its frames and what is asked.
        frames: How many frames are seen. With fewer than 16 no note is asked.
        turns: Questions at most.
        size: Width and height of the frames.
        sound: The recording has a sound track.
        augment: As a codec might leave it.
    """
    rng = np.random.default_rng((seed % (1 << 63), frames, turns, 11))
    duration = WINDOW_S if rng.random() < 0.7 else int(rng.integers(8, WINDOW_S))
    # More events than in a recording of hours, so that windows hold some.
    recording = draw_recording(
        seed,
        int(rng.integers(duration + 2, duration + 90)),
        sound=sound,
        flashes=int(rng.integers(4)),
        tones=int(rng.integers(4)),
    )
    start = int(rng.integers(recording.duration - duration + 1))
    if rng.random() < 0.25:
        start = 0
    clip = recording.window(start, start + duration)
    seconds = pick_seconds(clip, min(frames, 10 * duration), rng)
    asked = relevance_turns(clip, seconds, turns - 1, rng)
    if frames >= _LEAST_NOTED:
        asked = [_note_turn(clip, seconds, rng), *asked]
    return Sample(
        frames=seen_frames(clip, seconds, size, rng if augment else None),
        seconds=seconds,
        sound=heard_sound(clip, rng if augment else None),
        turns=asked,
        independent=True,
    )


def with_note(sample: Sample, rng: np.random.Generator, turns: int) -> Sample:
    """A sample of a clip that is asked for a note, and for what is in it, as well.

    Args:
        sample: Of a generated clip.
        rng: Decides.
        turns: Questions more, at most.
    """
    assert sample.clip is not None
    more = relevance_turns(sample.clip, sample.seconds, turns - 1, rng)
    if len(sample.seconds) >= _LEAST_NOTED:
        more.append(_note_turn(sample.clip, sample.seconds, rng))
    return replace(sample, turns=[*sample.turns, *more])


def _note_turn(clip: Clip, seconds: Sequence[float], rng: np.random.Generator) -> Question:
    """The note, at times with the notes of the two windows before, as `rolling` asks for it."""
    note = note_line(clip_entries(clip, seconds))
    if rng.random() < 0.75:
        return Question("note", NOTE_PROMPT, note)
    first = STRIDE_S * int(rng.integers(2, MAX_RECORDING_S // STRIDE_S))
    before = draw_recording(int(rng.integers(1 << 40)), STRIDE_S + WINDOW_S)
    told = window_entries(before, first - 2 * STRIDE_S)[: int(rng.integers(1, 3))]
    lines = [recording_line(entries) for entries in told if entries]
    return Question("note_after", "\n".join([*lines, NOTE_PROMPT]), note)


def relevance_turns(
    clip: Clip, seconds: Sequence[float], turns: int, rng: np.random.Generator
) -> list[Question]:
    """Questions about a longer recording, each with whether the clip shows what decides them.

    Half of them it does, if it shows anything. What frames do not decide is not asked.

    Args:
        clip: A window of the recording.
        seconds: Times of its frames.
        turns: How many at most.
        rng: Decides.
    """
    shown = clip_entries(clip, seconds)
    there = [*clip_entries(clip), *(Entry(0, "a tone") for _ in clip.tones or ())]
    elsewhere = invented_events(rng)
    pool = note_questions([*shown, *elsewhere], rng) + note_questions(elsewhere, rng)
    yes = [one for one in pool if any(map(one.needs, shown))]
    no = [one for one in pool if not any(map(one.needs, [*shown, *there]))]
    found = [
        *(_relevance(one, "yes") for one in balanced_asked(yes, turns // 2, rng)),
        *(_relevance(one, "no") for one in balanced_asked(no, turns - turns // 2, rng)),
    ]
    return [found[int(index)] for index in rng.permutation(len(found))]


def _relevance(asked: Asked, answer: str) -> Question:
    text = RELEVANCE_PROMPT.format(question=asked.question.text)
    return Question("relevance", text, answer)


def invented_events(rng: np.random.Generator) -> list[Entry]:
    """Events of a recording that is not there, to ask about."""
    colours = rng.permutation(list(COLOURS))[: int(rng.integers(MAX_FLASHES + 1))]
    flashes = [f"{colour} flash" for colour in colours]
    tones = [
        f"{PITCHES[int(rng.integers(2))]} tone {GLIDES[int(rng.integers(3))]}, "
        f"{SHAPES[int(rng.integers(len(SHAPES)))]}"
        for _ in range(int(rng.integers(MAX_TONES + 1)))
    ]
    return [Entry(int(rng.integers(MAX_RECORDING_S)), text) for text in (*flashes, *tones)]


def balanced_asked(asked: Sequence[Asked], turns: int, rng: np.random.Generator) -> list[Asked]:
    """As `balanced`, of questions that say what they are about."""
    by_question = {id(one.question): one for one in asked}
    drawn = balanced([one.question for one in asked], turns, rng, _WEIGHTS)
    return [by_question[id(question)] for question in drawn]


def notes_sample(seed: int, windows: int, turns: int, size: int) -> Sample:
    """Lines of notes with times in a recording: what matters for a question, and its answer.

    Tasks are ``select`` and those of `note_questions` with ``told_`` before them.

    Args:
        seed: Decides all.
        windows: How many windows the notes are about.
        turns: Questions at most.
        size: Width and height of frames, of which there are none.
    """
    rng = np.random.default_rng((seed % (1 << 63), windows, turns, 13))
    kinds: tuple[str, ...] = ("flash", "tone")
    if rng.random() < _SELECTED:
        kinds = (("flash",), ("tone",), kinds)[int(rng.integers(3))]
        told = _selected(seed, kinds, rng)
    else:
        told = _noted(seed, windows, rng)
    lines = [recording_line(entries) for entries in told if entries]
    entries = [entry for line in told for entry in line]
    answerable = [
        one
        for one in note_questions(entries, rng)
        if all(about.split()[-1] in kinds for about in one.about)
    ]
    asked = [
        replace(one.question, task=f"told_{one.question.task}")
        for one in balanced_asked(answerable, turns - turns // 2, rng)
    ]
    return Sample(
        frames=np.empty((0, size, size, 3), np.uint8),
        seconds=[],
        sound=None,
        turns=[*asked, *_select_turns(entries, turns // 2, rng)],
        independent=True,
        text="\n".join(lines) + "\n",
    )


def _selected(seed: int, kinds: Sequence[str], rng: np.random.Generator) -> list[list[Entry]]:
    """What is left of the notes about a whole recording once sorted out, in up to three lines."""
    recording = draw_recording(seed, int(rng.integers(300, MAX_RECORDING_S)))
    kept = [entry for entry in recording.events() if entry.kind in kinds]
    edges = sorted({0, len(kept), *(int(k) for k in rng.integers(0, len(kept) + 1, 2))})
    return [kept[a:b] for a, b in pairwise(edges)]


def _noted(seed: int, windows: int, rng: np.random.Generator) -> list[list[Entry]]:
    """Notes about a part of a recording, or some of them."""
    duration = STRIDE_S * (windows - 1) + WINDOW_S
    # Most parts of a recording of hours hold next to nothing.
    most = 1 + windows if rng.random() < 0.7 else 1
    recording = draw_recording(
        seed,
        duration,
        flashes=int(rng.integers(min(MAX_FLASHES, most) + 1)),
        tones=int(rng.integers(min(MAX_TONES, most) + 1)),
    )
    offset = STRIDE_S * int(rng.integers((MAX_RECORDING_S - duration) // STRIDE_S))
    told = window_entries(recording, offset)
    if rng.random() < 0.25:
        # The windows that matter and some beside them.
        told = [entries for entries in told if rng.random() < 0.6]
    if told and rng.random() < 0.5:
        # A group of entries begins anywhere in a note.
        told[0] = told[0][int(rng.integers(len(told[0]) + 1)) :]
    return told


def _select_turns(entries: Sequence[Entry], turns: int, rng: np.random.Generator) -> list[Question]:
    """What matters of entries for questions about them and about more than them."""
    pool = note_questions([*entries, *invented_events(rng)], rng)
    asked = balanced_asked(pool, turns, rng)
    if len(entries) <= _MOST_COPIED and rng.random() < _ABOUT_ALL:
        # Copying is learnt from much that is copied.
        text, about = _WHOLE[int(rng.integers(len(_WHOLE)))]
        asked = [Asked(Question("select", text, ""), about), *asked[1:]]
    found = []
    for one in asked:
        text = SELECT_PROMPT.format(question=one.question.text)
        found.append(Question("select", text, recording_line(filter(one.needs, entries))))
    return found


def window_entries(recording: Recording, offset: int) -> list[list[Entry]]:
    """What notes about the windows of a recording tell, with times in the recording.

    What two windows tell is told once, and a scene that goes on in the next window is not told
    again.

    Args:
        recording: Of any length.
        offset: Seconds before its start, as of a part of a longer one.
    """
    found: list[list[Entry]] = []
    before: list[Entry] = []
    for start in range(0, max(1, recording.duration - WINDOW_S + STRIDE_S), STRIDE_S):
        clip = recording.window(start, min(start + WINDOW_S, recording.duration))
        entries = [entry.at(start + offset) for entry in clip_entries(clip)]
        texts = {entry.text for entry in before}
        found.append(
            [
                entry
                for entry in entries
                if entry not in before
                and (entry.second > start + offset or entry.text not in texts)
            ]
        )
        before = entries
    return found
