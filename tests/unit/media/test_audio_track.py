"""Sound tracks: levels, lengths, limits, and which stream of a file is heard."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
import soundfile
from av.stream import Disposition

from vllm_mm_ext.errors import MediaTooLongError, NoSuchStreamError, UnreadableMediaError
from vllm_mm_ext.media.audio.audio_track import MIN_AUDIO_S
from vllm_mm_ext.media.audio.downmix import speaker_weights
from vllm_mm_ext.media.decode.job import run_job
from vllm_mm_ext.media.decode.probe import probe
from vllm_mm_ext.media.decode.sound_probe import probe_sound
from vllm_mm_ext.media.output_bytes import audio_seconds
from vllm_mm_ext.media.types import AudioNote, DecodeLimits, DecodeRequest, SamplingSpec
from vllm_mm_ext.testing.media import Tone, make_audio, make_clip

SOUND = DecodeRequest(audio="required")
VIDEO = DecodeRequest(sampling=SamplingSpec(max_frames=4), audio="optional")
TONE = [Tone(440.0, 0.0, 1e9)]
RATE = 16_000


# --- levels --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("layout", "sounding", "level"),
    [
        ("mono", [0], 1.0),
        ("stereo", [0], 0.5),
        ("3.0", [2], 1 / (1 + 2 * 0.5**0.5)),
        ("2.1", [0], 0.5),
        ("2.1", [2], 0.0),
        ("quad", [2, 3], 1 / (2 * 0.5**0.5 + 1)),
        ("5.1", [2], 1 / (2 + 2 * 0.5**0.5)),
        ("5.1", [3], 0.0),
        ("5.1", [0, 1, 2, 3, 4, 5], 1.0),
        ("7.1", [0], 0.5**0.5 / (3 + 2 * 0.5**0.5)),
    ],
)
def test_channels_are_weighted_by_speaker(
    tmp_path: Path, layout: str, sounding: list[int], level: float
) -> None:
    path = tmp_path / "a.wav"
    channels = np.zeros((av.AudioLayout(layout).nb_channels, RATE), np.int16)
    channels[sounding] = 20_000
    with av.open(str(path), "w") as container:
        stream: Any = container.add_stream("pcm_s16le", rate=RATE, layout=layout)
        frame = av.AudioFrame.from_ndarray(channels.T.reshape(1, -1), format="s16", layout=layout)
        frame.sample_rate = RATE
        container.mux(stream.encode(frame))
        container.mux(stream.encode())
    audio = run_job(str(path), SOUND).audio
    assert audio is not None
    np.testing.assert_allclose(audio, np.full(RATE, level * 20_000 / 32_768), atol=1e-4)


def test_channels_of_unknown_speakers_are_averaged() -> None:
    assert speaker_weights(("NONE",) * 6) is None
    assert speaker_weights(("LFE",) * 3) is None


# --- lengths -------------------------------------------------------------------------------------


@pytest.mark.parametrize("samples", [1, 160, round(MIN_AUDIO_S * RATE) - 1])
def test_some_milliseconds_are_no_sound(tmp_path: Path, samples: int) -> None:
    path = tmp_path / "a.wav"
    soundfile.write(path, np.full(samples, 0.5, np.float32), RATE)
    with pytest.raises(UnreadableMediaError, match="ms, too little to hear anything"):
        run_job(str(path), SOUND)
    soundfile.write(path, np.full(round(MIN_AUDIO_S * RATE), 0.5, np.float32), RATE)
    assert run_job(str(path), SOUND).audio is not None


def test_a_refusal_carries_the_files_own_figure(tmp_path: Path) -> None:
    request = DecodeRequest(audio="required", limits=DecodeLimits(max_audio_s=2))
    exact = make_audio(tmp_path / "a.wav", duration=3).path
    with pytest.raises(MediaTooLongError, match=r"lasts 3\.0 s, past the limit of 2 s"):
        run_job(str(exact), request)
    estimated = tmp_path / "a.ts"
    with av.open(str(estimated), "w", format="mpegts") as container:
        stream: Any = container.add_stream("aac", rate=RATE, layout="mono")
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 3 * RATE), np.float32), "fltp", "mono")
        frame.sample_rate = RATE
        container.mux([*stream.encode(frame), *stream.encode()])
    with pytest.raises(MediaTooLongError, match="lasts more than 2 s, past the limit of 2 s"):
        run_job(str(estimated), request)


@pytest.mark.parametrize(("name", "codec"), [("a.aac", "aac"), ("a.mp3", "libmp3lame")])
def test_a_length_that_only_the_bit_rate_tells_refuses_nothing(
    tmp_path: Path, name: str, codec: str
) -> None:
    path = tmp_path / name
    samples = np.zeros((1, 12 * RATE), np.float32)
    samples[:, 6 * RATE :] = np.random.default_rng(0).uniform(-0.5, 0.5, 6 * RATE)
    container_format = "adts" if codec == "aac" else "mp3"
    options = {} if codec == "aac" else {"write_xing": "0", "id3v2_version": "0"}
    with av.open(str(path), "w", format=container_format, options=options) as container:
        stream: Any = container.add_stream(codec, rate=RATE, layout="mono")
        stream.codec_context.options = {"q": "0"} if codec != "aac" else {}
        if codec != "aac":
            stream.codec_context.flags |= 2  # a variable bit rate
            stream.codec_context.global_quality = 0
        frame = av.AudioFrame.from_ndarray(samples, "fltp", "mono")
        frame.sample_rate = RATE
        container.mux([*stream.encode(frame), *stream.encode()])
    limits = DecodeLimits(max_audio_s=13)
    assert probe(str(path), limits).audio[0].duration == pytest.approx(12, abs=0.2)
    audio = run_job(str(path), DecodeRequest(audio="required", limits=limits)).audio
    assert audio is not None
    assert len(audio) / RATE == pytest.approx(12, abs=0.2)


@pytest.mark.parametrize(
    ("name", "codec", "count", "after"),
    [
        ("a.au", "pcm_s16be", b"\x7f\xff\xff\xff", 8),
        ("a.aiff", "pcm_s16be", b"\x7f\xff\xff\xff", b"COMM\0\0\0\x12\0\1"),
        ("a.flac", "flac", b"\xff\xff\xff\xff", 22),
    ],
)
def test_a_count_of_samples_for_which_a_file_has_no_room_refuses_nothing(
    tmp_path: Path, name: str, codec: str, count: bytes, after: bytes | int
) -> None:
    path = make_audio(tmp_path / name, codec=codec, duration=1.0).path
    data = bytearray(path.read_bytes())
    at = after if isinstance(after, int) else data.index(after) + len(after)
    data[at : at + 4] = count
    path.write_bytes(data)
    result = run_job(str(path), DecodeRequest(audio="required", limits=DecodeLimits(max_audio_s=2)))
    assert result.audio is not None
    assert len(result.audio) / result.audio_rate == pytest.approx(1.0, abs=0.01)
    assert result.info.duration == pytest.approx(1.0, abs=0.01)


def test_an_ogg_file_of_a_stream_that_was_joined_midway_lasts_as_long_as_what_it_holds(
    tmp_path: Path,
) -> None:
    whole = make_audio(tmp_path / "whole.ogg", duration=3.0).path
    path = tmp_path / "late.ogg"
    with av.open(whole) as source, av.open(str(path), "w") as late:
        stream = late.add_stream_from_template(source.streams.audio[0])
        for packet in source.demux(audio=0):
            if packet.dts is not None:
                packet.pts = packet.dts = packet.dts + int(36_000 / packet.time_base)
                packet.stream = stream
                late.mux(packet)
    (sound,) = probe_sound(str(path), DecodeLimits()).audio
    assert sound.duration == pytest.approx(3.0, abs=0.1)
    assert not sound.estimated
    # Other bytes may lie behind.
    padded = tmp_path / "padded.ogg"
    padded.write_bytes(Path(whole).read_bytes() + bytes(100_000))
    assert probe_sound(str(padded), DecodeLimits()).duration == pytest.approx(3.0, abs=0.1)


def test_joined_ogg_files_are_as_long_as_all_of_them(tmp_path: Path) -> None:
    parts = [make_audio(tmp_path / f"{length}.ogg", duration=length).path for length in (3.0, 1.0)]
    path = tmp_path / "both.ogg"
    path.write_bytes(b"".join(part.read_bytes() for part in parts))
    result = run_job(str(path), DecodeRequest(audio="required"))
    assert result.audio is not None
    assert result.info.duration == pytest.approx(4.0, abs=0.05)
    assert len(result.audio) / result.audio_rate == pytest.approx(4.0, abs=0.05)


@pytest.mark.parametrize(
    ("name", "codec", "rates"),
    [
        ("a.mp3", "libmp3lame", (44_100, 16_000)),
        ("a.mp3", "libmp3lame", (16_000, 44_100)),
        ("a.aac", "aac", (16_000, 48_000)),
        ("a.aac", "aac", (48_000, 16_000)),
        ("a.flac", "flac", (16_000, 16_000)),
    ],
)
def test_joined_files_are_heard_to_their_end_and_no_claim_refuses_them(
    tmp_path: Path, name: str, codec: str, rates: tuple[int, int]
) -> None:
    data = b""
    for rate in rates:
        part = make_audio(tmp_path / name, duration=3, codec=codec, sample_rate=rate).path
        data += Path(part).read_bytes()
    path = tmp_path / f"joined-{name}"
    path.write_bytes(data)
    request = DecodeRequest(audio="required", limits=DecodeLimits(max_audio_s=6.5))
    result = run_job(str(path), request)
    assert result.audio is not None
    assert len(result.audio) / result.audio_rate == pytest.approx(6, abs=0.2)
    if codec != "flac":
        assert result.info.duration == pytest.approx(6, abs=0.2)


@pytest.mark.parametrize("lost", ["zeroed", "cut out"])
def test_a_long_hole_in_a_file_without_an_index_is_silence(tmp_path: Path, lost: str) -> None:
    samples = np.random.default_rng(0).uniform(-0.1, 0.1, 60 * RATE).astype(np.float32)
    samples[50 * RATE : 51 * RATE] *= 8
    path = tmp_path / "a.flac"
    soundfile.write(path, samples, RATE)
    data = path.read_bytes()
    begin, end = (round(share * len(data)) for share in (0.4, 0.65))
    path.write_bytes(data[:begin] + bytes(end - begin) * (lost == "zeroed") + data[end:])
    audio = run_job(str(path), SOUND).audio
    assert audio is not None
    assert len(audio) / RATE == pytest.approx(60, abs=0.01)
    assert np.flatnonzero(np.abs(audio) > 0.5)[[0, -1]] / RATE == pytest.approx([50, 51], abs=0.01)


def test_a_recording_that_begins_late_on_its_clock_is_as_long_as_it_is(tmp_path: Path) -> None:
    path = make_clip(tmp_path / "a.mkv", duration=2, audio=TONE, start_time=610).path
    with av.open(str(path)) as source, av.open(str(tmp_path / "b.mkv"), "w") as target:
        streams = {s.index: target.add_stream_from_template(s) for s in source.streams}
        for packet in source.demux():
            if packet.pts is None or packet.dts is None:
                continue
            if packet.stream.type == "audio":
                ticks = round(610 / packet.time_base)
                packet.pts, packet.dts = packet.pts + ticks, packet.dts + ticks
            packet.stream = streams[packet.stream.index]
            target.mux(packet)
    info = probe(str(tmp_path / "b.mkv"), DecodeLimits())
    assert info.audio[0].duration == pytest.approx(2, abs=0.1)
    seconds = audio_seconds(info, info.audio[0], DecodeLimits(), with_frames=True)
    assert seconds == pytest.approx(2, abs=0.1)
    result = run_job(str(tmp_path / "b.mkv"), VIDEO)
    assert result.audio is not None
    assert len(result.audio) / result.audio_rate == pytest.approx(2, abs=0.05)


# --- sound never refuses a video ------------------------------------------------------------------


def test_long_sound_of_a_video_is_served_to_its_limit(tmp_path: Path) -> None:
    path = make_clip(tmp_path / "a.mp4", width=64, height=48, duration=4, audio=TONE).path
    limits = DecodeLimits(max_audio_s=2)
    result = run_job(str(path), DecodeRequest(VIDEO.sampling, audio="optional", limits=limits))
    assert result.frames is not None
    assert result.audio is not None
    assert (len(result.audio) / result.audio_rate, result.audio_note) == (2.0, "cut")
    for more in (DecodeLimits(max_audio_bytes=400_000), DecodeLimits(max_output_bytes=400_000)):
        result = run_job(str(path), DecodeRequest(VIDEO.sampling, audio="optional", limits=more))
        assert result.audio is not None
        assert 300_000 < result.audio.nbytes <= 400_000
        assert result.audio_note == "cut"


def clip_with(path: Path, sound: Any) -> Path:
    """A clip of one second whose packets of sound are what ``sound`` makes of them."""
    source = make_clip(path.with_name("source.mkv"), width=64, height=48, duration=1, audio=TONE)
    with av.open(str(source.path)) as container, av.open(str(path), "w") as target:
        streams = {s.index: target.add_stream_from_template(s) for s in container.streams}
        for packet in container.demux():
            if packet.dts is None:
                continue
            kept: Any = packet
            if packet.stream.type == "audio":
                content = sound(bytes(packet))
                if content is None:
                    continue
                kept = av.Packet(content)
                kept.pts, kept.dts, kept.time_base = packet.pts, packet.dts, packet.time_base
            kept.stream = streams[packet.stream.index]
            target.mux(kept)
    return path


@pytest.mark.parametrize(
    ("kind", "note"),
    [("garbage", "unreadable"), ("empty", "unreadable"), ("codec", "unsupported")],
)
def test_sound_that_cannot_be_had_is_left_out_of_a_video(
    tmp_path: Path, kind: str, note: AudioNote
) -> None:
    path = tmp_path / "a.mkv"
    if kind == "garbage":
        clip_with(path, lambda data: b"\xaa" * len(data))
    elif kind == "empty":
        clip_with(path, lambda _: None)
    else:
        clip_with(path, lambda data: data)
        path.write_bytes(path.read_bytes().replace(b"A_AAC", b"A_XYZ"))
    result = run_job(str(path), VIDEO)
    assert result.frames is not None
    assert result.audio_note == note
    assert result.audio is None
    with pytest.raises((UnreadableMediaError, NoSuchStreamError)) as refused:
        run_job(str(path), SOUND)
    assert refused.value.parameter == "input_audio"


# --- recordings that were joined -----------------------------------------------------------------


def tone(path: Path, codec: str, layout: str) -> bytes:
    """A second of a tone in a transport stream."""
    with av.open(str(path), "w") as container:
        stream: Any = container.add_stream(codec, rate=48_000, layout=layout)
        wave = 0.5 * np.sin(2 * np.pi * 440 * np.arange(48_000) / 48_000)
        count = stream.layout.nb_channels
        samples = np.repeat(np.round(wave * 32_767).astype(np.int16), count)[None]
        frame = av.AudioFrame.from_ndarray(samples, format="s16", layout=layout)
        frame.sample_rate = 48_000
        container.mux([*stream.encode(frame), *stream.encode()])
    return path.read_bytes()


@pytest.mark.parametrize(
    "codecs",
    [
        ("aac", "mp2"),
        ("mp2", "aac"),
        ("aac", "ac3", "aac"),
        ("ac3", "eac3"),
    ],
)
def test_every_part_of_joined_recordings_is_heard_whatever_its_codec(
    tmp_path: Path, codecs: tuple[str, ...]
) -> None:
    path = tmp_path / "joined.ts"
    path.write_bytes(b"".join(tone(tmp_path / f"{c}.ts", c, "mono") for c in codecs))
    result = run_job(str(path), SOUND)
    assert result.audio is not None
    assert len(result.audio) / result.audio_rate == pytest.approx(len(codecs), abs=0.08 * 3)
    steps = np.array_split(result.audio[2400:-7200], 20 * len(codecs))
    level = np.array([float(np.sqrt(np.mean(step**2))) for step in steps])
    # Encoders fade in over a frame, where parts meet.
    assert (np.abs(level - 0.5 / 2**0.5) < 0.02).mean() > 0.8


# --- which stream --------------------------------------------------------------------------------


def streams(path: Path, sounds: list[tuple[float, str, Disposition]]) -> str:
    """A file of audio streams: amplitude, layout and disposition of each."""
    with av.open(str(path), "w") as container:
        made: list[Any] = []
        for _, layout, disposition in sounds:
            stream: Any = container.add_stream("pcm_s16le", rate=RATE, layout=layout)
            stream.disposition = disposition
            made.append(stream)
        for stream, (amplitude, layout, _) in zip(made, sounds, strict=True):
            count = av.AudioLayout(layout).nb_channels
            wave = np.full((1, count * RATE), amplitude * 32_768, np.int16)
            frame = av.AudioFrame.from_ndarray(wave, format="s16", layout=layout)
            frame.sample_rate = RATE
            container.mux([*stream.encode(frame), *stream.encode()])
    return str(path)


NONE, DEFAULT, COMMENT = Disposition(0), Disposition.default, Disposition.comment


@pytest.mark.parametrize(
    ("sounds", "heard"),
    [
        ([(0.1, "mono", NONE), (0.2, "mono", DEFAULT)], 0.2),
        ([(0.1, "mono", DEFAULT | COMMENT), (0.2, "mono", NONE)], 0.2),
        ([(0.1, "stereo", Disposition.visual_impaired), (0.2, "mono", NONE)], 0.2),
        ([(0.1, "mono", NONE), (0.2, "stereo", NONE), (0.3, "stereo", NONE)], 0.2),
        ([(0.1, "stereo", Disposition.dub), (0.2, "mono", NONE)], 0.2),
        ([(0.1, "mono", COMMENT)], 0.1),
    ],
)
def test_the_programmes_own_sound_is_heard(tmp_path: Path, sounds: Any, heard: float) -> None:
    audio = run_job(streams(tmp_path / "a.mkv", sounds), SOUND).audio
    assert audio is not None
    assert float(audio.max()) == pytest.approx(heard, abs=1e-3)


def test_a_request_chooses_the_stream_by_its_number(tmp_path: Path) -> None:
    path = streams(tmp_path / "a.mkv", [(0.1, "mono", NONE), (0.2, "mono", DEFAULT)])
    for number, heard in ((0, 0.1), (1, 0.2)):
        audio = run_job(path, DecodeRequest(audio="required", audio_stream=number)).audio
        assert audio is not None
        assert float(audio.max()) == pytest.approx(heard, abs=1e-3)
    with pytest.raises(NoSuchStreamError, match=r"no audio stream 2.*it has 0, 1") as refused:
        run_job(path, DecodeRequest(audio="required", audio_stream=2))
    assert refused.value.parameter == "mm_ext.audio_stream"


@pytest.mark.parametrize("layout", ["mono", "stereo"])
def test_samples_of_64_bits_are_read(tmp_path: Path, layout: str) -> None:
    path = tmp_path / "a.wav"
    with av.open(str(path), "w") as container:
        stream: Any = container.add_stream("pcm_s64le", rate=RATE, layout=layout)
        frame = av.AudioFrame(format="s64", layout=layout, samples=RATE)
        frame.sample_rate = RATE
        samples = np.full(RATE * frame.layout.nb_channels, 1 << 62, np.int64)
        frame.planes[0].update(samples.tobytes().ljust(frame.planes[0].buffer_size, b"\0"))
        container.mux(stream.encode(frame))
        container.mux(stream.encode())
    audio = run_job(str(path), SOUND).audio
    assert audio is not None
    np.testing.assert_allclose(audio, np.full(RATE, 0.5), atol=1e-6)


def test_sound_at_which_a_decoder_gives_up_leaves_the_video(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = str(make_clip(tmp_path / "a.mp4", duration=0.5, audio=TONE).path)
    # PyAV raises ValueError here.
    monkeypatch.setattr(
        "vllm_mm_ext.media.audio.audio_track.to_mono", lambda _: av.AudioLayout("no such layout")
    )
    result = run_job(path, VIDEO)
    assert result.frames is not None
    assert (result.audio, result.audio_note) == (None, "unreadable")


def test_a_stream_that_is_not_found_again_is_unreadable(tmp_path: Path) -> None:
    path = str(make_clip(tmp_path / "a.mp4", duration=0.5, audio=TONE).path)
    info = probe(path, DecodeLimits())
    info = replace(info, audio=(replace(info.audio[0], number=9),))
    assert run_job(path, replace(VIDEO, info=info)).audio_note == "unreadable"
    with pytest.raises(UnreadableMediaError, match="could not be found again"):
        run_job(path, replace(SOUND, info=info))


@pytest.mark.parametrize(
    ("codec", "suffix", "layout"),
    [("aac", "mp4", "7.1"), ("wavpack", "wv", "7.1.4"), ("wavpack", "wv", "22.2")],
)
def test_many_channels_are_read(tmp_path: Path, codec: str, suffix: str, layout: str) -> None:
    path = tmp_path / f"a.{suffix}"
    channels = av.AudioLayout(layout).nb_channels
    with av.open(str(path), "w") as container:
        stream: Any = container.add_stream(codec, rate=48_000, layout=layout)
        tone = 0.25 * np.sin(2 * np.pi * 440 * np.arange(48_000) / 48_000)
        samples = np.repeat((tone * 32_767).astype(np.int16), channels)[None]
        frame = av.AudioFrame.from_ndarray(samples, format="s16", layout=layout)
        frame.sample_rate = 48_000
        container.mux(stream.encode(frame))
        container.mux(stream.encode())
    audio = run_job(str(path), SOUND).audio
    assert audio is not None
    assert 48_000 <= len(audio) < 48_000 + 4_096
    heard = audio[5_000:29_000]
    assert np.abs(np.fft.rfft(heard)).argmax() == 220
    assert heard.std() == pytest.approx(tone.std(), rel=0.1)
