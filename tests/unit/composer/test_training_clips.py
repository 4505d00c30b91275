"""The generator: what is asked is what is drawn, sounded and encoded."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import av
import numpy as np
import pytest

from vllm_mm_ext.composer.training.clips import COLOURS, Clip, draw_clip
from vllm_mm_ext.composer.training.folder import Conversation, load_sample
from vllm_mm_ext.composer.training.frame_times import pick_seconds
from vllm_mm_ext.composer.training.model import tiny_config
from vllm_mm_ext.composer.training.questions import TASKS, Question, normalised, questions
from vllm_mm_ext.composer.training.render import Frames, encode_clip, render_frames, render_sound
from vllm_mm_ext.composer.training.samples import HELD_OUT, generated_sample
from vllm_mm_ext.composer.training.tokenizer import build_tokenizer

SIZE, RATE = 64, 16_000
SEEDS = range(24)


def nearest(rgb: np.ndarray) -> str:
    return min(COLOURS, key=lambda name: float(np.abs(np.array(COLOURS[name]) - rgb).sum()))


def background(picture: Frames) -> np.ndarray:
    """Median of the corners: an object covers one of them at most."""
    corners = picture[[0, 0, -1, -1], [0, -1, 0, -1]].astype(float)
    return np.median(corners, axis=0)


def grey(rgb: np.ndarray) -> bool:
    """A scene's background, as opposed to the saturated or white one of a flash."""
    return bool(np.ptp(rgb) < 40 and rgb.mean() < 160)


def flashes_seen(clip: Clip) -> list[tuple[float, str]]:
    """Start and colour of each run of frames with a coloured background, from the pixels."""
    times = np.arange(0, clip.duration, 0.05)
    found, before = [], False
    for time, picture in zip(times, render_frames(clip, times.tolist(), SIZE), strict=True):
        behind = background(picture)
        if not grey(behind) and not before:
            found.append((float(time), nearest(behind)))
        before = not grey(behind)
    return found


def object_mask(clip: Clip, second: float) -> np.ndarray:
    picture = render_frames(clip, [second], SIZE)[0].astype(float)
    return np.abs(picture - background(picture)).sum(axis=-1) > 90


def quiet(clip: Clip, start: float, end: float) -> float:
    """A moment of a scene without a flash."""
    for second in np.linspace(start + 0.05, end - 0.05, 40):
        if clip.flash_at(float(second)) is None:
            return float(second)
    raise AssertionError("a scene is one flash")


