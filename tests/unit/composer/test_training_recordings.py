"""Recordings: long, with few events; every window is a clip, every question has one answer."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import av
import numpy as np
import pytest

from vllm_mm_ext.composer.training.note_language import (
    NOTHING,
    RECORDING_TASKS,
    Entry,
    clip_entries,
    clock,
    note_line,
    note_questions,
    read_entries,
    recording_line,
)
from vllm_mm_ext.composer.training.recording_file import encode_recording
from vllm_mm_ext.composer.training.recordings import Recording, draw_recording
from vllm_mm_ext.composer.training.render import render_frames, render_sound

DURATIONS = (10, 47, 600, 14400)
NAMES = ("first", "second", "third", "last")


@pytest.fixture(scope="module", params=DURATIONS)
def recording(request: pytest.FixtureRequest) -> Recording:
    return draw_recording(int(request.param), request.param)


def windows(recording: Recording) -> list[tuple[int, int]]:
    return [
        (start, min(start + 30, recording.duration))
        for start in range(0, max(1, recording.duration - 2), 28)
    ]


def test_recordings_of_any_length_are_chains_of_scenes_with_few_events(
    recording: Recording,
) -> None:
    scenes = recording.scenes
    assert (scenes[0].start, scenes[-1].end) == (0, recording.duration)
    for one, other in pairwise(scenes):
        assert one.end == other.start
        assert one.colour != other.colour
        assert one.shape != other.shape
    assert all(5 <= scene.end - scene.start <= 40 for scene in scenes)
    assert recording.tones is not None
    colours = [flash.colour for flash in recording.flashes]
    assert len(colours) == len(set(colours)) <= 8
    assert len(recording.tones) <= 6
    starts = sorted(e.start for e in (*recording.flashes, *recording.tones))
    assert all(other - one > 2.5 for one, other in pairwise(starts))
    for flash in recording.flashes:
        assert int(flash.start) == int(flash.end)
        clip = recording.window(
            max(0, int(flash.start) - 34), min(recording.duration, int(flash.end) + 34)
        )
        assert flash.colour not in {scene.colour for scene in clip.scenes}


def test_a_recording_follows_from_its_seed_and_refuses_absurd_lengths() -> None:
    assert draw_recording(5, 300) == draw_recording(5, 300)
    assert draw_recording(5, 300) != draw_recording(6, 300)
    silent = draw_recording(5, 300, sound=False)
    assert silent.tones is None
    assert not silent.window(0, 30).has_sound
    for duration in (9, 14401):
        with pytest.raises(ValueError, match="10 to 14400"):
            draw_recording(0, duration)
    with pytest.raises(ValueError, match="0 to 300"):
        silent.window(290, 301)


def test_windows_show_and_sound_what_the_whole_does() -> None:
    recording = draw_recording(3, 60, flashes=4, tones=3)
    whole = recording.window(0, 60)
    sound = render_sound(whole, 0, 60)
    for start in (0, 13, 40):
        part = recording.window(start, start + 20)
        times = np.arange(0.02, 20, 0.53)
        assert (
            render_frames(part, list(times), 32) == render_frames(whole, list(times + start), 32)
        ).all()
        heard = render_sound(part, 0, 20)
        np.testing.assert_allclose(heard, sound[start * 16000 : (start + 20) * 16000], atol=1e-4)


def test_each_event_is_in_the_note_of_a_window_and_at_its_time(recording: Recording) -> None:
    found = set()
    for start, end in windows(recording):
        note = recording.note(start, end)
        entries = read_entries(note)
        assert note_line(entries) == note
        assert entries == sorted(entries, key=lambda entry: entry.second)
        assert entries[0].second == 0
        found |= {entry.at(start) for entry in entries if entry.kind != "scene"}
    assert sorted(found) == recording.events()


def test_times_of_recordings_are_read_as_they_are_written() -> None:
    entries = [Entry(0, "red circle left"), Entry(3599, "high tone rise, bar"), Entry(7325, "x y")]
    line = recording_line(entries)
    assert line == "[0:00:00] red circle left; [0:59:59] high tone rise, bar; [2:02:05] x y"
    assert read_entries(line) == entries
    assert read_entries("nothing [x] here; [12 blue") == []
    assert note_line([]) == recording_line([]) == NOTHING
    assert clock(1732) == "0:28:52"


def test_only_what_frames_show_is_noted() -> None:
    recording = draw_recording(1, 30, flashes=2, tones=1)
    clip = recording.window(0, 30)
    flash = clip.flashes[0]
    between = [second for second in np.arange(0.1, 30, 0.7) if clip.flash_at(second) is None]
    noted = [entry.text for entry in clip_entries(clip, between)]
    assert f"{flash.colour} flash" not in noted
    noted = [entry.text for entry in clip_entries(clip, sorted([*between, flash.start + 0.1]))]
    assert noted.count(f"{flash.colour} flash") == 1


def test_every_question_has_one_answer_which_the_events_give() -> None:
    tasks = set()
    for seed in range(12):
        recording = draw_recording(seed, 900)
        events = recording.events()
        for number in range(4):
            answers: dict[str, set[str]] = {}
            for question, about in recording.asked(np.random.default_rng(number)):
                tasks.add(question.task)
                answers.setdefault(question.text, set()).add(question.answer)
                assert about
                if question.task == "when":
                    (entry,) = [e for e in events if e.text in question.text]
                    assert question.answer == clock(entry.second)
                if question.task == "flash_count":
                    assert question.answer == str(len(recording.flashes))
                if question.task == "on_screen":
                    assert recording.tones
                    index = (
                        [name in question.text for name in NAMES].index(True)
                        if len(recording.tones) > 1
                        else 0
                    )
                    tone = recording.tones[-1 if index == 3 else index]
                    assert any(
                        s.shape == question.answer and s.start < tone.start < s.end
                        for s in recording.scenes
                    )
            assert all(len(found) == 1 for found in answers.values())
    assert tasks == set(RECORDING_TASKS)


def test_answers_depend_only_on_the_entries_that_a_question_needs() -> None:
    recording = draw_recording(8, 900)
    lines = [
        e.at(start)
        for start, end in windows(recording)
        for e in clip_entries(recording.window(start, end))
    ]
    whole = {a.question.text: a for a in note_questions(lines, np.random.default_rng(1))}
    for asked in whole.values():
        kept = [entry for entry in lines if asked.needs(entry)]
        answers = set()
        for seed in range(30):
            for again in note_questions(kept, np.random.default_rng(seed)):
                if again.question.text == asked.question.text:
                    answers.add(again.question.answer)
        assert answers == {asked.question.answer}


def test_a_file_holds_what_the_recording_shows(tmp_path: Path) -> None:
    recording = draw_recording(1, 24, flashes=2, tones=2)
    path = tmp_path / "recording.mp4"
    encode_recording(recording, path, size=64)
    clip = recording.window(0, 24)
    with av.open(str(path)) as container:
        assert container.streams.video[0].codec_context.name == "h264"
        shown = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
    assert len(shown) == 24 * 20
    drawn = render_frames(clip, [n / 20 for n in range(len(shown))], 64)
    assert np.abs(np.stack(shown).astype(float) - drawn).mean() < 6
    with av.open(str(path)) as container:
        sound = np.concatenate([f.to_ndarray()[0] for f in container.decode(audio=0)])
    drawn_sound = render_sound(clip, 0, 24)
    assert recording.tones is not None
    for tone in recording.tones:
        middle = slice(int((tone.start + 0.1) * 16000), int((tone.end - 0.1) * 16000))
        assert np.sqrt((sound[middle] ** 2).mean()) == pytest.approx(
            np.sqrt((drawn_sound[middle] ** 2).mean()), rel=0.2
        )
    with pytest.raises(ValueError, match="multiple of 4"):
        encode_recording(recording, path, size=66)
