"""Times, durations and pictures are what players show, whatever the container says of them."""

from __future__ import annotations

import struct
from fractions import Fraction
from itertools import pairwise
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
from av.stream import Disposition

from tests.support.field_pictures import FPS, SIDE, gray, write_fields
from tests.support.mp4_boxes import boxes
from vllm_mm_ext.errors import NoSuchStreamError
from vllm_mm_ext.media.decode.decoders.pyav_decoder import PyAVDecoder
from vllm_mm_ext.media.decode.job import run_job
from vllm_mm_ext.media.decode.probe import probe
from vllm_mm_ext.media.sampling import select
from vllm_mm_ext.media.types import (
    DecodeLimits,
    DecodeRequest,
    MediaInfo,
    PacketTable,
    SamplingSpec,
    VideoStream,
)
from vllm_mm_ext.testing.media import Tone, make_clip, read_stamp

LIMITS = DecodeLimits()
ASKED = SamplingSpec(policy="uniform", max_frames=32, min_frames=32)


def read(path: Path, number: int | None = None) -> tuple[MediaInfo, VideoStream, PacketTable]:
    info = probe(str(path), LIMITS, number)
    assert info.video is not None
    assert info.packets is not None
    assert len(info.packets) == info.video.num_frames
    assert (np.diff(info.packets.time) > 0).all()
    return info, info.video, info.packets


def pictures(path: Path, info: MediaInfo, rows: list[int]) -> np.ndarray[Any, Any]:
    assert info.video is not None
    out = np.zeros((len(rows), info.video.height, info.video.width, 3), np.uint8)
    decoder = PyAVDecoder(LIMITS.max_pixels)
    done = decoder.decode(str(path), info, np.array(rows, np.int64), None, out, 1)
    assert done.tolist() == list(range(len(rows)))
    return out


def stamps(path: Path, info: MediaInfo) -> list[int]:
    """The number drawn into each frame, or that of a frame that repeats an earlier one."""
    rows = list(range(0, len(info.packets or ()), 5))
    return [read_stamp(picture) for picture in pictures(path, info, rows)]


def remux(source: Path, path: Path, **offset: float) -> Path:
    """Copy the video packets of a file into another container, ``shift`` seconds later."""
    with av.open(str(source)) as reader, av.open(str(path), "w") as writer:
        stream = reader.streams.video[0]
        out = writer.add_stream_from_template(stream)
        for packet in reader.demux(stream):
            if packet.pts is None and packet.dts is None and not packet.size:
                continue
            ticks = round(offset.get("shift", 0.0) / packet.time_base)
            packet.pts = None if packet.pts is None else packet.pts + ticks
            packet.dts = None if packet.dts is None else packet.dts + ticks
            packet.stream = out
            writer.mux(packet)
    return path


def packets_of(path: Path) -> list[Any]:
    with av.open(str(path)) as container:
        return [packet for packet in container.demux(container.streams.video[0]) if packet.size]


# --- durations and starts -------------------------------------------------------------------------


def screen_recording(tmp_path: Path, path: Path) -> Path:
    """Two seconds of 30 fps whose last picture stands for 58 s more."""
    source = make_clip(tmp_path / "source.mp4", duration=2).path
    with av.open(str(source)) as reader, av.open(str(path), "w") as writer:
        stream = reader.streams.video[0]
        out = writer.add_stream_from_template(stream)
        packets = [packet for packet in reader.demux(stream) if packet.size]
        packets[-1].duration = round(58 / packets[-1].time_base)
        for packet in packets:
            packet.stream = out
            writer.mux(packet)
    return path


@pytest.mark.parametrize("name", ["a.mp4", "a.mkv", "a.mov", "a.flv"])
def test_the_last_picture_of_a_screen_recording_lasts_as_long_as_it_says(tmp_path, name):
    _, video, table = read(screen_recording(tmp_path, tmp_path / name))
    assert video.duration == pytest.approx(59 / 30 + 58, abs=0.04)
    assert video.is_vfr, "one picture lasts longer than the others"
    assert table.time[-1] == pytest.approx(59 / 30, abs=1e-3)


