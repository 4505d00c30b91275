"""Hours of video in windows: CPU of decoding against one sequential decode, and memory."""

from __future__ import annotations

import asyncio
import os
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from itertools import count, takewhile
from pathlib import Path
from typing import Literal

import av
import numpy as np
import numpy.typing as npt
import psutil  # type: ignore[import-untyped]

from vllm_mm_ext.media.audio.audio_decoder import decoded_frames
from vllm_mm_ext.media.audio.sound_reader import SoundReader
from vllm_mm_ext.media.decode.decoders.kept_reader import KeptReader
from vllm_mm_ext.media.decode.pool import DecodePool
from vllm_mm_ext.media.decode.probe import probe
from vllm_mm_ext.media.fetch.blob import Blob, BlobWriter
from vllm_mm_ext.media.sampling import select
from vllm_mm_ext.media.span import first_row, info_of
from vllm_mm_ext.media.types import (
    DecodeLimits,
    DecodeRequest,
    MediaInfo,
    SamplingSpec,
    SizeRule,
)
from vllm_mm_ext.testing.memory import MemoryWatch
from vllm_mm_ext.tools.bench.bench_clips import cached_clip
from vllm_mm_ext.tools.bench.harness import BenchContext, BenchResult, Row

WINDOW_S, OVERLAP_S = 30.0, 2.0
_MINUTES = (10, 30, 120)
_POLICIES: tuple[Literal["uniform", "adaptive"], ...] = ("uniform", "adaptive")
LIMITS = DecodeLimits()
_MIB = 1 << 20
_CHUNK = 1 << 22


@dataclass(frozen=True)
class Measured:
    """What reading a file in windows took.

    Attributes:
        cpu_s: CPU seconds of the workers.
        peak: Most bytes of this process and the workers together, without the file.
    """

    cpu_s: float
    peak: int


def run(context: BenchContext) -> BenchResult:
    """Every length and container, by both policies."""
    rows: list[Row] = []
    peaks: dict[tuple[str, str], dict[int, int]] = {}
    cases = [(minutes, suffix) for minutes in _MINUTES for suffix in ("mp4", "ts")]
    with context.steps("window-decode", len(cases)) as begin:
        for minutes, suffix in cases:
            begin(f"{minutes} min, {suffix}")
            path = long_clip(context.work_dir, 60 * minutes, suffix)
            whole = sequential(path)
            for policy in _POLICIES:
                plan = sampling_of(policy)
                found = asyncio.run(in_windows(path, plan, 60.0 * minutes))
                name = f"{minutes} min, {suffix}, {policy}"
                read = reading(path, plan, 60.0 * minutes)
                rows.append(Row.of(f"CPU of decoding, {name}", "s", stock=[whole], plugin=[read]))
                rows.append(Row.of(f"CPU of workers, {name}", "s", plugin=[found.cpu_s]))
                peaks.setdefault((suffix, policy), {})[minutes] = found.peak
    for (ending, looked), of in peaks.items():
        low, high = of[min(of)] / _MIB, of[max(of)] / _MIB
        name = f"memory, {max(of)} min against {min(of)} min, {ending}, {looked}"
        rows.append(Row.of(name, "MiB", stock=[low], plugin=[high]))
    notes = [
        f"640x360 H.264 at 25 fps with sound, GOP 250, in windows of {WINDOW_S:g} s with "
        f"{OVERLAP_S:g} s overlap: uniform at 4 fps, adaptive at most 64 frames a window.",
        "CPU of decoding: one decode of all pictures and all sound (stock), and what the windows "
        "take of demuxing and decoding (plugin). CPU of workers: also their start, the probe, "
        "sampling, resizing, and placing the sound.",
        "Memory: this process and the workers at their peak, without the file itself.",
    ]
    return BenchResult("window-decode", rows, notes)


def windows(duration: float) -> Iterator[tuple[float, float]]:
    """Start and end of each window; the last one is never shorter than the overlap."""
    for number in count():
        start = number * (WINDOW_S - OVERLAP_S)
        yield start, min(start + WINDOW_S, duration)
        if start + WINDOW_S >= duration:
            return


def sampling_of(policy: Literal["uniform", "adaptive"]) -> SamplingSpec:
    """What is wanted of each window."""
    return SamplingSpec(policy, fps=4.0, max_frames=64 if policy == "adaptive" else 768)


