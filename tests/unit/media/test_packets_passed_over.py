"""What a container gives its decoder once reaches the decoder whatever frames are wanted."""

from __future__ import annotations

from contextlib import closing
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest

from vllm_mm_ext.media.decode.decoders import read_plan
from vllm_mm_ext.media.decode.decoders.kept_reader import KeptReader
from vllm_mm_ext.media.decode.decoders.pyav_decoder import PyAVDecoder
from vllm_mm_ext.media.decode.probe import probe
from vllm_mm_ext.media.types import DecodeLimits

LIMITS = DecodeLimits()


def decoded(path: Path, rows: list[int]) -> np.ndarray:
    info = probe(str(path), LIMITS)
    assert info.video is not None
    out = np.zeros((len(rows), info.video.height, info.video.width, 3), np.uint8)
    decoder = PyAVDecoder(LIMITS.max_pixels)
    found = decoder.decode(str(path), info, np.array(rows), None, out, 1)
    assert found.tolist() == list(range(len(rows)))
    return out


def with_palette(path: Path) -> Path:
    """12 pictures of 256 colours, each of one colour; AVI tells the colours in front."""
    colours = np.full((256, 4), 255, np.uint8)
    colours[:, 1:] = np.arange(256)[:, None] * 7 % 256
    with av.open(str(path), "w") as writer:
        stream: Any = writer.add_stream("rawvideo", rate=25)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "pal8"
        for number in range(12):
            picture: Any = np.full((48, 64), number, np.uint8), colours
            writer.mux(stream.encode(av.VideoFrame.from_ndarray(picture, "pal8")))
        writer.mux(stream.encode(None))
    return path


@pytest.mark.parametrize("rows", [[0, 5, 11], [5], [3, 4], [11]], ids=str)
def test_colours_that_only_the_first_packet_brings_are_those_of_all_frames(
    tmp_path: Path, rows: list[int]
) -> None:
    frames = decoded(with_palette(tmp_path / "a.avi"), rows)
    assert frames[:, 0, 0, 0].tolist() == [7 * row for row in rows]


def joined(tmp_path: Path) -> Path:
    """FLV names new parameters of H.264 once, when a stream is taken up again at another size."""
    parts = []
    for number, (width, height) in enumerate([(64, 48), (96, 80)]):
        path = tmp_path / f"{number}.flv"
        with av.open(str(path), "w") as writer:
            stream: Any = writer.add_stream("libx264", rate=25, options={"g": "5", "bf": "0"})
            stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
            stream.codec_context.flags |= 1 << 22  # Parameters in the header alone.
            for picture in range(25):
                gray = np.full((height, width, 3), 60 + 90 * number + 2 * picture, np.uint8)
                frame = av.VideoFrame.from_ndarray(gray)
                writer.mux(stream.encode(frame))
            writer.mux(stream.encode(None))
        parts.append(path.read_bytes())
    both = tmp_path / "both.flv"
    both.write_bytes(parts[0] + later(parts[1], 1000))
    return both


def shades(rows: list[int]) -> list[int]:
    return [60 + 2 * row if row < 25 else 150 + 2 * (row - 25) for row in rows]


@pytest.mark.parametrize("far", [False, True], ids=["near", "far"])
@pytest.mark.parametrize("rows", [[30], [40], [26, 49], [0, 30]], ids=str)
def test_parameters_that_come_where_recordings_are_joined_hold_from_there_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rows: list[int], far: bool
) -> None:
    if far:
        monkeypatch.setattr(read_plan, "SEEK_OVER_PACKETS", 3)
    found = decoded(joined(tmp_path), rows)[:, 20, 20, 0]
    np.testing.assert_allclose(found, shades(rows), atol=4)


def test_they_hold_in_spans_of_a_file_that_stays_open(tmp_path: Path) -> None:
    path = joined(tmp_path)
    info = probe(str(path), LIMITS)
    assert info.packets is not None
    with closing(KeptReader(str(path), 0, info.packets, LIMITS.max_pixels, 1)) as reader:
        for rows in ([20, 22], [26, 30], [45], [3], [31]):
            reader.begin((rows[0] / 25, (rows[-1] + 1) / 25), 0)
            found: dict[int, int] = {}

            def emit(row: int, frame: av.VideoFrame, _: Any, found: dict[int, int] = found) -> None:
                found[row] = int(frame.to_ndarray(format="rgb24")[20, 20, 0])

            assert reader.read(np.array(rows), emit, set()) == set(rows)
            np.testing.assert_allclose([found[row] for row in rows], shades(rows), atol=4)


def later(flv: bytes, milliseconds: int) -> bytes:
    """The tags of an FLV file, moved in time."""
    data, at = bytearray(flv[13:]), 0
    while at < len(data):
        size = int.from_bytes(data[at + 1 : at + 4], "big")
        stamp = int.from_bytes(data[at + 4 : at + 7], "big") + milliseconds
        data[at + 4 : at + 7] = stamp.to_bytes(3, "big")
        at += 11 + size + 4
    return bytes(data)