@pytest.mark.parametrize(("first", "length"), [(0, 15.0), (25, 14.0)])
def test_the_repeats_at_the_end_of_an_avi_file_are_its_last_picture(tmp_path, first, length):
    path = tmp_path / "a.avi"
    with av.open(str(path), "w") as container:
        stream: Any = container.add_stream("rawvideo", rate=25)
        stream.width, stream.height, stream.pix_fmt = 32, 32, "bgr24"
        for number in range(375):
            packet = av.Packet(b"")
            if number in (first, 125):
                (packet,) = stream.encode(av.VideoFrame(32, 32, "bgr24"))
            packet.stream, packet.pts, packet.dts = stream, number, number
            packet.duration, packet.time_base = 1, Fraction(1, 25)
            container.mux(packet)
    _, video, table = read(path)
    assert video.duration == pytest.approx(length)
    assert table.time.tolist() == pytest.approx([0, (125 - first) / 25])
    data = path.read_bytes()
    path.write_bytes(data[:-1000])
    assert read(path)[1].duration == pytest.approx((126 - first) / 25)


def test_a_wrong_count_in_one_header_of_an_avi_file_changes_no_time(tmp_path):
    path = make_clip(tmp_path / "a.avi", codec="mpeg4", fps=10, duration=3).path
    data = bytearray(path.read_bytes())
    at = data.index(b"strh") + 8 + 32
    assert struct.unpack_from("<I", data, at) == (30,)
    struct.pack_into("<I", data, at, 130)
    path.write_bytes(data)
    _, video, table = read(path)
    assert (video.duration, video.fps, video.is_vfr) == (pytest.approx(3.0), 10, False)
    assert len(table) == 30


def write_gif(path: Path, *, rate: int, count: int, step: int, **options: int) -> Path:
    """A GIF whose pictures are ``step`` grey levels apart."""
    settings = {name: str(value) for name, value in options.items()}
    with av.open(str(path), "w", options=settings) as container:
        stream = container.add_stream("gif", rate=rate)
        stream.width, stream.height, stream.pix_fmt = 32, 32, "rgb8"
        for number in range(count):
            picture = np.full((32, 32, 3), step * number, np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode())
    return path


def test_the_last_delay_of_a_gif_counts(tmp_path):
    path = write_gif(tmp_path / "a.gif", rate=10, count=20, step=10, final_delay=500)
    assert read(path)[1].duration == pytest.approx(6.9, abs=0.01)


@pytest.mark.parametrize(("delay", "shown"), [(0, 0.1), (1, 0.1), (2, 0.02), (25, 0.25)])
def test_a_picture_of_a_gif_is_shown_as_long_as_browsers_show_it(tmp_path, delay, shown):
    path = write_gif(tmp_path / "a.gif", rate=10, count=10, step=20)
    data = bytearray(path.read_bytes())
    controls = [at for at in range(len(data)) if data[at : at + 3] == b"\x21\xf9\x04"]
    assert len(controls) == 10
    for at in controls:
        data[at + 4 : at + 6] = bytes([delay, 0])
    path.write_bytes(data)
    _, video, table = read(path)
    np.testing.assert_allclose(table.time, shown * np.arange(10), atol=1e-9)
    assert video.duration == pytest.approx(10 * shown)
    assert video.fps == pytest.approx(1 / shown)
    result = run_job(str(path), DecodeRequest(sampling=ASKED))
    assert result.frames is not None
    assert len(result.frames) == 10


def test_an_absurd_duration_of_the_last_picture_is_not_believed(tmp_path):
    """The table of durations says 14 hours, the header of the track a minute."""
    path = screen_recording(tmp_path, tmp_path / "a.mp4")
    data = bytearray(path.read_bytes())
    at = data.index(b"stts") + 8
    end = at + 4 + 8 * int.from_bytes(data[at : at + 4], "big")
    data[end - 4 : end] = (0x2FFFFFFF).to_bytes(4, "big")
    path.write_bytes(data)
    assert read(path)[1].duration == pytest.approx(2, abs=0.04)


