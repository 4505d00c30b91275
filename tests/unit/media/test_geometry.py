"""A video's displayed size and orientation are those that a player shows."""

from __future__ import annotations

import struct
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest

from tests.support.transport_streams import copied
from vllm_mm_ext.media.decode.geometry import stretched
from vllm_mm_ext.media.decode.job import run_job
from vllm_mm_ext.media.decode.probe import probe
from vllm_mm_ext.media.types import (
    DecodeLimits,
    DecodeRequest,
    MediaInfo,
    PictureRules,
    SamplingSpec,
    SizeRule,
)
from vllm_mm_ext.testing.media import make_clip

LIMITS = DecodeLimits()
# Where the matrix puts a point: (x, y) goes to (a x + c y, b x + d y).
MATRICES = {
    "upright": (1, 0, 0, 1),
    "mirrored": (-1, 0, 0, 1),
    "upside down": (-1, 0, 0, -1),
    "upside down, mirrored": (1, 0, 0, -1),
    "quarter turn": (0, 1, -1, 0),
    "quarter turn, mirrored": (0, -1, -1, 0),
    "three quarter turns": (0, -1, 1, 0),
    "three quarter turns, mirrored": (0, 1, 1, 0),
}


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_clip(tmp_path_factory.mktemp("clip") / "a.mp4", duration=0.3, gop=5).path


def shown(path: Path, *, frames: tuple[int, ...] = (0,), **rules: bool) -> np.ndarray:
    """Frames at their native size."""
    sampling = SamplingSpec("explicit", indices=frames)
    request = DecodeRequest(sampling, SizeRule(), threads=1, picture=PictureRules(**rules))
    pictures = run_job(str(path), request).frames
    assert pictures is not None
    return pictures


def copy(source: Path, target: Path, matrix: tuple[int, ...] | None = None) -> Path:
    """Copy the packets of a file into another container, with a display matrix."""
    with av.open(str(source)) as reader, av.open(str(target), "w") as writer:
        stream = writer.add_stream_from_template(reader.streams.video[0])
        if matrix is not None:
            a, b, c, d = (65536 * value for value in matrix)
            stream.set_display_matrix((a, b, 0, c, d, 0, 0, 0, 1 << 30))
        for packet in reader.demux(video=0):
            if packet.dts is not None:
                packet.stream = stream
                writer.mux(packet)
    return target


def placed(picture: np.ndarray, matrix: tuple[int, ...]) -> np.ndarray:
    """Every pixel of a picture where the matrix puts it."""
    a, b, c, d = matrix
    y, x = np.indices(picture.shape[:2])
    across, down = a * x + c * y, b * x + d * y
    across, down = across - across.min(), down - down.min()
    out = np.empty((down.max() + 1, across.max() + 1, 3), np.uint8)
    out[down, across] = picture
    return out


@pytest.mark.parametrize("suffix", ["mp4", "mkv"])
@pytest.mark.parametrize("name", MATRICES)
def test_all_eight_orientations_are_shown(
    tmp_path: Path, clip: Path, name: str, suffix: str
) -> None:
    path = copy(clip, tmp_path / f"a.{suffix}", MATRICES[name])
    pictures = shown(path, frames=(0, 7))
    for picture, stored in zip(pictures, shown(clip, frames=(0, 7)), strict=True):
        np.testing.assert_array_equal(picture, placed(stored, MATRICES[name]))
    video = probe(str(path), LIMITS).video
    assert video is not None
    assert (video.height, video.width) == pictures.shape[1:3]
    assert video.plain == (name == "upright")


