"""Time from file to frames: each decoder backend against stock vLLM's OpenCV loader.

On a machine with a GPU, NVDEC is measured beside PyAV too.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from vllm_mm_ext.media.decode.decoders import UnsuitableFileError, get_decoder
from vllm_mm_ext.media.decode.probe import probe
from vllm_mm_ext.media.types import DecodeLimits, DecoderName
from vllm_mm_ext.tools.bench import gpu_thresholds
from vllm_mm_ext.tools.bench.bench_clips import cached_clip
from vllm_mm_ext.tools.bench.harness import BenchContext, BenchResult, Row

NUM_FRAMES = 32
_LIMITS = DecodeLimits()
_SIZES = {"720p": (1280, 720), "1080p": (1920, 1080)}


@dataclass(frozen=True)
class Case:
    """One kind of clip: encoder, size, keyframe distance, B frames in a row, seconds."""

    codec: str
    size: str
    gop: int
    bframes: int
    duration: float

    @property
    def label(self) -> str:
        """Words for the table."""
        name = self.codec.removeprefix("lib").removeprefix("vpx-").removeprefix("svt")
        return f"{name} {self.size} {self.duration:g} s, GOP {self.gop}, {self.bframes} B"

    def clip(self, work_dir: Path) -> Path:
        """The clip, made on first use."""
        width, height = _SIZES[self.size]
        options: dict[str, Any] = {
            "codec": self.codec,
            "width": width,
            "height": height,
            "gop": self.gop,
            "bframes": self.bframes,
            "duration": self.duration,
        }
        if self.codec == "libx264":
            options["preset"] = "veryfast"  # with deblocking and CABAC, as real clips have
        return cached_clip(work_dir, **options)


CASES = (
    Case("libx264", "720p", 30, 0, 60.0),
    Case("libx264", "720p", 30, 3, 60.0),
    Case("libx264", "720p", 250, 0, 60.0),
    Case("libx264", "720p", 250, 3, 60.0),
    Case("libx264", "720p", 250, 3, 10.0),
    Case("libx264", "1080p", 30, 3, 30.0),
    Case("libx264", "1080p", 250, 0, 30.0),
    Case("mpeg4", "720p", 12, 0, 60.0),
    Case("mpeg4", "720p", 250, 2, 30.0),
    Case("libx265", "720p", 60, 3, 10.0),
    Case("libvpx-vp9", "720p", 60, 0, 10.0),
    Case("libsvtav1", "720p", 60, 0, 10.0),
)


def run(context: BenchContext) -> BenchResult:
    """Every case, every backend."""
    rows: list[Row] = []
    with context.steps("decoders", len(CASES)) as begin:
        for case in CASES:
            begin(case.label)
            rows += measure(case, case.clip(context.work_dir), context.repeats)
    notes = [
        f"Seconds to {NUM_FRAMES} uniform frames at native size from a file in the page cache; "
        "the plugin's times include its probe.",
        "A backend that refuses a file because it would return wrong frames has no time.",
    ]
    why_not = gpu_thresholds.why_no_gpu()
    if why_not:
        notes.append(f"NVDEC was not measured: {why_not}.")
    else:
        points: list[gpu_thresholds.Point] = []
        with context.steps("nvdec", len(CASES)) as begin:
            for case in CASES:
                begin(case.label)
                found = list(gpu_thresholds.measure(case.clip(context.work_dir), context.repeats))
                rows += gpu_thresholds.rows_of(case.label, found)
                points += found
        notes += gpu_thresholds.findings(points)
    return BenchResult("decoders", rows, notes)


def measure(case: Case, clip: Path, repeats: int, threads: int = 0) -> list[Row]:
    """Time stock and both backends on one clip, interleaved, after one warm-up each.

    Args:
        case: What the clip is, for the row names.
        clip: Its file.
        repeats: Measurements of each side.
        threads: Decoding threads of the plugin's backends, 0 for one per core (as stock).

    Returns:
        One row per backend: seconds, stock against it. Stock is empty where OpenCV cannot
        decode the codec, plugin where the backend refuses the file.
    """
    indices = _uniform(clip)
    sides: dict[str, Callable[[], object]] = {
        "stock": lambda: _stock(clip),
        "pyav": lambda: _plugin("pyav", clip, indices, threads),
        "decord": lambda: _plugin("decord", clip, indices, threads),
    }
    runs: dict[str, list[float]] = {}
    for side, work in sides.items():
        try:
            work()
        except (UnsuitableFileError, ValueError):
            continue
        runs[side] = []
    for _ in range(repeats):
        for side, times in runs.items():
            start = time.perf_counter()
            sides[side]()
            times.append(time.perf_counter() - start)
    return [
        Row.of(
            f"{case.label}: {backend}",
            "s",
            stock=runs.get("stock", ()),
            plugin=runs.get(backend, ()),
        )
        for backend in ("pyav", "decord")
    ]


def _uniform(clip: Path) -> npt.NDArray[np.int64]:
    table = probe(str(clip), _LIMITS).packets
    assert table is not None
    return np.linspace(0, len(table) - 1, NUM_FRAMES).astype(np.int64)


def _stock(clip: Path) -> None:
    from vllm.multimodal.video import VIDEO_LOADER_REGISTRY

    # vLLM's loader chooses the frames of ``_uniform`` too.
    loader = VIDEO_LOADER_REGISTRY.load("opencv")
    frames, _ = loader.load_bytes(clip.read_bytes(), num_frames=NUM_FRAMES)
    if not len(frames):
        raise ValueError("OpenCV cannot decode the clip")


def _plugin(name: DecoderName, clip: Path, indices: npt.NDArray[np.int64], threads: int) -> None:
    info = probe(str(clip), _LIMITS)
    assert info.video is not None
    out = np.empty((len(indices), info.video.height, info.video.width, 3), np.uint8)
    decoder = get_decoder(name, max_pixels=_LIMITS.max_pixels)
    decoder.decode(str(clip), info, indices, None, out, threads)