@pytest.mark.parametrize("start", [101.0, 3600.0])
def test_a_segment_of_a_recording_is_as_long_as_itself(tmp_path, start):
    path = make_clip(tmp_path / "a.mkv", duration=2, start_time=start).path
    joined = tmp_path / "b.mkv"
    sound = make_clip(tmp_path / "c.mkv", duration=2, audio=[Tone(440, 0, 2)]).path
    with (
        av.open(str(path)) as pictures_in,
        av.open(str(sound)) as sound_in,
        av.open(str(joined), "w") as writer,
    ):
        video, audio = pictures_in.streams.video[0], sound_in.streams.audio[0]
        outs = [writer.add_stream_from_template(video), writer.add_stream_from_template(audio)]
        for packet in pictures_in.demux(video):
            if packet.size:
                packet.stream = outs[0]
                writer.mux(packet)
        for packet in sound_in.demux(audio):
            if packet.size:
                ticks = round(start / packet.time_base)
                packet.pts, packet.dts = packet.pts + ticks, packet.dts + ticks
                packet.stream = outs[1]
                writer.mux(packet)
    info, stream, table = read(joined)
    assert stream.start == pytest.approx(start, abs=0.05)
    assert stream.duration == pytest.approx(2, abs=0.04)
    assert info.audio[0].duration == pytest.approx(2, abs=0.1)
    assert table.time[0] == 0


def test_a_recorder_that_runs_for_days_is_not_too_long(tmp_path):
    path = make_clip(tmp_path / "a.mkv", duration=1, start_time=86_400).path
    assert read(path)[1].duration == pytest.approx(1, abs=0.04)


@pytest.mark.parametrize("kept", ["video", "audio"])
def test_a_live_fragment_is_as_long_as_itself(tmp_path, kept):
    """Each fragment tells its time since the broadcast began, here 4 s before; the limit is 3 s."""
    source = make_clip(tmp_path / "a.mp4", duration=6, gop=30, audio=[Tone(440, 0, 6)]).path
    live, path = tmp_path / "live.mp4", tmp_path / "late.mp4"
    flags = {"movflags": "frag_keyframe+empty_moov+default_base_moof", "frag_duration": "1000000"}
    with av.open(str(source)) as reader, av.open(str(live), "w", options=flags) as writer:
        stream = getattr(reader.streams, kept)[0]
        out = writer.add_stream_from_template(stream)
        for packet in reader.demux(stream):
            if packet.size:
                packet.stream = out
                writer.mux(packet)
    found = boxes(live.read_bytes())
    head = [data for kind, data in found if kind in (b"ftyp", b"moov")]
    fragments = [data for kind, data in found if kind in (b"moof", b"mdat")]
    assert len(fragments) >= 10
    path.write_bytes(b"".join(head + fragments[-4:]))
    limits = DecodeLimits(max_duration_s=3, max_audio_s=3)
    sampling = SamplingSpec(policy="uniform", max_frames=4) if kept == "video" else None
    audio = "required" if kept == "audio" else "none"
    result = run_job(str(path), DecodeRequest(sampling=sampling, audio=audio, limits=limits))
    if kept == "video":
        assert result.info.video is not None
        assert 1 <= result.info.video.duration < 2.1
    else:
        assert result.audio is not None
        assert 1 <= len(result.audio) / result.audio_rate < 2.1


@pytest.mark.parametrize(("name", "codec"), [("a.aac", "aac"), ("a.mp3", "libmp3lame")])
def test_the_length_of_sound_without_a_header_is_read_not_estimated(tmp_path, name, codec):
    """At first silence, in few bits: from the bit rate of that, FFmpeg estimates minutes."""
    path, rate = tmp_path / name, 44_100
    options = {"write_xing": "0", "id3v2_version": "0"} if codec == "libmp3lame" else {}
    rng = np.random.default_rng(0)
    wave = np.concatenate([np.zeros(10 * rate), rng.normal(0, 0.3, 10 * rate)]).astype(np.float32)
    with av.open(str(path), "w", options=options) as container:
        encoder = {"global_quality": "118", "flags": "+qscale"} if codec == "libmp3lame" else {}
        stream: Any = container.add_stream(codec, rate=rate, layout="mono", options=encoder)
        frame = av.AudioFrame.from_ndarray(wave[None], format="fltp", layout="mono")
        frame.sample_rate = rate
        container.mux([*stream.encode(frame), *stream.encode()])
    info = probe(str(path), LIMITS)
    assert info.video is None
    assert info.audio[0].duration == pytest.approx(20, abs=0.2)


