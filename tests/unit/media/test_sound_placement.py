"""Sound lies where its timestamps say, on the clock of the picture."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest

from vllm_mm_ext.media.audio.sound_placement import (
    TOLERANCE_S,
    Clock,
    FileOrder,
    Piece,
    clock_origins,
    place,
)
from vllm_mm_ext.media.decode.job import run_job
from vllm_mm_ext.media.decode.probe import probe
from vllm_mm_ext.media.types import DecodeLimits, DecodeRequest, DecodeResult, SamplingSpec

RATE = 48_000
# Bursts of sound begin at these seconds of the sound, and last 0.2 s.
BURSTS = (0.5, 1.5, 2.5)
SECONDS = 3.0
VIDEO_S = 4.0
CODECS = {
    "mp4": ("mpeg4", "aac"),
    "mov": ("mpeg4", "aac"),
    "3gp": ("mpeg4", "aac"),
    "mkv": ("mpeg4", "libopus"),
    "webm": ("libvpx", "libopus"),
    "ts": ("mpeg2video", "aac"),
    "mpg": ("mpeg2video", "mp2"),
    "flv": ("flv", "aac"),
    "nut": ("mpeg4", "flac"),
    "asf": ("msmpeg4v3", "libmp3lame"),
}
VIDEO = DecodeRequest(sampling=SamplingSpec(max_frames=4), audio="optional")
# What is done to a packet of sound, given its time in seconds: the seconds by which it is moved, or
# None to lose it.
Defect = Callable[[float], float | None]


def bursts() -> np.ndarray:
    wave = np.zeros(round(SECONDS * RATE), np.float32)
    noise = np.random.default_rng(0).uniform(-0.8, 0.8, RATE // 5)
    for start in BURSTS:
        begin = round(start * RATE)
        wave[begin : begin + len(noise)] = noise
    return wave


def write(
    path: Path,
    *,
    picture_at: float = 0.0,
    sound_at: float = 0.0,
    defect: Defect,
    pictures: int = round(VIDEO_S * 25),
) -> None:
    """A file of four seconds of pictures and three of bursts, packets damaged by ``defect``."""
    video_codec, audio_codec = CODECS[path.suffix[1:]]
    with av.open(str(path), "w") as container:
        video: Any = container.add_stream(video_codec, rate=25)
        video.width, video.height, video.pix_fmt = 64, 48, "yuv420p"
        sound: Any = container.add_stream(audio_codec, rate=RATE, layout="mono")
        sound.bit_rate = 96_000
        packets = []
        for number in range(pictures):
            frame = av.VideoFrame.from_ndarray(
                np.full((48, 64, 3), number, np.uint8), format="rgb24"
            ).reformat(format="yuv420p")
            frame.pts, frame.time_base = round(picture_at * 25) + number, Fraction(1, 25)
            packets += [(packet, 0.0) for packet in video.encode(frame)]
        packets += [(packet, 0.0) for packet in video.encode()]
        resampler = av.AudioResampler(format=sound.codec_context.format, layout="mono", rate=RATE)
        wave = av.AudioFrame.from_ndarray(bursts()[None], format="flt", layout="mono")
        wave.sample_rate, wave.pts, wave.time_base = RATE, 0, Fraction(1, RATE)
        encoded = [p for made in resampler.resample(wave) for p in sound.encode(made)]
        for packet in [*encoded, *sound.encode()]:
            moved = defect(float(packet.pts * packet.time_base))
            if moved is not None:
                packets.append((packet, sound_at + moved))
        for packet, seconds in packets:
            ticks = round(seconds / packet.time_base)
            packet.pts += ticks
            packet.dts += ticks
        packets.sort(key=lambda item: float(item[0].dts * item[0].time_base))
        for packet, _ in packets:
            container.mux(packet)


def onsets(result: DecodeResult) -> list[float]:
    """Seconds at which sound begins after silence."""
    assert result.audio is not None
    hop = result.audio_rate // 200
    level = np.abs(result.audio[: len(result.audio) // hop * hop]).reshape(-1, hop).max(axis=1)
    loud = level > 0.25
    before = np.concatenate([np.zeros(20, bool), loud])
    return [
        float(k) * hop / result.audio_rate
        for k in np.flatnonzero(loud)
        if not before[k : k + 20].any()
    ]


def plain(_: float) -> float | None:
    return 0.0


def hole(time: float) -> float | None:
    return None if 0.9 < time < 1.4 else 0.0


@pytest.mark.parametrize("container", CODECS)
@pytest.mark.parametrize(
    ("picture_at", "sound_at", "defect", "heard"),
    [
        (0.0, 0.0, plain, [0.5, 1.5, 2.5]),
        (0.0, 0.8, plain, [1.3, 2.3, 3.3]),
        (1.0, 0.0, plain, [0.5, 1.5]),
        (0.0, 0.0, hole, [0.5, 1.5, 2.5]),
    ],
    ids=["plain", "late", "early", "hole"],
)
def test_sound_is_heard_when_the_container_says(
    tmp_path: Path, container: str, picture_at: float, sound_at: float, defect: Defect, heard: Any
) -> None:
    if container == "mpg" and defect is hole:
        pytest.skip("FFmpeg's muxer writes no timestamp in the middle of a pack")
    path = tmp_path / f"a.{container}"
    write(path, picture_at=picture_at, sound_at=sound_at, defect=defect)
    result = run_job(str(path), VIDEO)
    assert onsets(result) == pytest.approx(heard, abs=0.02)
    assert result.audio is not None
    assert len(result.audio) / result.audio_rate <= VIDEO_S + 1e-3


def test_sound_alone_begins_with_its_first_sample(tmp_path: Path) -> None:
    path = tmp_path / "a.mkv"
    write(path, sound_at=0.8, defect=hole)
    result = run_job(str(path), DecodeRequest(audio="required"))
    assert onsets(result) == pytest.approx(BURSTS, abs=0.02)


@pytest.mark.parametrize(
    ("picture_at", "sound_at", "note"),
    [(0.0, 1.8, ""), (0.0, 2.5, "outside"), (0.8, 0.0, ""), (1.2, 0.0, "outside")],
)
def test_sound_beside_the_pictures_is_cut_and_over_a_second_of_it_is_noted(
    tmp_path: Path, picture_at: float, sound_at: float, note: str
) -> None:
    path = tmp_path / "a.mkv"
    write(path, picture_at=picture_at, sound_at=sound_at, defect=plain)
    result = run_job(str(path), VIDEO)
    assert result.audio is not None
    length = min(VIDEO_S, SECONDS + sound_at - picture_at)
    assert len(result.audio) / result.audio_rate == pytest.approx(length, abs=0.03)
    assert result.audio_note == note
    span = SamplingSpec(max_frames=4, span=(sound_at, sound_at + 1))
    assert run_job(str(path), replace(VIDEO, sampling=span)).audio_note == ""


@pytest.mark.parametrize("container", ["mp4", "webm", "ts", "flv"])
def test_a_single_picture_stands_while_there_is_sound(tmp_path: Path, container: str) -> None:
    path = tmp_path / f"a.{container}"
    write(path, defect=plain, pictures=1)
    result = run_job(str(path), VIDEO)
    assert result.info.video is not None
    assert result.info.video.duration == pytest.approx(SECONDS, abs=0.05)
    assert onsets(result) == pytest.approx(BURSTS, abs=0.02)
    assert result.frames is not None
    assert len(result.frames) == 1
    assert result.audio_note == ""
    short = probe(str(path), DecodeLimits(max_duration_s=2.0)).video
    assert short is not None
    assert short.duration == 2.0


def test_sound_wholly_beside_the_pictures_is_none(tmp_path: Path) -> None:
    path = tmp_path / "a.mkv"
    write(path, sound_at=VIDEO_S + 1, defect=plain)
    result = run_job(str(path), VIDEO)
    assert (result.audio, result.audio_note) == (None, "outside")


# --- the arithmetic ------------------------------------------------------------------------------


def pieces(times: Any, length: float = 0.02, rate: int = 1000) -> list[Piece]:
    """Pieces of ``length`` seconds at these times, whose samples are numbered from 1."""
    count = round(length * rate)
    numbers = np.arange(1, len(times) * count + 1, dtype=np.float32).reshape(-1, count)
    return [
        Piece(part, rate, None if np.isnan(time) else float(time))
        for part, time in zip(numbers, times, strict=True)
    ]


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("jitter", [0.0005, 0.001, 0.012])
def test_jitter_and_single_wrong_timestamps_move_no_sample(seed: int, jitter: float) -> None:
    rng = np.random.default_rng(seed)
    times = np.arange(200) * 0.02
    times[1:] += rng.uniform(-jitter, jitter, 199)
    times[rng.integers(10, 190, 3)] += rng.uniform(-5, 5, 3)
    times[rng.integers(1, 200, 20)] = np.nan
    samples, rate, beyond = place(pieces(times), 100.0, 10**6)
    np.testing.assert_array_equal(samples, np.arange(1, 4001))
    assert (rate, beyond) == (1000, False)


@pytest.mark.parametrize("seed", range(5))
def test_holes_of_any_length_past_the_tolerance_are_silence(seed: int) -> None:
    rng = np.random.default_rng(seed)
    gaps = np.where(rng.random(100) < 0.1, rng.uniform(TOLERANCE_S + 0.004, 1.0, 100), 0.0)
    gaps[0] = rng.uniform(0, 1)
    starts = np.round(np.arange(100) * 0.02 + np.cumsum(gaps), 3)
    samples, _, _ = place(pieces(starts), 1000.0, 10**7)
    for number, start in enumerate(starts):
        begin = round(start * 1000)
        np.testing.assert_allclose(
            samples[begin : begin + 20], np.arange(20 * number + 1, 20 * number + 21)
        )
    assert np.count_nonzero(samples) == 2000


def test_of_overlapping_sound_what_came_first_stays() -> None:
    times = np.concatenate([np.arange(50) * 0.02, np.arange(50) * 0.02 + 0.6])
    samples, _, _ = place(pieces(times), 100.0, 10**6)
    np.testing.assert_array_equal(samples[:1000], np.arange(1, 1001))
    np.testing.assert_array_equal(samples[1000:], np.arange(1401, 2001))


def test_parts_of_another_rate_are_resampled_to_that_of_most_of_the_sound() -> None:
    low, high = 8000, 16_000
    tone = [np.sin(2 * np.pi * 440 * np.arange(r) / r).astype(np.float32) for r in (low, high)]
    track = [Piece(tone[0], low, 0.0), Piece(tone[1], high, 1.0), Piece(tone[1], high, 2.5)]
    samples, rate, _ = place(track, 100.0, 10**6)
    assert (rate, len(samples)) == (high, round(3.5 * high))
    expected = np.concatenate([tone[1], tone[1], np.zeros(high // 2), tone[1]])
    inside = np.ones(len(samples), bool)
    inside[:200] = inside[high - 200 : high] = False
    np.testing.assert_allclose(samples[inside], expected[inside], atol=0.02)


def test_sound_before_the_start_and_after_the_end_is_cut() -> None:
    samples, _, beyond = place(pieces(np.arange(50) * 0.02 - 0.25), 0.5, 10**6)
    np.testing.assert_array_equal(samples, np.arange(251, 751))
    assert beyond
    assert len(place(pieces(np.arange(50) * 0.02), 0.5, 100)[0]) == 100
    assert place([], 1.0, 100)[1:] == (0, False)


def test_a_clock_that_starts_anew_goes_on_where_the_format_allows_it() -> None:
    stamps = [5.0, 5.02, 1.4, 1.42, 400.0, 400.02]
    clock = Clock([5.0], restarts=True)
    assert [clock.time(stamp, 0.02) for stamp in stamps] == pytest.approx(np.arange(6) * 0.02)
    clock = Clock([5.0], restarts=False)
    times = [clock.time(stamp, 0.02) for stamp in stamps]
    assert times == pytest.approx(np.array(stamps) - 5.0)


def test_where_files_are_joined_a_step_back_to_the_start_alone_begins_the_next_file() -> None:
    def times(stamps: Any) -> list[float | None]:
        clock = Clock([], restarts=False, joins=True)
        return [clock.time(stamp, 0.1) for stamp in stamps]

    file = np.arange(50) * 0.1
    assert times([*file, *file, *file]) == pytest.approx(np.arange(150) * 0.1)
    # A hole behind the start of the next file, too.
    assert times([*file, 0.0, 30.0]) == pytest.approx([*file, 5.0, 35.0])


@pytest.mark.parametrize("off", [-4.0, -0.3, 0.3, 4.0, 40.0])
def test_where_files_are_joined_one_wrong_timestamp_moves_no_other_sound(off: float) -> None:
    clock = Clock([], restarts=False, joins=True)
    right = np.arange(100) * 0.1
    stamps = right + off * (np.arange(100) == 55)
    times = [clock.time(stamp, 0.1) for stamp in stamps]
    assert np.delete(times, 55) == pytest.approx(np.delete(right, 55))


def in_file(
    sound: Sequence[float], places: Sequence[float], origins: Sequence[float], seconds: float
) -> FileOrder:
    """Parts of ``seconds`` of 25 pictures a second, and sound that lies beside some of them.

    Args:
        sound: Timestamps of the packets of sound.
        places: Seconds on the target clock of the pictures that each of them lies beside.
        origins: Of each part.
        seconds: Of each part.
    """
    count = round(25 * seconds)
    times = np.arange(len(origins) * count) / 25
    before = np.searchsorted(times, np.array(places) - 1e-6)
    return FileOrder(before, np.array(sound, float), times + np.repeat(origins, count), times)


def placed(
    order: FileOrder, origins: Sequence[float], seconds: float, stamps: Sequence[float] = ()
) -> list[float | None]:
    clock = Clock(origins, restarts=True, beside=lambda: order)
    return [clock.time(stamp, seconds) for stamp in stamps or order.sound.tolist()]


def test_after_a_jump_sound_is_where_its_pictures_are() -> None:
    # Two recordings of one second from 1.4 s on; sound begins 0.1 s before the pictures.
    picture = 1.4 + np.tile(np.arange(25) * 0.04, 2)
    origins = clock_origins(picture, np.arange(50) * 0.04)
    assert origins == pytest.approx((1.4, 0.4))
    stamps = 1.3 + np.tile(np.arange(52) * 0.02, 2)
    right = stamps - np.repeat(origins, 52)
    places = np.maximum(right, np.repeat([0.0, 1.0], 52))
    times = placed(in_file(stamps.tolist(), places.tolist(), origins, 1.0), origins, 0.02)
    assert times == pytest.approx(right.tolist())
    assert clock_origins(np.arange(9.0), np.arange(9.0)) == (0.0,)


@pytest.mark.parametrize(
    ("end_a", "begin_b", "clock_of_b"),
    [
        (10, 0, 1000.0),
        (7, 0, 1000.0),
        (10, 3, 1000.0),
        (1, 9, 1000.0),
        (0, 2, 1000.0),
        (10, 0, 0.0),
        (7, 0, 0.0),
        (10, 3, 0.0),
        (0, 3, 0.0),
    ],
)
def test_sound_missing_where_recordings_were_joined_moves_no_other_sound(
    end_a: int, begin_b: int, clock_of_b: float
) -> None:
    origins = (0.0, clock_of_b - 10)
    stamps = [*range(end_a), *(clock_of_b + k for k in range(begin_b, 10))]
    right = [*range(end_a), *range(10 + begin_b, 20)]
    assert placed(in_file(stamps, right, origins, 10), origins, 1.0) == pytest.approx(right)


def test_a_recording_without_sound_between_two_of_the_same_clock_moves_no_sound() -> None:
    origins = (1.0, -4.0, -9.0)
    stamps = [*range(1, 6), *range(1, 6)]
    right = [*range(5), *range(10, 15)]
    assert placed(in_file(stamps, right, origins, 5), origins, 1.0) == pytest.approx(right)


def test_sound_that_outlasts_its_recording_makes_that_of_the_next_one_no_later() -> None:
    origins = (1.0, -4.0)
    stamps = [*range(1, 8), *range(1, 6)]
    right = [*range(7), *range(5, 10)]
    places = [*range(5), 5, 5, *range(5, 10)]
    assert placed(in_file(stamps, places, origins, 5), origins, 1.0) == pytest.approx(right)


def test_where_pictures_go_on_a_long_hole_is_a_hole_and_a_wrong_timestamp_changes_nothing() -> None:
    stamps = [5, 6, 40, 41, 90_000, 43, 7000, 300, 46]
    right = [0, 1, 35, 36, None, 38, None, None, 41]
    order = in_file(stamps, [0, 1, 35, 36, 37, 38, 39, 40, 41], (5.0,), 60)
    times = placed(order, (5.0,), 1.0)
    assert [t for t, r in zip(times, right, strict=True) if r is not None] == [
        r for r in right if r is not None
    ]


def test_a_clock_that_jumps_while_sound_and_pictures_go_on_leaves_no_hole() -> None:
    stamps = [*range(20), *range(50, 60), *range(30, 40)]
    order = in_file(stamps, range(40), (0.0,), 60)
    assert placed(order, (0.0,), 1.0) == pytest.approx(range(40))
    # Behind a true hole, too.
    stamps = [*range(10), *range(15, 40), *range(36, 46)]
    right = [*range(10), *range(15, 40), *range(40, 50)]
    assert placed(in_file(stamps, right, (0.0,), 60), (0.0,), 1.0) == pytest.approx(right)
    # The decoder may leave the first samples behind a jump out.
    order = in_file([0, 1, 32, 33], [0, 1, 32, 33], (0.0,), 60)
    assert placed(order, (0.0,), 1.0, [0, 1, 33]) == pytest.approx([0, 1, 33])


def test_sound_that_overlaps_while_pictures_go_on_starts_no_clock() -> None:
    stamps = [5.0, 5.5, 5.2, 5.7]
    clock = Clock([5.0], restarts=True)
    assert [clock.time(stamp, 0.5) for stamp in stamps] == pytest.approx([0.0, 0.5, 0.2, 0.7])
    clock = Clock([], restarts=True)
    assert [clock.time(stamp, 0.5) for stamp in stamps] == pytest.approx([0.0, 0.5, 1.0, 1.5])


def test_missing_and_repeated_timestamps_follow_what_was_before_them() -> None:
    clock = Clock([], restarts=False)
    times = [clock.time(stamp, 0.02) for stamp in (None, 3.0, None, 3.0, 3.06)]
    assert times[0] is None
    assert times[1:] == pytest.approx([0.0, 0.02, 0.04, 0.06])