def test_an_orientation_that_only_the_bitstream_tells_is_shown(tmp_path: Path, clip: Path) -> None:
    """An SEI message with the first picture counts for those after it, too."""
    # Payload type 47, 4 bytes: not cancelled, mirrored left to right, not upside down, a quarter
    # turn counter-clockwise, until the next one.
    bits = f"{0b010:03b}{0x4000:016b}" + "010" + "0"
    data = int(bits.ljust(32, "1")[:23] + "1" + "0" * 8, 2).to_bytes(4, "big")[:3]
    message = bytes([6, 47, len(data)]) + data + b"\x80"
    path = tmp_path / "sei.mp4"
    with av.open(str(clip)) as reader, av.open(str(path), "w") as writer:
        stream = writer.add_stream_from_template(reader.streams.video[0])
        first = True
        for packet in reader.demux(video=0):
            if packet.dts is None:
                continue
            fresh = packet
            if first:
                fresh = av.Packet(struct.pack(">I", len(message)) + message + bytes(packet))
                fresh.pts, fresh.dts, fresh.time_base = packet.pts, packet.dts, packet.time_base
                fresh.is_keyframe, fresh.duration, first = True, packet.duration, False
            fresh.stream = stream
            writer.mux(fresh)
    pictures = shown(path, frames=(0, 2))
    assert pictures.shape[1:3] == (320, 180)
    stored = shown(clip, frames=(0, 2))
    for picture, flat in zip(pictures, stored, strict=True):
        np.testing.assert_array_equal(picture, np.rot90(flat[:, ::-1]))


def test_side_data_without_a_name_hide_no_orientation(tmp_path: Path) -> None:
    """FFmpeg hands the EXIF tags of a JPEG on as a kind of side data that PyAV does not name."""
    source = make_clip(tmp_path / "a.avi", codec="mjpeg", duration=0.2).path
    mirrored = 2
    tags = struct.pack("<4sIHHHIHHI", b"II*\0", 8, 1, 0x0112, 3, 1, mirrored, 0, 0)
    tags = b"Exif\0\0" + tags
    segment = b"\xff\xe1" + struct.pack(">H", len(tags) + 2) + tags
    path = tmp_path / "exif.avi"
    with av.open(str(source)) as reader, av.open(str(path), "w") as writer:
        stream = writer.add_stream_from_template(reader.streams.video[0])
        for packet in reader.demux(video=0):
            if packet.dts is None:
                continue
            data = bytes(packet)
            tagged = av.Packet(data[:2] + segment + data[2:])
            tagged.pts, tagged.dts, tagged.time_base = packet.pts, packet.dts, packet.time_base
            tagged.is_keyframe, tagged.stream = True, stream
            writer.mux(tagged)
    np.testing.assert_array_equal(shown(path), shown(source)[:, :, ::-1])


def anamorphic(path: Path, *, container: tuple[int, int] | None, bitstream: str | None) -> Path:
    """A picture of 64x48, all white, with the shape of its pixels told by one or both."""
    with av.open(str(path), "w") as writer:
        stream = writer.add_stream("libx264", rate=10)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        stream.codec_context.options = {"x264-params": f"sar={bitstream}"} if bitstream else {}
        for number in range(3):
            picture = av.VideoFrame.from_ndarray(np.full((48, 64, 3), 255, np.uint8))
            picture.pts = number
            writer.mux(stream.encode(picture))
        writer.mux(stream.encode(None))
    if container is not None:
        path.write_bytes(boxed(path, struct.pack(">I4sII", 16, b"pasp", *container)))
    return path


@pytest.mark.parametrize(
    ("suffix", "container", "bitstream", "size"),
    [
        ("mp4", None, None, (64, 48)),
        ("mp4", None, "2/1", (128, 48)),
        ("ts", None, "2/1", (128, 48)),
        ("ts", None, "1/2", (64, 96)),
        ("mp4", (1, 2), "2/1", (64, 96)),
        ("mp4", (1, 1), "2/1", (64, 48)),
    ],
)
def test_pixels_that_are_not_square_are_stretched_and_the_container_wins(
    tmp_path: Path,
    suffix: str,
    container: tuple[int, int] | None,
    bitstream: str | None,
    size: tuple[int, int],
) -> None:
    path = anamorphic(tmp_path / f"a.{suffix}", container=container, bitstream=bitstream)
    assert shown(path).shape[1:3] == size[::-1]
    assert shown(path).min() > 250
    assert shown(path, stretch=False).shape[1:3] == (48, 64)


