"""Media no server should trip over: mutated, truncated and mislabelled files, and bombs."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import av
import numpy as np

from vllm_mm_ext.testing.media import Tone, make_audio, make_clip, mutate

Kind = Literal["mutated", "header", "truncated", "not media", "bomb"]


@dataclass(frozen=True)
class BadFile:
    """A file to send, and how: as ``video`` or as ``audio``."""

    path: Path
    modality: Literal["video", "audio"]
    kind: Kind


def base_files(directory: Path) -> list[tuple[Path, Literal["video", "audio"]]]:
    """Small intact files of several containers and codecs, to be damaged."""
    directory.mkdir(parents=True, exist_ok=True)
    tone = [Tone(440.0, 0.0, 1.0)]
    files: list[tuple[Path, Literal["video", "audio"]]] = []
    for name, options in {
        "h264.mp4": {"codec": "libx264", "bframes": 2, "audio": tone},
        "mpeg4.avi": {"codec": "mpeg4"},
        "vp9.webm": {"codec": "libvpx-vp9"},
        "mjpeg.mkv": {"codec": "mjpeg"},
    }.items():
        path = directory / name
        if not path.exists():
            make_clip(path, width=160, height=96, fps=12, duration=1.5, gop=12, **options)  # type: ignore[arg-type]
        files.append((path, "video"))
    for name in ("tone.wav", "tone.mp3", "tone.ogg", "tone.m4a"):
        path = directory / name
        if not path.exists():
            make_audio(path, duration=1.0, tones=tone)
        files.append((path, "audio"))
    return files


def bad_files(directory: Path, count: int, seed: int = 0) -> Iterator[BadFile]:
    """Write and yield ``count`` damaged files, bombs and impostors first.

    Args:
        directory: Where the files go.
        count: How many in all.
        seed: Same seed, same bytes.
    """
    directory.mkdir(parents=True, exist_ok=True)
    made = 0
    for bad in [*impostors(directory), *bombs(directory)]:
        if made == count:
            return
        made += 1
        yield bad
    bases = base_files(directory / "base")
    rng = np.random.default_rng(seed)
    kinds: tuple[Kind, ...] = ("mutated", "header", "truncated")
    while made < count:
        source, modality = bases[made % len(bases)]
        kind = kinds[(made // len(bases)) % len(kinds)]
        data = source.read_bytes()
        if kind == "mutated":
            data = mutate(data, int(rng.integers(1 << 31)), changes=int(2 ** rng.integers(0, 9)))
        elif kind == "truncated":
            data = data[: int(len(data) * rng.random())]
        else:
            head = int(rng.integers(16, 512))
            data = mutate(data[:head], int(rng.integers(1 << 31)), changes=8) + data[head:]
        path = directory / f"{made:05d}-{kind}{source.suffix}"
        path.write_bytes(data)
        made += 1
        yield BadFile(path, modality, kind)


def impostors(directory: Path) -> Iterator[BadFile]:
    """Files that are not media at all, named as if they were."""
    contents = {
        "empty.mp4": b"",
        "one-byte.mp4": b"\x00",
        "text.mp4": b"This is not a video.\n" * 100,
        "page.webm": b"<!doctype html><title>404</title>" * 50,
        "json.mkv": b'{"error": "not found"}' * 50,
        "zeros.mp4": bytes(1 << 16),
        "noise.avi": np.random.default_rng(1).bytes(1 << 16),
        "script.wav": b"#!/bin/sh\necho hello\n",
        "playlist.mp4": b"#EXTM3U\n#EXT-X-TARGETDURATION:10\n#EXTINF:10,\nfile:///etc/passwd\n",
        "concat.mp4": b"ffconcat version 1.0\nfile /etc/passwd\n",
        "sdp.mp4": b"v=0\no=- 0 0 IN IP4 127.0.0.1\ns=x\nm=video 5004 RTP/AVP 96\n",
    }
    for name, data in contents.items():
        path = directory / name
        path.write_bytes(data)
        yield BadFile(path, "audio" if path.suffix == ".wav" else "video", "not media")


def bombs(directory: Path) -> Iterator[BadFile]:
    """Small files that ask for a lot: pixels, hours, or hours of sound."""
    huge = directory / "huge-frame.mkv"
    _still(huge, 16_384, 12_288)
    yield BadFile(huge, "video", "bomb")
    long = directory / "ten-hours.mp4"
    _sparse(long, hours=10.0)
    yield BadFile(long, "video", "bomb")
    claimed = directory / "claimed-frames.mp4"
    _claim_many_frames(claimed)
    yield BadFile(claimed, "video", "bomb")
    silence = directory / "silence.flac"
    make_audio(silence, duration=3 * 3600.0, tones=(), sample_rate=8000)
    yield BadFile(silence, "audio", "bomb")


def _still(path: Path, width: int, height: int) -> None:
    with av.open(str(path), "w") as container:
        stream = container.add_stream("ffv1", rate=1)
        stream.width, stream.height, stream.pix_fmt = width, height, "gray"
        frame = av.VideoFrame.from_ndarray(np.zeros((height, width), np.uint8), format="gray")
        for packet in [*stream.encode(frame), *stream.encode(None)]:
            container.mux(packet)


def _sparse(path: Path, *, hours: float) -> None:
    """Two frames, hours apart."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=1)
        stream.width, stream.height, stream.pix_fmt = 64, 64, "yuv420p"
        for second in (0, int(hours * 3600)):
            frame = av.VideoFrame.from_ndarray(np.zeros((64, 64, 3), np.uint8), format="rgb24")
            frame.pts = second
            for packet in stream.encode(frame):
                container.mux(packet)
        for packet in stream.encode(None):
            container.mux(packet)


def _claim_many_frames(path: Path) -> None:
    """An MP4 whose sample tables claim two billion frames."""
    make_clip(path, width=64, height=64, fps=10, duration=1.0, gop=5)
    data = bytearray(path.read_bytes())
    for box in (b"stts", b"stsz", b"stco"):
        at = data.find(box)
        if at > 0:
            # version/flags, then (for stsz) a sample size, then the entry count.
            offset = at + 8 + (4 if box == b"stsz" else 0)
            data[offset : offset + 4] = struct.pack(">I", 2_000_000_000)
    path.write_bytes(bytes(data))
