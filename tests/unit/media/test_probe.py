"""The probe: what the container says, equal to what decoding shows, within limits."""

from __future__ import annotations

import contextlib
import struct
from fractions import Fraction

import av
import numpy as np
import pytest

from vllm_mm_ext.errors import (
    MediaError,
    MediaTooLargeError,
    MediaTooLongError,
    UnreadableMediaError,
)
from vllm_mm_ext.media.decode.probe import probe
from vllm_mm_ext.media.types import DecodeLimits
from vllm_mm_ext.testing.media import Tone, make_audio, make_clip, truncate

LIMITS = DecodeLimits()


def decoded_times(path) -> list[float]:
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        frames = [f.pts * float(f.time_base) for f in container.decode(stream)]
    return [t - frames[0] for t in frames]


@pytest.mark.parametrize(
    ("name", "codec", "bframes", "open_gop"),
    [
        ("a.mp4", "libx264", 0, False),
        ("a.mp4", "libx264", 3, False),
        ("a.mkv", "libx264", 3, True),
        ("a.ts", "libx264", 2, False),
        ("a.avi", "mpeg4", 0, False),
        ("a.mp4", "mpeg4", 2, False),
        ("a.mp4", "libx265", 3, True),
        ("a.webm", "libvpx-vp9", 0, False),
    ],
)
def test_rows_are_the_frames_a_decoder_shows_in_order(tmp_path, name, codec, bframes, open_gop):
    clip = make_clip(
        tmp_path / name, codec=codec, bframes=bframes, open_gop=open_gop, gop=20, duration=2
    )
    info = probe(str(clip.path), LIMITS)
    shown = decoded_times(clip.path)
    assert info.video is not None
    assert info.packets is not None
    assert info.video.num_frames == len(info.packets) == len(shown)
    np.testing.assert_allclose(info.packets.time, shown, atol=2e-3)
    assert info.packets.is_key[0]
    assert sorted(info.packets.order) == list(range(len(shown)))
    assert info.video.fps == pytest.approx(30, abs=1e-6)
    assert not info.video.is_vfr
    assert info.video.duration == pytest.approx(2, abs=2e-3)
    assert (info.video.width, info.video.height) == (320, 180)


def test_uneven_frame_times_are_vfr_with_exact_times(tmp_path):
    clip = make_clip(tmp_path / "a.mkv", vfr=True, duration=3)
    info = probe(str(clip.path), LIMITS)
    assert info.video is not None
    assert info.packets is not None
    assert info.video.is_vfr
    np.testing.assert_allclose(info.packets.time, clip.times, atol=1.1e-3)


def test_ntsc_rate_is_exact(tmp_path):
    clip = make_clip(tmp_path / "a.mp4", fps=Fraction(30000, 1001), duration=2)
    info = probe(str(clip.path), LIMITS)
    assert info.video is not None
    assert info.video.fps == 30000 / 1001


@pytest.mark.parametrize("rotation", [0, 90, 180, 270])
def test_rotation_swaps_the_displayed_size(tmp_path, rotation):
    clip = make_clip(tmp_path / "a.mp4", rotation=rotation, duration=0.3)
    video = probe(str(clip.path), LIMITS).video
    assert video is not None
    assert video.rotation == rotation
    assert (video.width, video.height) == ((180, 320) if rotation in (90, 270) else (320, 180))


def test_start_offset_does_not_move_the_first_frame_from_zero(tmp_path):
    clip = make_clip(tmp_path / "a.ts", start_time=5.0, duration=1, audio=[Tone(440, 0, 9)])
    info = probe(str(clip.path), LIMITS)
    assert info.packets is not None
    assert info.packets.time[0] == 0
    assert info.packets.pts[0] > 0


def test_audio_only_file_has_no_video(tmp_path):
    for name in ("a.wav", "a.mp3", "a.m4a", "a.ogg", "a.flac"):
        info = probe(str(make_audio(tmp_path / name, duration=1.5).path), LIMITS)
        assert info.video is None
        assert info.packets is None
        assert len(info.audio) == 1
        assert info.audio[0].sample_rate == 48000
        assert info.duration == pytest.approx(1.5, abs=0.1)


def test_cover_art_is_not_video(tmp_path):
    path = tmp_path / "song.mp3"
    with av.open(str(path), "w") as container:
        sound = container.add_stream("libmp3lame", rate=44100)
        cover = container.add_stream("mjpeg", rate=1)
        cover.width, cover.height, cover.pix_fmt = 64, 64, "yuvj420p"
        cover.disposition = av.stream.Disposition.attached_pic
        picture = av.VideoFrame(64, 64, "yuvj420p")
        picture.pts = 0
        for packet in [*cover.encode(picture), *cover.encode()]:
            container.mux(packet)
        samples = av.AudioFrame.from_ndarray(np.zeros((1, 44100), np.float32), "fltp", "mono")
        samples.rate = 44100
        for packet in [*sound.encode(samples), *sound.encode()]:
            container.mux(packet)
    info = probe(str(path), LIMITS)
    assert info.video is None
    assert len(info.audio) == 1


