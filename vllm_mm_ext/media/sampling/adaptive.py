"""Content-adaptive sampling: container profile, a bounded look at the pixels, allocation."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt

from vllm_mm_ext.media.sampling import allocate, candidates, container_profile, thumbnail_scan
from vllm_mm_ext.media.sampling.timeline import target_count
from vllm_mm_ext.media.types import (
    ActivityProfile,
    FrameSelection,
    MediaInfo,
    PacketTable,
    SamplingSpec,
)

Thumbnails = Callable[[Sequence[int]], npt.NDArray[np.uint8]]

# Seconds per bin of the reported profile (longer for clips of many minutes).
_BIN_S = 0.25
_MOST_BINS = 4000


def select_adaptive(info: MediaInfo, spec: SamplingSpec, thumbnails: Thumbnails) -> FrameSelection:
    """Choose frames where something happens. See ``sampling.select``.

    ``thumbnails`` is called at most once, with at most ``thumbnail_scan.MAX_THUMBNAILS``
    indices whose decoding costs at most ``thumbnail_scan.decode_allowance`` frames.
    """
    packets = info.packets
    assert packets is not None
    count = target_count(info, spec)
    score = container_profile.innovation(packets)
    looked_at = np.zeros(0, np.int64)
    motion = transient = np.zeros(0)

    def chosen() -> npt.NDArray[np.int64]:
        spots = candidates.find(packets.time, score, looked_at, transient, 3 * count)
        return allocate.allocate(
            packets,
            count,
            [spot.index for spot in spots],
            _weights(packets, score),
            min_fps=spec.min_fps,
            max_fps=spec.max_fps,
            multiple_of=spec.multiple_of,
        )

    indices = chosen()
    if 2 < count < len(packets):
        # What this choice leaves of the price of one full decode is spent on looking.
        allowance = thumbnail_scan.decode_allowance(packets, indices)
        looked_at = thumbnail_scan.plan(packets, score, allowance)
        if len(looked_at) >= 3:
            pixels = thumbnails(looked_at.tolist())
            motion, transient = thumbnail_scan.motion_score(pixels, packets.time[looked_at])
            indices = chosen()
        else:
            looked_at = looked_at[:0]
    profile = _profile(packets, score, looked_at, motion)
    return FrameSelection("adaptive", indices, packets.time[indices], profile)


def _weights(packets: PacketTable, score: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Share of the left-over budget per frame: its time on screen, more where it is busy."""
    time = packets.time
    gaps = np.diff(time, append=time[-1] + (time[-1] - time[0]) / max(1, len(time) - 1))
    return np.asarray(np.maximum(gaps, 1e-9) * (1.0 + np.minimum(score, 10.0) / 10.0))


def _profile(
    packets: PacketTable,
    score: npt.NDArray[np.float64],
    looked_at: npt.NDArray[np.int64],
    motion: npt.NDArray[np.float64],
) -> ActivityProfile:
    end = float(packets.time[-1])
    bins = min(_MOST_BINS, int(end / _BIN_S) + 1)
    width = max(_BIN_S, end / bins * (1 + 1e-9))
    container = np.zeros(bins, np.float32)
    place = np.minimum((packets.time / width).astype(np.int64), bins - 1)
    np.maximum.at(container, place, (score / (score + 6.0)).astype(np.float32))
    confirmed = np.full(bins, np.nan, np.float32)
    np.fmax.at(confirmed, place[looked_at], motion.astype(np.float32))
    return ActivityProfile(np.arange(bins, dtype=np.float64) * width, container, confirmed)