@pytest.mark.parametrize("name", ["a.mp4", "a.mov"])
@pytest.mark.parametrize("bframes", [0, 2])
def test_an_edit_list_that_begins_within_a_group_of_pictures_begins_there(tmp_path, name, bframes):
    clip = make_clip(tmp_path / "c.mp4", duration=3, gop=60, bframes=bframes, stamp=True).path
    path = remux(clip, tmp_path / name, shift=-0.5)
    info, video, table = read(path)
    assert video.num_frames == 75
    assert video.duration == pytest.approx(2.5)
    np.testing.assert_allclose(table.time, np.arange(75) / 30, atol=1e-6)
    assert stamps(path, info) == list(range(15, 90, 5))


# --- clocks that jump -----------------------------------------------------------------------------


@pytest.mark.parametrize("starts", [(0.0, 0.0), (0.0, 5000.0), (5000.0, 1.0), (0.0, 700.0, 0.0)])
@pytest.mark.parametrize("bframes", [0, 2])
def test_joined_transport_streams_go_on_where_they_were_joined(tmp_path, starts, bframes):
    clip = make_clip(tmp_path / "a.ts", duration=1, gop=15, bframes=bframes, stamp=True).path
    path = tmp_path / "joined.ts"
    parts = [remux(clip, tmp_path / f"{n}.ts", shift=s) for n, s in enumerate(starts)]
    path.write_bytes(b"".join(part.read_bytes() for part in parts))
    info, video, table = read(path)
    assert video.num_frames == 30 * len(starts)
    assert video.duration == pytest.approx(len(starts), abs=0.01)
    np.testing.assert_allclose(table.time, np.arange(len(table)) / 30, atol=1e-3)
    assert stamps(path, info) == [row % 30 for row in range(0, len(table), 5)]


@pytest.mark.parametrize(("gap", "hole"), [(9.95, 9.95), (10.05, 0.0)])
def test_a_transport_stream_jumps_where_a_picture_is_over_ten_seconds_late(tmp_path, gap, hole):
    clip = make_clip(tmp_path / "a.ts", duration=2, gop=15).path
    path = tmp_path / "joined.ts"
    late = remux(clip, tmp_path / "b.ts", shift=2 + gap)
    path.write_bytes(clip.read_bytes() + late.read_bytes())
    _, video, table = read(path)
    assert float(table.time[60]) == pytest.approx(2 + hole, abs=1e-3)
    assert video.duration == pytest.approx(4 + hole, abs=0.01)


def test_what_follows_a_long_run_of_zeros_in_a_transport_stream_is_read(tmp_path):
    path = make_clip(
        tmp_path / "a.ts", duration=9, gop=15, stamp=True, scene="noise", audio=[Tone(440, 0, 9)]
    ).path
    data = bytearray(path.read_bytes())
    first, last = len(data) // 3, len(data) * 2 // 3
    assert last - first > 1 << 17
    data[first:last] = bytes(last - first)
    path.write_bytes(data)
    info, video, table = read(path)
    assert video.duration == pytest.approx(9, abs=0.01)
    assert 150 <= len(table) <= 200
    rows = [*range(0, 60, 10), *range(len(table) - 60, len(table), 10)]
    assert [read_stamp(picture) for picture in pictures(path, info, rows)] == [
        round(float(table.time[row]) * 30) for row in rows
    ]
    result = run_job(str(path), DecodeRequest(sampling=ASKED, audio="required", info=info))
    assert result.frames is not None
    assert result.audio is not None
    assert len(result.frames) == 32
    assert len(result.audio) == pytest.approx(9 * result.audio_rate, rel=0.01)


def test_a_stream_that_turns_up_where_recordings_are_joined_hides_no_picture(tmp_path):
    silent = make_clip(tmp_path / "a.ts", duration=2, gop=15).path
    sounding = make_clip(tmp_path / "b.ts", duration=2, gop=15, audio=[Tone(440, 0, 2)]).path
    path = tmp_path / "joined.ts"
    path.write_bytes(silent.read_bytes() * 20 + sounding.read_bytes() * 2)
    _, video, table = read(path)
    assert video.num_frames == 22 * 60
    np.testing.assert_allclose(table.time, np.arange(22 * 60) / 30, atol=1e-3)
    assert video.duration == pytest.approx(44, abs=0.01)


