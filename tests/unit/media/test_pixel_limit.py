"""The limit on pixels is that of the picture, not of what a decoder allocates for it."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest

from vllm_mm_ext.errors import MediaTooLargeError
from vllm_mm_ext.media.decode.job import run_job
from vllm_mm_ext.media.decode.probe import probe
from vllm_mm_ext.media.types import DecodeLimits, DecodeRequest, SamplingSpec, SizeRule
from vllm_mm_ext.synthetic.encoding import own_priority


def clip(path: Path, codec: str, width: int, height: int) -> Path:
    """Twelve gray pictures: FFmpeg opens no transport stream of less than 10 packets."""
    with own_priority(), av.open(str(path), "w") as writer:
        stream: Any = writer.add_stream(codec, rate=25)
        stream.width, stream.height = width, height
        stream.pix_fmt = "yuvj420p" if codec == "mjpeg" else "yuv420p"
        gray = np.full((height, width, 3), 90, np.uint8)
        for _ in range(12):
            writer.mux(stream.encode(av.VideoFrame.from_ndarray(gray)))
        writer.mux(stream.encode(None))
    return path


def shown(path: Path, max_pixels: int) -> np.ndarray | None:
    limits = DecodeLimits(max_pixels=max_pixels)
    wanted = SamplingSpec("explicit", indices=(0, 11))
    return run_job(str(path), DecodeRequest(wanted, SizeRule(), limits=limits)).frames


@pytest.mark.parametrize(
    ("name", "codec"),
    [
        ("a.ts", "mpeg4"),
        ("a.ts", "mpeg2video"),
        ("a.ts", "libx264"),
        ("a.ts", "libx265"),
        ("a.avi", "msmpeg4v2"),
        ("a.avi", "mjpeg"),
        ("a.webm", "libvpx"),
        ("a.webm", "libvpx-vp9"),
        ("a.mp4", "libsvtav1"),
        ("a.mkv", "ffv1"),
    ],
)
@pytest.mark.parametrize("size", [(64, 64), (318, 178), (1920, 34), (130, 640)])
def test_a_picture_of_exactly_the_limit_is_shown(
    tmp_path: Path, name: str, codec: str, size: tuple[int, int]
) -> None:
    width, height = size
    path = clip(tmp_path / name, codec, width, height)
    frames = shown(path, width * height)
    assert frames is not None
    assert frames.shape == (2, height, width, 3)
    with pytest.raises(MediaTooLargeError, match=f"limit of {width * height - 1} pixels"):
        shown(path, width * height - 1)


def test_a_picture_past_the_limit_is_refused_whatever_the_container_says(tmp_path: Path) -> None:
    path = clip(tmp_path / "a.mp4", "libx264", 320, 180)
    data = bytearray(path.read_bytes())
    struct.pack_into(">HH", data, data.index(b"avc1", data.index(b"stsd")) + 28, 64, 36)
    path.write_bytes(data)
    with pytest.raises(MediaTooLargeError, match="320x180"):
        probe(str(path), DecodeLimits(max_pixels=320 * 180 - 1))
    assert shown(path, 320 * 180) is not None