@pytest.mark.parametrize(
    "content",
    [b"", b"not media at all" * 100, b"#EXTM3U\n#EXT-X-TARGETDURATION:9\n#EXTINF:9,\nb.mp4\n"],
)
def test_what_is_not_media_is_unreadable(tmp_path, content):
    path = tmp_path / "a.mp4"
    path.write_bytes(content)
    with pytest.raises(UnreadableMediaError):
        probe(str(path), LIMITS)


def test_a_script_format_cannot_name_another_file(tmp_path):
    make_clip(tmp_path / "secret.mp4", duration=0.2)
    path = tmp_path / "a.mp4"
    path.write_text("ffconcat version 1.0\nfile secret.mp4\n")
    with pytest.raises(UnreadableMediaError):
        probe(str(path), LIMITS)


def test_without_its_index_a_file_is_unreadable_and_with_it_the_first_part_counts(tmp_path):
    plain = make_clip(tmp_path / "plain.mp4", duration=2).path
    with pytest.raises(UnreadableMediaError):
        probe(str(truncate(plain, tmp_path / "cut.mp4")), LIMITS)
    fast = make_clip(tmp_path / "fast.mp4", duration=2, faststart=True).path
    video = probe(str(truncate(fast, tmp_path / "cut2.mp4", keep=0.7)), LIMITS).video
    assert video is not None
    assert 0 < video.num_frames < 60


def test_limits_name_themselves(tmp_path):
    clip = make_clip(tmp_path / "a.mp4", duration=2)
    with pytest.raises(
        MediaTooLongError, match=r"limit of 1 s \(mm_ext.media.decode.max_duration_s\)"
    ):
        probe(str(clip.path), DecodeLimits(max_duration_s=1.0))
    with pytest.raises(MediaTooLargeError, match=r"limit of 1000 pixels"):
        probe(str(clip.path), DecodeLimits(max_pixels=1000))


def test_a_header_that_claims_hours_is_refused(tmp_path):
    path = tmp_path / "a.webm"
    make_clip(path, codec="libvpx-vp9", duration=0.5)
    data = path.read_bytes()
    at = data.index(b"\x44\x89\x88") + 3  # Matroska's Duration, in milliseconds
    path.write_bytes(data[:at] + struct.pack(">d", 5 * 3600 * 1000.0) + data[at + 8 :])
    with pytest.raises(MediaTooLongError):
        probe(str(path), LIMITS)


@pytest.mark.parametrize("box", [b"stsz", b"stts", b"stsc", b"stco", b"stss", b"ctts"])
@pytest.mark.parametrize("count", [0xFFFFFFFF, 0x7FFFFFFF, 0x00FFFFFF])
def test_absurd_sample_counts_do_not_allocate(tmp_path, box, count):
    import resource

    clip = make_clip(tmp_path / "a.mp4", duration=0.5, bframes=2, gop=5)
    data = bytearray(clip.path.read_bytes())
    at = data.index(box) + (12 if box == b"stsz" else 8)
    data[at : at + 4] = struct.pack(">I", count)
    clip.path.write_bytes(data)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with contextlib.suppress(MediaError):
        probe(str(clip.path), LIMITS)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200_000  # KiB


def test_frames_an_edit_list_hides_are_not_counted(tmp_path):
    """A stream copy cut between keyframes keeps the lead-in but hides it."""
    source = make_clip(tmp_path / "a.mp4", duration=2, gop=60).path
    path = tmp_path / "trimmed.mp4"
    with av.open(str(source)) as reader, av.open(str(path), "w") as writer:
        template = reader.streams.video[0]
        stream = writer.add_stream_from_template(template)
        for packet in reader.demux(template):
            if packet.dts is None:
                continue
            shift = int(1 / template.time_base)  # one second: thirty frames lead in
            packet.pts -= shift
            packet.dts -= shift
            packet.stream = stream
            writer.mux(packet)
    info = probe(str(path), LIMITS)
    assert info.video is not None
    assert info.video.num_frames == len(decoded_times(path))


def test_a_header_that_claims_less_than_no_time_counts_as_one_that_claims_none(tmp_path):
    path = make_audio(tmp_path / "a.mkv", duration=1.0, codec="flac").path
    data = bytearray(path.read_bytes())
    place = data.index(b"\x44\x89\x88") + 3  # Matroska's Duration, a float of 8 bytes.
    data[place : place + 8] = struct.pack(">d", -1e9)
    # The duration of the stream itself.
    path.write_bytes(data.replace(b"DURATION", b"DURATIOX"))
    info = probe(str(path), LIMITS)
    assert (info.duration, info.audio[0].duration) == (0, 0)