def test_a_long_gap_in_a_file_with_an_index_is_a_long_picture(tmp_path):
    path = tmp_path / "a.mp4"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=30)
        stream.width = stream.height = 64
        stream.codec_context.time_base = Fraction(1, 30)
        for place in (0, 1, 2, 900, 901):
            frame = av.VideoFrame.from_ndarray(np.zeros((64, 64, 3), np.uint8), format="rgb24")
            frame.pts, frame.time_base = place, Fraction(1, 30)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    _, video, table = read(path)
    assert table.time[3] == pytest.approx(30)
    assert video.duration == pytest.approx(902 / 30, abs=0.04)


def test_a_transport_stream_goes_on_where_its_clock_of_33_bits_wraps(tmp_path):
    clip = make_clip(tmp_path / "a.ts", duration=2, stamp=True, gop=15).path
    path = remux(clip, tmp_path / "b.ts", shift=2**33 / 90_000 - 2.5)
    info, video, table = read(path)
    np.testing.assert_allclose(table.time, np.arange(60) / 30, atol=1e-4)
    assert video.duration == pytest.approx(2, abs=0.01)
    assert stamps(path, info) == list(range(0, 60, 5))


# --- pictures, not packets ------------------------------------------------------------------------


@pytest.mark.parametrize("packets", [1, 2])
@pytest.mark.parametrize("name", ["a.ts", "a.mkv", "a.mp4"])
def test_two_fields_are_one_picture(tmp_path, name, packets):
    path = write_fields(tmp_path / "source.ts", 50, packets)
    if name != "a.ts":
        path = remux(path, tmp_path / name) if packets == 2 else _with_times(path, tmp_path / name)
    info, video, table = read(path)
    assert video.num_frames == 50
    assert video.fps == pytest.approx(FPS)
    assert video.duration == pytest.approx(2, abs=0.01)
    assert table.exact
    np.testing.assert_allclose(table.time, np.arange(50) / FPS, atol=1e-3)
    rows = [0, 5, 7, 24, 49]
    shown = pictures(path, info, rows)
    assert shown.shape[1:3] == (SIDE, SIDE)
    for row, picture in zip(rows, shown, strict=True):
        luma = [16 + value * 219 / 255 for value in picture[:2, 0, 0].tolist()]
        # The second field is left out, and its lines are made of the first one's.
        assert luma == pytest.approx([gray(row, 0), gray(row, 0)], abs=2)


def _with_times(source: Path, path: Path) -> Path:
    """A copy in which the second fields have timestamps, halfway between the first fields."""
    with av.open(str(source)) as reader, av.open(str(path), "w") as writer:
        stream = reader.streams.video[0]
        out = writer.add_stream_from_template(stream)
        last = 0
        for packet in reader.demux(stream):
            if packet.size:
                last = last + 1800 if packet.pts is None else packet.pts
                packet.pts = packet.dts = last
                packet.stream = out
                writer.mux(packet)
    return path


@pytest.mark.parametrize("name", ["a.webm", "a.mkv", "a.ivf"])
def test_a_picture_of_vp8_that_is_never_shown_is_no_frame(tmp_path, name):
    source = make_clip(tmp_path / "source.webm", codec="libvpx", duration=2).path
    path = tmp_path / name
    with av.open(str(source)) as reader, av.open(str(path), "w") as writer:
        stream = reader.streams.video[0]
        out = writer.add_stream_from_template(stream)
        for number, packet in enumerate(reader.demux(stream)):
            if not packet.size:
                continue
            if number % 10 == 5:
                data = bytes(packet)
                hidden = av.Packet(bytes([data[0] & ~0x10]) + data[1:])
                hidden.pts, hidden.dts = packet.pts - 10, packet.dts - 10
                hidden.time_base, hidden.stream = packet.time_base, out
                writer.mux(hidden)
            packet.stream = out
            writer.mux(packet)
    info, video, table = read(path)
    assert len(packets_of(path)) == 66
    assert video.num_frames == 60
    assert video.duration == pytest.approx(2, abs=0.01)
    np.testing.assert_allclose(table.time, np.arange(60) / 30, atol=1.1e-3)
    assert len(pictures(path, info, list(range(60)))) == 60