def tones_heard(clip: Clip) -> list[tuple[float, float, float]]:
    """Start and the frequencies near start and end of each tone, from the samples."""
    samples = render_sound(clip, 0, clip.duration, RATE)
    hop = RATE // 50
    level = np.sqrt((samples[: len(samples) // hop * hop].reshape(-1, hop) ** 2).mean(axis=1))
    on = np.concatenate(([False], level > 0.05, [False]))
    edges = np.flatnonzero(np.diff(on.astype(int)))
    found = []
    for start, end in edges.reshape(-1, 2):
        part = samples[start * hop : end * hop]
        found.append((start * hop / RATE, *(_hz(x) for x in (part[800:3200], part[-3200:-800]))))
    return found


def _hz(part: np.ndarray) -> float:
    spectrum = np.abs(np.fft.rfft(part * np.hanning(len(part)), 1 << 15))
    return float(spectrum.argmax() * RATE / (1 << 15))


def test_a_seed_gives_the_same_clip_questions_and_frames() -> None:
    one, other = (generated_sample(5, 9, 10, 12, SIZE) for _ in range(2))
    assert one.turns == other.turns
    assert one.seconds == other.seconds
    assert (one.frames == other.frames).all()
    assert one.sound is not None
    assert other.sound is not None
    assert (one.sound == other.sound).all()
    assert generated_sample(6, 9, 10, 12, SIZE).turns != one.turns
    assert draw_clip(HELD_OUT, 9) != draw_clip(0, 9)


@pytest.mark.parametrize("seed", SEEDS)
def test_the_story_is_consistent(seed: int) -> None:
    clip = draw_clip(seed, 4 + seed * 2)
    assert clip.scenes[0].start == 0
    assert clip.scenes[-1].end == clip.duration
    assert all(a.end == b.start for a, b in pairwise(clip.scenes))
    assert len({s.shape for s in clip.scenes}) == len(clip.scenes)
    colours = [x.colour for x in (*clip.scenes, *clip.flashes)]
    assert len(set(colours)) == len(colours)
    for flash in clip.flashes:
        assert 0.2 <= round(flash.end - flash.start, 2) <= 0.5
        assert int(flash.start) == int(flash.end)
        assert clip.scene_at(flash.start) is clip.scene_at(flash.end)


@pytest.mark.parametrize("seed", SEEDS)
def test_flash_answers_are_what_the_pixels_show(seed: int) -> None:
    clip = draw_clip(seed, 12)
    seen = flashes_seen(clip)
    asked = answers(clip, seed)
    assert asked["flash_count"] == {str(len(seen))}
    assert asked.get("flash_time", set()) == {str(int(start)) for start, _ in seen}
    assert [colour for _, colour in seen] == [flash.colour for flash in clip.flashes]
    assert asked.get("flash_colour", set()) <= {colour for _, colour in seen}


@pytest.mark.parametrize("seed", SEEDS)
def test_objects_look_and_move_as_asked(seed: int) -> None:
    clip = draw_clip(seed, 14)
    fill = {"circle": 0.785, "bar": 1.0, "triangle": 0.5, "cross": 0.54, "ring": 0.54}
    for scene in clip.scenes:
        first = quiet(clip, scene.start, scene.end)
        length = scene.end - scene.start
        last = quiet(clip, scene.start + 0.7 * length, scene.end)
        mask, later = object_mask(clip, first), object_mask(clip, last)
        picture = render_frames(clip, [first], SIZE)[0]
        assert nearest(np.median(picture[mask], axis=0)) == scene.colour
        rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
        box = (np.ptp(rows) + 1) * (np.ptp(columns) + 1)
        if rows[0] > 0 and rows[-1] < SIZE - 1 and columns[0] > 0 and columns[-1] < SIZE - 1:
            assert abs(mask.sum() / box - fill[scene.shape]) < 0.12
        shift = [np.mean(np.nonzero(later), axis=1) - np.mean(np.nonzero(mask), axis=1)][0]
        down, right = float(shift[0]), float(shift[1])
        if max(abs(down), abs(right)) < 2:
            moved = "still"
        elif abs(down) > abs(right):
            moved = "down" if down > 0 else "up"
        else:
            moved = "right" if right > 0 else "left"
        assert moved == scene.motion


@pytest.mark.parametrize("seed", SEEDS)
def test_tone_answers_are_what_is_heard(seed: int) -> None:
    clip = draw_clip(seed, 12)
    heard = tones_heard(clip)
    asked = answers(clip, seed)
    assert asked["tone_count"] == {str(len(heard))}
    assert clip.tones is not None
    for tone, (start, first, last) in zip(clip.tones, heard, strict=True):
        assert abs(start - tone.start) < 0.05
        assert ("high" if (first * last) ** 0.5 > 640 else "low") == tone.pitch
        glide = "rise" if last > 1.15 * first else "fall" if first > 1.15 * last else "level"
        assert glide == tone.glide
        shown = clip.scene_at(start)
        if len(clip.scenes) > 1:
            assert {shown.shape, shown.colour} <= asked["on_screen"]


@pytest.mark.parametrize("seed", SEEDS)
def test_orders_are_those_of_the_times(seed: int) -> None:
    clip = draw_clip(seed, 20)
    when = {scene.shape: scene.start for scene in clip.scenes}
    when |= {f"{flash.colour} flash": flash.start for flash in clip.flashes}
    for question in questions(clip, np.random.default_rng(0)):
        if question.task == "before" and "tone" not in question.text:
            named = sorted(when, key=question.text.find)
            first, second = [name for name in named if name in question.text][-2:]
            assert question.answer == ("yes" if when[first] < when[second] else "no")
        if question.task == "order" and ", " in question.answer:
            assert question.answer.split(", ") == [scene.shape for scene in clip.scenes]


def test_all_tasks_are_asked_in_several_wordings() -> None:
    found: dict[str, set[str]] = {}
    for seed in range(60):
        for question in questions(draw_clip(seed, 15), np.random.default_rng(seed)):
            found.setdefault(question.task, set()).add(question.text)
            assert normalised(question.answer + ".") == question.answer
    assert set(found) == set(TASKS)
    assert min(len(texts) for texts in found.values()) >= 5


@pytest.mark.parametrize("seed", SEEDS)
def test_only_what_the_frames_decide_is_asked(seed: int) -> None:
    clip = draw_clip(seed, 30)
    early = [0.05, 0.1]
    for question in questions(clip, np.random.default_rng(0), early):
        assert question.task not in ("motion", "order", "flash_time") or len(clip.scenes) == 1
    if clip.flashes:
        tasks = {question.task for question in questions(clip, np.random.default_rng(0), early)}
        assert "flash_count" not in tasks


@pytest.mark.parametrize("frames", [8, 32, 64])
def test_picked_times_are_exact_in_number_and_ascend(frames: int) -> None:
    for seed in range(40):
        clip = draw_clip(seed, 7 + seed)
        picked = pick_seconds(clip, frames, np.random.default_rng(seed))
        assert len(picked) == frames
        assert all(a < b for a, b in pairwise(picked))
        assert picked[0] >= 0
        assert picked[-1] < clip.duration


def test_a_clip_survives_real_encoding(tmp_path: Path) -> None:
    clip = next(c for c in (draw_clip(s, 5) for s in range(99)) if c.flashes and c.tones)
    path = tmp_path / "clip.mp4"
    encode_clip(clip, path, size=128)
    with av.open(str(path)) as container:
        assert container.streams.video[0].codec_context.name == "h264"
        assert container.streams.audio[0].codec_context.name == "aac"
    turns = (Question("all", "What?", "that"),)
    config = tiny_config(build_tokenizer())
    config.fps = 20
    sample = load_sample(Conversation(1, path.name, path, turns), config, 1000)
    assert len(sample.seconds) == 5 * 20
    drawn = render_frames(clip, sample.seconds, SIZE).astype(float)
    assert np.abs(sample.frames - drawn).mean() < 6
    for flash in clip.flashes:
        shown = int((flash.start + flash.end) / 2 * 20)
        assert nearest(background(sample.frames[shown])) == flash.colour
    assert sample.sound is not None
    assert abs(len(sample.sound) / RATE - 5) < 0.1
    for tone in clip.tones or ():
        middle = sample.sound[int((tone.start + 0.1) * RATE) : int((tone.end - 0.1) * RATE)]
        assert np.sqrt((middle**2).mean()) > 0.05


def answers(clip: Clip, seed: int) -> dict[str, set[str]]:
    found: dict[str, set[str]] = {}
    for question in questions(clip, np.random.default_rng(seed)):
        found.setdefault(question.task, set()).add(question.answer)
    return found
