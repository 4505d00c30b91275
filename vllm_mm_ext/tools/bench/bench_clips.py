"""Clips the benchmarks use: made once, kept in the work directory, never in a repository."""

from __future__ import annotations

import hashlib
import json
import os
import struct
import tempfile
from pathlib import Path
from typing import Any

import av

from vllm_mm_ext.testing.media import Tone, make_clip


def minute_720p(work_dir: Path, *, sound: bool = False) -> Path:
    """60 s of 1280x720 H.264 at 30 fps, a keyframe every 250 frames, as x264 defaults to."""
    return cached_clip(work_dir, width=1280, height=720, duration=60.0, gop=250, sound=sound)


def other_minute_720p(work_dir: Path, number: int) -> Path:
    """As ``minute_720p``, without a picture in common with it or with those of other numbers.

    A third of it, three times, so that many are made quickly; of 32 frames at even distances no two
    are the same picture.
    """
    third = cached_clip(
        work_dir, width=1280, height=720, duration=20.0, gop=250, seed=2000 + number
    )
    return _repeated(third, 3)


def ten_minutes_720p(work_dir: Path) -> Path:
    """10 min of 1280x720 H.264 at 30 fps, a keyframe every 60 frames.

    One minute, repeated by copying its packets: what a decoder has to do is the same.
    """
    return minutes_720p(work_dir, 10, gop=60)


def minutes_720p(work_dir: Path, minutes: int, *, gop: int = 250) -> Path:
    """The same, of any length, a keyframe every ``gop`` frames."""
    return _repeated(cached_clip(work_dir, width=1280, height=720, duration=60.0, gop=gop), minutes)


def clip_1080p(work_dir: Path) -> Path:
    """30 s of 1920x1080 H.264 at 30 fps, a keyframe every 120 frames."""
    return cached_clip(work_dir, width=1920, height=1080, duration=30.0, gop=120)


def cached_clip(work_dir: Path, *, sound: bool = False, **options: Any) -> Path:
    """The clip ``make_clip`` writes for ``options``, made on first use."""
    # veryfast: with deblocking and CABAC, as clips from cameras and services have.
    options = {"scene": "shapes", "bframes": 2, "seed": 7, "preset": "veryfast", **options}
    text = json.dumps({**options, "sound": sound}, sort_keys=True)
    name = (
        f"{options['width']}x{options['height']}-{hashlib.sha256(text.encode()).hexdigest()[:12]}"
    )
    target = work_dir / "media" / f"{name}.mp4"
    if not target.exists():
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=target.parent) as scratch:
            made = Path(scratch) / target.name
            tones = [Tone(440.0, 0.0, float(options["duration"]))] if sound else None
            make_clip(made, audio=tones, **options)
            made.rename(target)
    return target


def other_pictures(work_dir: Path, number: int, **options: Any) -> Path:
    """A clip without a picture in common with those of other numbers.

    The plugin knows videos by their pictures: to its caches, a ``variant`` of a clip is the clip.
    Few frames a second, so that many are made quickly.

    Args:
        work_dir: As for ``cached_clip``.
        number: Which one.
        options: Of ``cached_clip``; ``width``, ``height`` and ``duration`` at least.
    """
    return cached_clip(work_dir, fps=4, gop=4, seed=1000 + number, **options)


def variant(source: Path, target: Path, number: int) -> Path:
    """A copy that decodes to the same frames and has other bytes.

    An ISO media ``free`` box (ISO/IEC 14496-12, 8.1.2) with the number in it is appended; readers
    skip such boxes. Caches keyed by file see a new video, those keyed by pictures do not: the
    plugin's engine has it already. Where engines are compared, ``other_pictures`` are needed.
    """
    payload = f"variant {number}".encode()
    box = struct.pack(">I4s", 8 + len(payload), b"free") + payload
    target.write_bytes(source.read_bytes() + box)
    # Nobody waits for the disk in the middle of a measurement.
    with open(target, "rb") as written:
        os.fsync(written.fileno())
    return target


def _repeated(source: Path, times: int) -> Path:
    """A clip one time after the other, made of its packets on first use and kept beside it."""
    target = source.with_name(f"{source.stem}-x{times}.mp4")
    if target.exists():
        return target
    with tempfile.TemporaryDirectory(dir=target.parent) as scratch:
        made = Path(scratch) / target.name
        with av.open(str(made), "w") as output:
            offset = 0
            stream = None
            for _ in range(times):
                with av.open(str(source)) as container:
                    video = container.streams.video[0]
                    if stream is None:
                        stream = output.add_stream_from_template(video)
                    assert video.time_base is not None
                    assert video.average_rate is not None
                    length = round(video.frames / video.average_rate / video.time_base)
                    for packet in container.demux(video):
                        if packet.dts is None or packet.pts is None:
                            continue
                        packet.pts += offset
                        packet.dts += offset
                        packet.stream = stream
                        output.mux(packet)
                    offset += length
        made.rename(target)
    return target