@pytest.mark.parametrize("name", ["a.avi", "a.mp4", "a.mkv"])
def test_a_packet_of_mpeg4_that_says_nothing_changed_is_no_frame(tmp_path, name):
    source = make_clip(tmp_path / "source.avi", codec="mpeg4", duration=2).path
    path, pts = tmp_path / name, []
    with av.open(str(source)) as reader, av.open(str(path), "w") as writer:
        stream = reader.streams.video[0]
        out = writer.add_stream_from_template(stream)
        place = 0
        for number, packet in enumerate(packets_of(source)):
            data = bytes(packet)
            for content in [data, _not_coded(data)] if number % 10 == 5 else [data]:
                new = av.Packet(content)
                new.pts = new.dts = place
                new.duration, new.time_base, new.stream = 1, Fraction(1, 30), out
                new.is_keyframe = packet.is_keyframe and content is data
                if content is data:
                    pts.append(place)
                place += 1
                writer.mux(new)
    info, video, table = read(path)
    assert video.num_frames == 60
    assert video.duration == pytest.approx(66 / 30, abs=0.04)
    assert video.is_vfr
    np.testing.assert_allclose(table.time, np.array(pts) / 30, atol=1.1e-3)
    assert len(pictures(path, info, [0, 7, 31, 59])) == 4