def test_the_shape_of_pixels_is_told_by_the_first_group_of_pictures_that_is_whole(
    tmp_path: Path,
) -> None:
    """A recording that was joined 90 pictures before a keyframe."""
    source = tmp_path / "whole.ts"
    with av.open(str(source), "w") as writer:
        stream = writer.add_stream("libx264", rate=30)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        stream.codec_context.options = {"x264-params": "sar=2/1:keyint=120:scenecut=0"}
        for number in range(150):
            picture = av.VideoFrame.from_ndarray(np.full((48, 64, 3), number, np.uint8))
            picture.pts = number
            writer.mux(stream.encode(picture))
        writer.mux(stream.encode(None))
    path = tmp_path / "joined.ts"
    begin = probe(str(source), LIMITS).video
    assert begin is not None
    copied(source, path, wanted=lambda _, seconds: seconds - begin.start > 0.99)
    video = probe(str(path), LIMITS).video
    assert video is not None
    assert video.num_frames == 30
    assert (video.width, video.height, video.sample_aspect) == (128, 48, 2.0)
    assert shown(path).shape[1:3] == (48, 128)


@pytest.mark.parametrize("aspect", [16 / 11, 8 / 9, 1e-4, 255.0])
def test_a_stretched_picture_has_its_shape_within_the_limit_of_pixels(aspect: float) -> None:
    width, height = stretched(720, 576, aspect, 1 << 20)
    assert width * height <= max(1 << 20, 720 * 576)
    shape = 720 / 576 * aspect
    assert abs(width - height * shape) <= max(1, shape)
    if 0.5 < aspect < 2:
        assert width >= 720
        assert height >= 576


def boxed(path: Path, box: bytes) -> bytes:
    """The bytes of an MP4 file with a box added to its video's sample entry."""
    data = bytearray(path.read_bytes())
    at, end, opened = 0, len(data), []
    for name in (b"moov", b"trak", b"mdia", b"minf", b"stbl", b"stsd", b"avc1"):
        while data[at + 4 : at + 8] != name:
            at += int.from_bytes(data[at : at + 4], "big")
            assert at < end
        opened.append(at)
        at += 16 if name == b"stsd" else 8
    last = opened[-1] + int.from_bytes(data[opened[-1] : opened[-1] + 4], "big")
    data[last:last] = box
    for start in opened:
        size = int.from_bytes(data[start : start + 4], "big") + len(box)
        data[start : start + 4] = size.to_bytes(4, "big")
    return bytes(data)


def clean_aperture(width: int, height: int, right: int, down: int) -> bytes:
    """The box ``clap``: size of what is shown, and how far its centre lies off the picture's."""
    return struct.pack(">I4sIIIIiIiI", 40, b"clap", width, 1, height, 1, right, 1, down, 1)


def test_a_clean_aperture_is_all_that_is_shown(tmp_path: Path, clip: Path) -> None:
    path = tmp_path / "clap.mp4"
    path.write_bytes(boxed(clip, clean_aperture(300, 160, 2, -3)))
    video = probe(str(path), LIMITS).video
    assert video is not None
    assert (video.width, video.height, video.crop) == (300, 160, (12, 8, 7, 13))
    stored, cut = shown(clip)[0], shown(path)[0]
    # Chroma of 4:2:0 may lie half a pixel off after a cut at an odd line.
    assert np.abs(stored[7:167, 12:312].astype(int) - cut).mean() < 2


def test_a_crop_that_leaves_nothing_is_left_out(tmp_path: Path, clip: Path) -> None:
    path = tmp_path / "clap.mp4"
    path.write_bytes(boxed(clip, clean_aperture(1, 1, 100_000, 0)))
    np.testing.assert_array_equal(shown(path), shown(clip))


def test_what_the_bitstream_cuts_off_is_cut_off_to_the_column(tmp_path: Path) -> None:
    """FFmpeg by itself rounds the columns at the left down to what is convenient in memory."""
    wide = np.zeros((96, 160, 3), np.uint8)
    wide[:, 20:144] = 200
    wide[6:, 20:24] = wide[6:, 140:144] = 90
    path = tmp_path / "wide.mp4"
    with av.open(str(path), "w") as writer:
        stream = writer.add_stream("libx264", rate=25)
        stream.options = {"x264-params": "crop-rect=20,6,16,0", "crf": "1"}
        stream.width, stream.height, stream.pix_fmt = 160, 96, "yuv420p"
        for _ in range(3):
            writer.mux(stream.encode(av.VideoFrame.from_ndarray(wide)))
        writer.mux(stream.encode(None))
    (picture,) = shown(path)
    assert picture.shape == (90, 124, 3)
    for column, shade in ((0, 90), (3, 90), (5, 200), (118, 200), (120, 90), (123, 90)):
        assert np.abs(picture[:, column].astype(int) - shade).max() < 12, column


