"""A file's sound and pictures as a microphone and a camera would deliver them."""

from __future__ import annotations

import io
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image

from vllm_mm_ext.errors import NoSuchStreamError
from vllm_mm_ext.media.audio.conversion import convert_rate
from vllm_mm_ext.media.decode.job import run_job
from vllm_mm_ext.media.types import DecodeLimits, DecodeRequest, SamplingSpec, SizeRule
from vllm_mm_ext.tools.cli.live_client import RATE
from vllm_mm_ext.tools.cli.pcm import pcm16

_LONGEST_S = 4 * 3600.0
# Pictures of so many seconds are decoded at a time.
_PIECE_S = 20.0
_MAX_FRAMES = 1200
_LIMITS = DecodeLimits(
    timeout_s=600.0, max_audio_s=_LONGEST_S, max_duration_s=_LONGEST_S, max_frames=_MAX_FRAMES
)
_QUALITY = 85


def sound_of(path: Path) -> bytes:
    """The sound of a file: PCM of 16 bits, mono, ``RATE``.

    Raises:
        MediaError: The file cannot be read, or has no sound.
    """
    result = run_job(str(path), DecodeRequest(audio="required", limits=_LIMITS))
    assert result.audio is not None
    return pcm16(convert_rate(result.audio, result.audio_rate, RATE))


def pictures_of(path: Path, fps: float, edge: int) -> Iterator[tuple[float, bytes]]:
    """Pictures of a file with their times, as JPEG, decoded piece by piece.

    Args:
        path: The file.
        fps: Pictures per second.
        edge: Pixels of the longer edge at most.

    Raises:
        MediaError: The file cannot be read, or has no pictures.
    """
    info = run_job(str(path), DecodeRequest(probe_only=True, limits=_LIMITS)).info
    if info.video is None:
        raise NoSuchStreamError("The media has no video stream.", parameter="video_url")
    # A whole number of steps, so that pictures keep their distance from piece to piece.
    piece = max(1, round(_PIECE_S * fps)) / fps
    start = 0.0
    while start < info.video.duration - 1e-3:
        spec = SamplingSpec(
            policy="uniform",
            fps=fps,
            min_frames=1,
            max_frames=_MAX_FRAMES,
            span=(start, min(start + piece, info.video.duration)),
        )
        size = SizeRule(kind="max_edge", max_edge=edge)
        request = DecodeRequest(sampling=spec, size=size, info=info, limits=_LIMITS)
        result = run_job(str(path), request)
        assert result.selection is not None
        assert result.frames is not None
        for time, pixels in zip(result.selection.times, result.frames, strict=True):
            yield start + float(time), jpeg(pixels)
        start += piece


def jpeg(pixels: np.ndarray[tuple[int, ...], np.dtype[np.uint8]]) -> bytes:
    """A picture, uint8 RGB ``[height, width, 3]``, as a JPEG file."""
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "JPEG", quality=_QUALITY)
    return buffer.getvalue()
