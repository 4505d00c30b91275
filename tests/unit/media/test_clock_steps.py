"""A step ahead of a transport stream's clock is a pause where the sound goes on, else a join."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from tests.support.transport_streams import copied
from vllm_mm_ext.media.decode.clock import Beside, read_clock
from vllm_mm_ext.media.decode.job import run_job
from vllm_mm_ext.media.decode.probe import probe
from vllm_mm_ext.media.types import DecodeLimits, DecodeRequest, SamplingSpec
from vllm_mm_ext.testing.media import Tone, make_clip

LIMITS = DecodeLimits()
REQUEST = DecodeRequest(sampling=SamplingSpec(max_frames=8), audio="required")
FPS = 10
# Seconds from which on the pictures stand, and until which.
PAUSE = (2.0, 14.0)
LENGTH_S = 16.0
TONE = Tone(440.0, 15.0, 15.5)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("clip") / "source.ts"
    return make_clip(
        path, width=64, height=48, fps=FPS, gop=5, bframes=2, duration=LENGTH_S, audio=[TONE]
    ).path


def start(path: Path) -> float:
    video = probe(str(path), LIMITS).video
    assert video is not None
    return video.start


def without_pictures(source: Path, path: Path, *, sound: bool) -> Path:
    """A copy in which no picture comes during the pause."""
    begin = start(source)

    def wanted(kind: str, seconds: float) -> bool:
        if kind == "audio":
            return sound
        return not PAUSE[0] - 0.01 <= seconds - begin < PAUSE[1] - 0.01

    return copied(source, path, wanted=wanted)


def test_pictures_that_stand_while_the_sound_goes_on_stay_with_it(
    tmp_path: Path, source: Path
) -> None:
    path = without_pictures(source, tmp_path / "a.ts", sound=True)
    info = probe(str(path), LIMITS)
    assert info.video is not None
    assert info.packets is not None
    assert info.video.num_frames == 40
    assert info.video.duration == pytest.approx(LENGTH_S, abs=0.02)
    assert info.video.origins == ()
    np.testing.assert_allclose(info.packets.time[[0, 19, 20]], [0, 1.9, 14.0], atol=0.01)
    assert onset(path) == pytest.approx(TONE.start, abs=0.05)


def onset(path: Path) -> float:
    audio = (result := run_job(str(path), REQUEST)).audio
    assert audio is not None
    return int((np.abs(audio) > 0.1).argmax()) / result.audio_rate


@pytest.mark.parametrize(
    "moved",
    [
        # Sound is missing for long, which leaves silence.
        lambda kind, at: None if kind == "audio" and 2 <= at < 14 else 0.0,
        # Its clock jumps, and it stays with the pictures that lie beside it in the file.
        lambda kind, at: 30.0 * (kind == "audio" and at > 4),
    ],
    ids=["missing", "jump"],
)
def test_sound_stays_with_the_pictures_which_go_on(
    tmp_path: Path, source: Path, moved: Callable[[str, float], float | None]
) -> None:
    begin = start(source)
    path = copied(
        source,
        tmp_path / "a.ts",
        wanted=lambda kind, at: moved(kind, at - begin) is not None,
        moved=lambda kind, at: moved(kind, at - begin) or 0.0,
        # Packets keep their order in the file.
        options={"max_interleave_delta": "1", "max_delay": "0"},
    )
    assert onset(path) == pytest.approx(TONE.start, abs=0.05)


def test_a_recording_without_sound_between_two_of_the_same_clock_moves_no_sound(
    tmp_path: Path, source: Path
) -> None:
    begin = start(source)
    until = TONE.start - 0.1
    quiet = copied(
        source, tmp_path / "a.ts", wanted=lambda kind, at: kind == "video" or at - begin < until
    )
    mute = copied(source, tmp_path / "b.ts", wanted=lambda kind, _: kind == "video")
    path = tmp_path / "joined.ts"
    path.write_bytes(quiet.read_bytes() + mute.read_bytes() + source.read_bytes())
    assert onset(path) == pytest.approx(2 * LENGTH_S + TONE.start, abs=0.05)


@pytest.mark.parametrize("heard", [(16.0, 0.0), (12.0, 0.0), (16.0, 12.0)])
def test_sound_missing_at_a_join_moves_no_other_sound(
    tmp_path: Path, source: Path, heard: tuple[float, float]
) -> None:
    """``heard`` says until when sound is there before the join, and from when on behind it."""
    begin = start(source)
    until = min(heard[0], TONE.start - 0.1)
    before = copied(
        source, tmp_path / "a.ts", wanted=lambda kind, at: kind == "video" or at - begin < until
    )
    behind = copied(
        source,
        tmp_path / "b.ts",
        shift=1000.0,
        wanted=lambda kind, at: kind == "video" or at - begin >= heard[1],
    )
    path = tmp_path / "joined.ts"
    path.write_bytes(before.read_bytes() + behind.read_bytes())
    assert onset(path) == pytest.approx(LENGTH_S + TONE.start, abs=0.05)


def test_without_sound_a_long_step_is_a_join(tmp_path: Path, source: Path) -> None:
    info = probe(str(without_pictures(source, tmp_path / "a.ts", sound=False)), LIMITS)
    assert info.video is not None
    assert info.video.duration == pytest.approx(4.0, abs=0.02)


def test_recordings_are_joined_though_the_sound_of_one_is_longer_than_its_pictures(
    tmp_path: Path,
) -> None:
    clip = make_clip(
        tmp_path / "clip.ts", width=64, height=48, fps=FPS, gop=5, duration=3, audio=[]
    ).path
    begin = start(clip)
    short = copied(
        clip, tmp_path / "short.ts", wanted=lambda kind, at: kind == "audio" or at < begin + 1.99
    )
    later = copied(clip, tmp_path / "later.ts", shift=14.0)
    path = tmp_path / "joined.ts"
    path.write_bytes(short.read_bytes() + later.read_bytes())
    info = probe(str(path), LIMITS)
    assert info.video is not None
    assert info.packets is not None
    assert len(info.video.origins) == 2
    np.testing.assert_allclose(info.packets.time, np.arange(50) / FPS, atol=0.01)


@pytest.mark.parametrize("shift", [0.0, 5000.0])
def test_joined_recordings_are_as_long_as_their_pictures(tmp_path: Path, shift: float) -> None:
    clip = make_clip(tmp_path / "clip.ts", width=64, height=48, duration=1, audio=[]).path
    path = tmp_path / "joined.ts"
    later = copied(clip, tmp_path / "later.ts", shift=shift)
    path.write_bytes(clip.read_bytes() + later.read_bytes())
    info = probe(str(path), LIMITS)
    assert info.video is not None
    assert info.duration == info.video.duration == pytest.approx(2, abs=0.02)


def test_the_sound_is_read_only_where_the_clock_steps_ahead() -> None:
    ticks = np.arange(100, dtype=np.int64)
    asked = 0

    def beside() -> Beside:
        nonlocal asked
        asked += 1
        return Beside(np.zeros(0, np.int64), np.zeros(0))

    def read(pts: np.ndarray, *, may_jump: bool = True) -> bool:
        clock = read_clock(pts, pts, 0.1, 10.0, (), from_key=True, may_jump=may_jump, beside=beside)
        return clock.has_jumps

    assert not read(ticks)
    assert read(np.concatenate([ticks, ticks]))
    assert not read(np.concatenate([ticks, ticks + 300]), may_jump=False)
    assert asked == 0
    assert read(np.concatenate([ticks, ticks + 300]))
    assert asked == 1


def test_only_sound_in_the_middle_of_a_step_and_near_it_in_the_file_shows_a_pause() -> None:
    times = np.array([9.0, 11.0, 14.0, 20.0, 26.0, 29.0])
    for place in range(len(times)):
        sound = Beside(np.array([100]), times[place : place + 1])
        assert sound.goes_on(100, 10.0, 30.0) == (times[place] == 20.0)
    assert not Beside(np.array([500]), np.array([20.0])).goes_on(100, 10.0, 30.0)