def test_the_bitstream_tells_the_size_where_the_container_says_another(
    tmp_path: Path, clip: Path
) -> None:
    data = bytearray(clip.read_bytes())
    struct.pack_into(">HH", data, data.index(b"avc1", data.index(b"stsd")) + 28, 64, 36)
    path = tmp_path / "lie.mp4"
    path.write_bytes(data)
    np.testing.assert_array_equal(shown(path), shown(clip))


@pytest.mark.parametrize(
    ("later", "inner"),
    [
        ((96, 32), (slice(13, 34), slice(0, 64))),
        ((48, 64), (slice(0, 48), slice(14, 50))),
        ((128, 96), (slice(0, 48), slice(0, 64))),
        ((720, 576), (slice(0, 48), slice(0, 64))),  # of pixels that are hardly square
    ],
)
def test_pictures_that_change_size_midway_are_fitted_to_the_first_ones(
    tmp_path: Path, later: tuple[int, int], inner: tuple[slice, slice]
) -> None:
    parts = []
    for number, (width, height) in enumerate([(64, 48), later]):
        path = tmp_path / f"{number}.h264"
        with av.open(str(path), "w") as writer:
            stream = writer.add_stream("libx264", rate=10)
            stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
            gray = np.full((height, width, 3), 60 + 120 * number, np.uint8)
            for _ in range(3):
                writer.mux(stream.encode(av.VideoFrame.from_ndarray(gray)))
            writer.mux(stream.encode(None))
        parts.append(path.read_bytes())
    both = tmp_path / "both.h264"
    both.write_bytes(b"".join(parts))
    pictures = shown(both, frames=(0, 5))
    assert pictures.shape == (2, 48, 64, 3)
    assert np.abs(pictures[0].astype(int) - 60).max() < 4
    filled = np.zeros((48, 64, 1), bool)
    filled[inner] = True
    assert np.abs(pictures[1].astype(int) - np.where(filled, 180, 0)).max() < 4


@pytest.mark.parametrize("grows", [True, False])
def test_a_call_that_begins_with_small_pictures_is_shown_at_the_size_that_it_comes_to(
    tmp_path: Path, grows: bool
) -> None:
    large = (128, 72) if grows else (32, 18)
    path = tmp_path / "a.webm"
    with av.open(str(path), "w") as writer:
        stream: Any = writer.add_stream("libvpx", rate=10)
        stream.width, stream.height, stream.pix_fmt = 128, 72, "yuv420p"
        for number, (width, height) in enumerate([(32, 18), (32, 18), large]):
            encoder: Any = av.CodecContext.create("libvpx", "w")
            encoder.width, encoder.height, encoder.pix_fmt = width, height, "yuv420p"
            encoder.time_base = Fraction(1, 10)
            stripes = np.zeros((height, width, 3), np.uint8)
            stripes[:, ::4] = stripes[:, 1::4] = 200
            for packet in [*encoder.encode(av.VideoFrame.from_ndarray(stripes)), *encoder.encode()]:
                packet.stream, packet.pts, packet.dts = stream, number, number
                packet.time_base = Fraction(1, 10)
                writer.mux(packet)
    pictures = shown(path, frames=(0, 2))
    assert pictures.shape == (2, *reversed(large), 3)
    assert pictures[1].std() > 80


def test_a_file_without_a_picture_that_decodes_is_described_by_its_container(
    tmp_path: Path, clip: Path
) -> None:
    info: MediaInfo = probe(str(clip), DecodeLimits(max_pixels=320 * 180))
    assert info.video is not None
    data = bytearray(clip.read_bytes())
    start = data.index(b"mdat")
    data[start + 8 : start + 4000] = bytes(3992)
    path = tmp_path / "broken.mp4"
    path.write_bytes(data)
    broken = probe(str(path), LIMITS).video
    assert broken is not None
    assert (broken.width, broken.height) == (320, 180)


def test_rounding_to_the_display_shape_passes_no_limit() -> None:
    for aspect in (0.3, 0.7, 1.013, 1.37, 1e-9, 1e9):
        for width, height in ((10, 10), (101, 7), (64, 36)):
            wide, high = stretched(width, height, aspect, width * height)
            assert 0 < wide * high <= width * height