async def in_windows(path: Path, sampling: SamplingSpec, duration: float) -> Measured:
    """Read a file window by window, as the front-end does."""
    pool = DecodePool(workers=1)
    blob = _blob(path)
    try:
        with MemoryWatch(os.getpid()) as watch:
            probed = await pool.run(blob.fd, DecodeRequest(probe_only=True, limits=LIMITS))
            for span in windows(duration):
                request = DecodeRequest(
                    replace(sampling, span=span),
                    size=SizeRule("max_edge", max_edge=224),
                    audio="optional",
                    info=probed.info,
                    limits=LIMITS,
                    content=blob.digest,
                )
                await pool.run(blob.fd, request)
            cpu = _cpu(pool)
    finally:
        pool.close()
    return Measured(cpu, sum(watch.peak.values()))


def reading(path: Path, sampling: SamplingSpec, duration: float) -> float:
    """CPU seconds to demux and decode what a worker needs for all windows, and nothing else."""
    info = probe(str(path), LIMITS)
    assert info.video is not None
    assert info.packets is not None
    spans = [replace(sampling, span=span) for span in windows(duration)]
    rows = [_looked_at(info_of(info, span), span) + first_row(info.packets, span) for span in spans]
    started = time.process_time()
    pictures = KeptReader(
        str(path), info.video.index, info.packets, LIMITS.max_pixels, os.cpu_count() or 1
    )
    with SoundReader(str(path), 0, LIMITS.max_pixels) as sound, closing(pictures):
        for wanted, span in zip(rows, spans, strict=True):
            assert span.span is not None
            pictures.begin(span.span, LIMITS.memory_bytes // 16)
            pictures.read(wanted, lambda *_: None, set())
            packets = sound.packets(info.video.start + span.span[0])
            end = info.video.start + span.span[1]
            frames = decoded_frames(sound.container, sound.decoder, packets)
            for _ in takewhile(lambda frame: (frame.time or 0.0) < end, frames):  # noqa: B023
                pass
    return time.process_time() - started


def _looked_at(info: MediaInfo, sampling: SamplingSpec) -> npt.NDArray[np.int64]:
    """Frames of a window that are decoded, counted from its first."""
    looked: list[int] = []

    def thumbnails(indices: Sequence[int], _: Sequence[int]) -> npt.NDArray[np.uint8]:
        looked.extend(indices)
        return np.zeros((len(indices), 54, 64), np.uint8)

    chosen = select(info, sampling, thumbnails).indices
    return np.union1d(chosen, np.array(looked, np.int64))


def sequential(path: Path) -> float:
    """CPU seconds to decode all pictures and all sound of a file, in the order of the file."""
    started = time.process_time()
    with av.open(str(path)) as container:
        video, sound = container.streams.video[0], container.streams.audio[0]
        video.thread_type = "AUTO"
        for packet in container.demux(video, sound):
            packet.decode()
    return time.process_time() - started


def long_clip(work_dir: Path, seconds: int, suffix: str) -> Path:
    """A minute of 640x360 with sound, repeated by copying its packets."""
    minute = cached_clip(
        work_dir, sound=True, width=640, height=360, fps=25, duration=60.0, gop=250
    )
    target = work_dir / "media" / f"{minute.stem}-{seconds}s.{suffix}"
    if not target.exists():
        with tempfile.TemporaryDirectory(dir=target.parent) as scratch:
            made = Path(scratch) / target.name
            _repeat(minute, made, round(seconds / 60))
            made.rename(target)
    return target


def _repeat(source: Path, target: Path, times: int) -> None:
    """Write a clip of whole seconds so many times in a row; sound that reaches over is left out."""
    with av.open(str(source)) as container, av.open(str(target), "w") as output:
        streams = [container.streams.video[0], container.streams.audio[0]]
        made = {stream.index: output.add_stream_from_template(stream) for stream in streams}
        packets = [p for p in container.demux(streams) if p.pts is not None and p.dts is not None]
        for number in range(times):
            for packet in packets:
                assert packet.time_base is not None
                assert packet.pts is not None
                assert packet.dts is not None
                index = packet.stream.index
                minute = round(60 / packet.time_base)
                if index == streams[1].index and not 0 <= packet.pts < minute:
                    continue
                copy = av.Packet(bytes(packet))
                copy.pts = packet.pts + number * minute
                copy.dts = packet.dts + number * minute
                copy.time_base = packet.time_base
                copy.duration = packet.duration
                copy.is_keyframe = packet.is_keyframe
                copy.stream = made[index]
                output.mux(copy)


def _blob(path: Path) -> Blob:
    with path.open("rb") as file, BlobWriter() as writer:
        while chunk := file.read(_CHUNK):
            writer.append(chunk)
        return writer.finish()


def _cpu(pool: DecodePool) -> float:
    times = [psutil.Process(pid).cpu_times() for pid in pool.worker_pids()]
    return float(sum(time.user + time.system for time in times))
