"""From how much work on a GPU decodes a video faster than the CPU, by codec, on this machine."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import numpy.typing as npt

from vllm_mm_ext.media.decode.decoders import get_decoder, nvdec_device
from vllm_mm_ext.media.decode.decoders.nvdec_decoder import work
from vllm_mm_ext.media.decode.probe import probe
from vllm_mm_ext.media.types import DecodeLimits, MediaInfo
from vllm_mm_ext.tools.bench.harness import Row

_LIMITS = DecodeLimits()
# Height and width of the frames that models get, about.
_SIZE = (252, 448)


class Point(NamedTuple):
    """Decode times of one choice of frames.

    Attributes:
        codec: FFmpeg codec name.
        megapixels: What had to be decoded.
        cpu_s, gpu_s: Seconds that PyAV and NVDEC took.
        same: Whether both returned the same frames.
    """

    codec: str
    megapixels: float
    cpu_s: list[float]
    gpu_s: list[float]
    same: bool


def why_no_gpu() -> str:
    """Why this process cannot decode on a GPU; empty if it can."""
    os.environ.setdefault(nvdec_device.VISIBLE_DEVICES, "0")
    try:
        nvdec_device.gpu()
    except nvdec_device.NoGpuError as error:
        return str(error)
    return ""


def measure(clip: Path, repeats: int) -> Iterator[Point]:
    """Decode the last frames of one, some and all GOPs of a clip, on the CPU and on the GPU.

    Args:
        clip: A video of several GOPs.
        repeats: Measurements of each side, interleaved, after one warm-up each.
    """
    info = probe(str(clip), _LIMITS)
    assert info.video is not None
    assert info.packets is not None
    keys = np.flatnonzero(info.packets.is_key)
    ends = np.append(keys[1:], len(info.packets)) - 1
    for count in sorted({1, (len(ends) + 1) // 2, len(ends)}):
        rows = ends[:count].astype(np.int64)
        cpu_s: list[float] = []
        gpu_s: list[float] = []
        cpu, _, _ = _decode("pyav", clip, info, rows)
        gpu, _, name = _decode("nvdec", clip, info, rows)
        if name != "nvdec":
            return  # The GPU does not take the clip.
        for _ in range(repeats):
            cpu_s.append(_decode("pyav", clip, info, rows)[1])
            gpu_s.append(_decode("nvdec", clip, info, rows)[1])
        megapixels = work(info.packets, rows, info.video)
        yield Point(info.video.codec, megapixels, cpu_s, gpu_s, bool(np.array_equal(cpu, gpu)))


def _decode(
    backend: Literal["pyav", "nvdec"], clip: Path, info: MediaInfo, rows: npt.NDArray[np.int64]
) -> tuple[npt.NDArray[np.uint8], float, str]:
    """Frames, seconds, and the backend that decoded."""
    decoder = get_decoder(backend, max_pixels=_LIMITS.max_pixels)
    out = np.zeros((len(rows), *_SIZE, 3), np.uint8)
    start = time.perf_counter()
    decoder.decode(str(clip), info, rows, _SIZE, out, 0)
    return out, time.perf_counter() - start, decoder.name


def rows_of(label: str, points: Sequence[Point]) -> list[Row]:
    """One row per point, PyAV in the column of stock and NVDEC in the plugin's."""
    return [
        Row.of(
            f"{label}, {point.megapixels:.0f} Mpx: NVDEC against PyAV",
            "s",
            stock=point.cpu_s,
            plugin=point.gpu_s,
        )
        for point in points
    ]


def break_even(points: Sequence[Point]) -> float | None:
    """Megapixels from which on the GPU is the faster one; None if it never was.

    Each side's time is taken for a straight line over the work, fitted to the medians. The result
    is never outside of what was measured.

    Args:
        points: Measurements of one codec.
    """
    works = [point.megapixels for point in points]
    if len(set(works)) < 2:
        return None
    sides = [[np.median(getattr(p, side)) for p in points] for side in ("cpu_s", "gpu_s")]
    (cpu_slope, cpu_start), (gpu_slope, gpu_start) = (np.polyfit(works, side, 1) for side in sides)
    if cpu_slope <= gpu_slope:
        return None
    crossing = float((gpu_start - cpu_start) / (cpu_slope - gpu_slope))
    return None if crossing > max(works) else max(crossing, min(works))


def findings(points: Sequence[Point]) -> list[str]:
    """What the measurements say, with the settings to copy."""
    if not points:
        return ["The GPU takes none of the clips."]
    wrong = sum(not point.same for point in points)
    notes = [f"NVDEC's frames differ from PyAV's in {wrong} of {len(points)} measurements."]
    if wrong:
        return [*notes, "So it must not be used on this machine: no settings."]
    least = {
        codec: break_even([point for point in points if point.codec == codec])
        for codec in dict.fromkeys(point.codec for point in points)
    }
    known = ", ".join(f"{codec}: {value:.0f}" for codec, value in least.items() if value)
    if known:
        notes.append(f"Settings: media.decode.nvdec.from_megapixels: {{{known}}}")
    slower = ", ".join(codec for codec, value in least.items() if value is None)
    if slower:
        notes.append(f"The CPU was the faster one up to the most work measured: {slower}.")
    return notes
