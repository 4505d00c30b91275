"""Media of a workload as files: no two of them have a picture or a sound in common."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from PIL import Image as Pictures

from vllm_mm_ext.planner.workload import Image, Video, Workload
from vllm_mm_ext.testing.media import Tone, make_audio
from vllm_mm_ext.tools.bench.bench_clips import cached_clip

# FFmpeg's encoders of the codecs that a workload names.
_ENCODERS = {
    "h264": "libx264",
    "hevc": "libx265",
    "vp9": "libvpx-vp9",
    "av1": "libsvtav1",
    "mpeg4": "mpeg4",
}
# As x264 sets keyframes by default.
_GOP = 250
# One shade in so many pixels of a picture: files about as large as photographs.
_SHADE = 8


def parts_of(workload: Workload, folder: Path, number: int) -> list[dict[str, object]]:
    """Content parts of a chat message with the media of a request, made where they are missing.

    Args:
        workload: What a request holds.
        folder: Where files are kept.
        number: Media of different numbers have nothing in common.
    """
    parts: list[dict[str, object]] = []
    seed = 97 * number
    for video in workload.videos:
        seed += 1
        parts.append(
            {"type": "video_url", "video_url": {"url": clip(video, folder, seed).as_uri()}}
        )
    for seconds in workload.audios:
        seed += 1
        url = sound(seconds, folder, seed).as_uri()
        parts.append({"type": "audio_url", "audio_url": {"url": url}})
    for image in workload.images:
        seed += 1
        url = picture(image, folder, seed).as_uri()
        parts.append({"type": "image_url", "image_url": {"url": url}})
    return parts


def clip(video: Video, folder: Path, seed: int) -> Path:
    """The file of a video."""
    with _silent():
        return cached_clip(
            folder,
            width=video.width,
            height=video.height,
            fps=video.source_fps,
            duration=video.seconds,
            codec=_ENCODERS[video.codec],
            gop=_GOP,
            sound=video.sound,
            seed=seed,
        ).absolute()


@contextmanager
def _silent() -> Iterator[None]:
    """Keep off the terminal what encoder libraries print about themselves."""
    sys.stderr.flush()
    kept = os.dup(2)
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(nowhere)
        os.close(kept)


def sound(seconds: float, folder: Path, seed: int) -> Path:
    """The file of a sound."""
    file = folder.absolute() / "media" / f"sound-{seconds:g}s-{seed}.mp3"
    if not file.exists():
        file.parent.mkdir(parents=True, exist_ok=True)
        hertz = np.random.default_rng(seed).uniform(200.0, 4000.0, 3)
        made = file.with_suffix(".part.mp3")
        make_audio(made, duration=seconds, tones=[Tone(float(hz), 0.0, 1e9, 0.3) for hz in hertz])
        made.rename(file)
    return file


def picture(image: Image, folder: Path, seed: int) -> Path:
    """The file of an image."""
    file = folder.absolute() / "media" / f"picture-{image.width}x{image.height}-{seed}.jpg"
    if not file.exists():
        file.parent.mkdir(parents=True, exist_ok=True)
        coarse = (image.height // _SHADE + 1, image.width // _SHADE + 1, 3)
        shades = np.random.default_rng(seed).integers(0, 256, coarse, dtype=np.uint8)
        made = file.with_suffix(".part.jpg")
        Pictures.fromarray(shades).resize((image.width, image.height)).save(made, quality=90)
        made.rename(file)
    return file
