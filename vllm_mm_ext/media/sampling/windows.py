"""Fixed windows of time that ``adaptive`` chooses in, one after the other.

Where the frames of a window follow from what is shown up to its end alone, a clip that is extended
keeps the frames of all its full windows.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np

from vllm_mm_ext.media.sampling.timeline import (
    Indices,
    asked_count,
    decode_weight,
    gop_starts,
    is_unbound,
    target_count,
)
from vllm_mm_ext.media.types import MediaInfo, PacketTable, SamplingSpec

# Shorter windows leave little to choose from, longer ones more to choose anew in a longer clip.
_SHORTEST_S = 8.0
# How far back a window looks, to know what is usual.
_LOOK_BACK_S = 16.0


@dataclass(frozen=True)
class Window:
    """Frames ``low`` to ``high`` (exclusive) of a clip, and what to choose of them.

    Attributes:
        low, high: Presentation-order frame indices.
        back: First frame that may be looked at to know what is usual, at most ``low``.
        count: Frames to choose, at most ``high - low``.
        lead_in: Frames to decode before ``low`` can be; infinity where its keyframe is before
            ``back``.
        is_clip: It is the whole clip, because a budget binds.
    """

    low: int
    high: int
    back: int
    count: int
    lead_in: float = 0.0
    is_clip: bool = False


def length(fps: float, multiple_of: int) -> tuple[float, int]:
    """Seconds and frames of a full window.

    The shortest of at least 8 s in which ``fps`` makes a whole multiple of ``multiple_of`` frames.
    """
    frames = multiple_of * max(1, math.ceil(_SHORTEST_S * fps / multiple_of - 1e-9))
    return frames / fps, frames


def windows_of(info: MediaInfo, spec: SamplingSpec) -> list[Window]:
    """The windows to choose in; a single one, the whole clip, where a budget binds.

    Args:
        info: Probe of the clip.
        spec: Policy and budget.
    """
    packets = info.packets
    assert packets is not None
    if is_unbound(info, spec):
        windows = list(_cut(packets, asked_count(info, spec), spec))
        # Frames may come in bursts, so that there are windows with fewer than wanted.
        if sum(window.count for window in windows) >= min(spec.min_frames, len(packets)):
            return windows
    return [Window(0, len(packets), 0, target_count(info, spec), is_clip=True)]


def _cut(packets: PacketTable, asked: int, spec: SamplingSpec) -> Iterator[Window]:
    """Full windows, then the rest of the clip as one that is not."""
    time, starts = packets.time, gop_starts(packets)
    seconds, frames = length(spec.fps, spec.multiple_of)
    full = asked // frames
    bounds = np.searchsorted(time, np.arange(full + 1) * seconds - 1e-6)
    edges = [*bounds.tolist(), len(time)]
    for number in range(full + 1):
        low, high = edges[number], edges[number + 1]
        wanted = frames if number < full else asked - full * frames
        wanted -= wanted % spec.multiple_of
        if low == high:
            continue
        back = int(np.searchsorted(time, time[low] - _LOOK_BACK_S))
        # From a keyframe on, so that no GOP looks shorter than it is.
        later = starts[np.searchsorted(starts, back) :]
        back = int(later[0]) if len(later) and later[0] <= low else back
        yield Window(low, high, back, min(wanted, high - low), _lead_in(packets, starts, back, low))


def _lead_in(packets: PacketTable, starts: Indices, back: int, low: int) -> float:
    key = int(starts[np.searchsorted(starts, low, side="right") - 1])
    if key < back:
        return math.inf
    return float(decode_weight(rows(packets, key, low)).sum()) if key < low else 0.0


def rows(packets: PacketTable, low: int, high: int) -> PacketTable:
    """The table of frames ``low`` to ``high`` (exclusive) alone."""
    part = slice(low, high)
    return replace(
        packets,
        pts=packets.pts[part],
        time=packets.time[part],
        size=packets.size[part],
        is_key=packets.is_key[part],
        order=packets.order[part],
    )