def _not_coded(data: bytes) -> bytes:
    """A P picture with the time of another one and ``vop_coded`` 0 (times of 5 bits)."""
    at = data.index(b"\0\0\1\xb6") + 4
    bits = "".join(f"{byte:08b}" for byte in data[at : at + 8])
    end = bits.index("0", 2) + 1
    head = "01" + bits[2 : end + 1 + 5 + 1] + "0" + "0"
    head += "1" * (-len(head) % 8)
    return b"\0\0\1\xb6" + int(head, 2).to_bytes(len(head) // 8, "big")


def test_a_stream_that_begins_within_a_group_of_pictures_begins_with_its_first_keyframe(tmp_path):
    clip = make_clip(tmp_path / "a.ts", duration=3, gop=30, bframes=2, stamp=True).path
    data = clip.read_bytes()
    path = tmp_path / "b.ts"
    path.write_bytes(data[: 188 * 3] + data[188 * (len(data) // 188 * 4 // 10) :])
    info, video, table = read(path)
    first = stamps(path, info)[0]
    assert first in (30, 60)
    assert video.num_frames == 90 - first
    assert table.time[0] == 0
    assert stamps(path, info) == list(range(first, 90, 5))


# --- containers that count in milliseconds --------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "codec"),
    [("a.webm", "libvpx"), ("a.mkv", "libx264"), ("a.flv", "libx264"), ("remuxed.mp4", "libx264")],
)
@pytest.mark.parametrize("rate", [Fraction(30), Fraction(24000, 1001), Fraction(60)])
def test_every_frame_is_found_where_times_are_rounded(tmp_path, name, codec, rate):
    path = tmp_path / name
    seconds = 150 / rate
    if name == "remuxed.mp4":
        path = remux(make_clip(tmp_path / "a.mkv", fps=rate, duration=float(seconds)).path, path)
    else:
        make_clip(path, fps=rate, codec=codec, duration=float(seconds))
    info, video, table = read(path)
    assert video.num_frames == 150
    np.testing.assert_allclose(table.time, np.arange(150) / float(rate), atol=1e-6)
    for every in (1, 2, 3):
        spec = SamplingSpec(fps=float(rate / every), max_frames=1000, min_frames=1)
        chosen = select(info, spec, thumbnails=_none)
        assert chosen.indices.tolist() == list(range(0, 150, every))
        assert chosen.step == pytest.approx(float(every / rate))


def _none(_: Any) -> Any:
    raise AssertionError("no thumbnails are needed")


def test_every_frame_of_a_gif_of_30_a_second_is_found(tmp_path):
    path = write_gif(tmp_path / "a.gif", rate=30, count=60, step=4)
    info, video, _ = read(path)
    assert video.fps == pytest.approx(30)
    chosen = select(info, SamplingSpec(fps=30, max_frames=100), thumbnails=_none)
    assert chosen.indices.tolist() == list(range(60))


def test_times_of_a_variable_rate_stay_as_they_are(tmp_path):
    clip = make_clip(tmp_path / "a.mkv", vfr=True, fps=30, duration=3)
    _, video, table = read(clip.path)
    assert video.is_vfr
    np.testing.assert_allclose(table.time, clip.times, atol=1.1e-3)


def test_times_that_are_exact_are_fitted_to_no_rate(tmp_path):
    times = [0, 20, 60, 80, 120, 140, 180, 210]
    path = write_at(tmp_path / "a.mp4", times, rate=Fraction(100, 3))
    assert read(path)[2].time.tolist() == pytest.approx([time / 1000 for time in times[:-1]])


@pytest.mark.parametrize("times", [[0, 30, 60, 80, 110, 140], [0, 3, 6, 8, 11, 14]])
def test_pictures_of_a_slide_show_are_shown_at_whole_seconds(tmp_path, times):
    path = write_at(tmp_path / "a.mp4", [1000 * time for time in times])
    assert read(path)[2].time.tolist() == times[:-1]


def test_a_claimed_rate_that_would_drift_from_the_pictures_does_not_count(tmp_path):
    path = write_at(tmp_path / "a.mkv", [round(33.6 * number) for number in range(201)])
    _, video, table = read(path)
    assert not video.is_vfr
    assert 199 / video.fps == pytest.approx(table.time[-1], abs=0.01)


def write_at(path: Path, times: list[int], rate: int | Fraction = 30) -> Path:
    """A file that claims so many pictures a second, of pictures shown at these milliseconds.

    The last number is when the last picture ends.
    """
    with av.open(str(path), "w") as container:
        stream: Any = container.add_stream("mpeg4", rate=rate)
        stream.width, stream.height, stream.pix_fmt = 32, 32, "yuv420p"
        stream.codec_context.time_base = Fraction(1, 1000)
        for time, end in pairwise(times):
            picture = av.VideoFrame(32, 32, "yuv420p")
            picture.pts, picture.time_base = time, Fraction(1, 1000)
            for packet in stream.encode(picture):
                packet.duration = end - time
                container.mux(packet)
    return path


# --- which stream ---------------------------------------------------------------------------------


def two_streams(path: Path, first_disposition: Disposition) -> Path:
    """A preview of one large picture, then a film of 12 small pictures, which is no default."""
    with av.open(str(path), "w") as container:
        preview: Any = container.add_stream("mjpeg", rate=12)
        preview.width, preview.height, preview.pix_fmt = 128, 96, "yuvj420p"
        film: Any = container.add_stream("mpeg4", rate=12)
        film.width, film.height, film.pix_fmt = 64, 48, "yuv420p"
        preview.disposition, film.disposition = first_disposition, Disposition(0)
        for stream, count in ((preview, 1), (film, 12)):
            for number in range(count):
                shape = (stream.height, stream.width, 3)
                picture = np.full(shape, 20 * number, np.uint8)
                frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
                container.mux(stream.encode(frame.reformat(format=stream.pix_fmt)))
            container.mux(stream.encode())
    return path


@pytest.mark.parametrize("name", ["a.mkv", "a.mp4", "a.mov", "a.avi"])
@pytest.mark.parametrize("disposition", [Disposition.default, Disposition(0)])
def test_a_preview_comes_after_the_film(tmp_path, name, disposition):
    path = two_streams(tmp_path / name, disposition)
    _, video, _ = read(path)
    assert (video.width, video.height, video.num_frames) == (64, 48, 12)


def test_a_stream_can_be_chosen(tmp_path):
    path = two_streams(tmp_path / "a.mkv", Disposition.default)
    assert read(path, 0)[1].width == 128
    assert read(path, 1)[1].width == 64
    with pytest.raises(NoSuchStreamError, match="no video stream 2: it has 2"):
        probe(str(path), LIMITS, 2)
