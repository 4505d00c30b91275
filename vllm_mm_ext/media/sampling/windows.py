"""Fixed windows of time in which ``adaptive`` chooses frames, one window after the other.

The frames chosen in a window follow from what the clip shows up to the window's end alone. So a
clip that is extended keeps the frames of all its full windows.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np

from vllm_mm_ext.media.sampling.timeline import (
    asked_count,
    gop_starts,
    is_unbound,
    target_count,
)
from vllm_mm_ext.media.types import MediaInfo, PacketTable, SamplingSpec

# Seconds of a window at least. Shorter windows leave little to choose from; of longer ones more has
# to be chosen anew when a clip is extended.
_SHORTEST_S = 8.0
# Seconds before a window that also show what is usual in the clip.
_LOOK_BACK_S = 16.0


@dataclass(frozen=True)
class Window:
    """Frames ``low`` to ``high`` (exclusive) of a clip, and how many of them to choose.

    Attributes:
        low, high: Presentation-order frame indices.
        back: First frame that shows what is usual, at most ``low``.
        count: Frames to choose, at most ``high - low``.
        is_rest: A longer clip would have another window here: this one is what is left behind the
            full windows, or the whole clip, as ``min_frames`` or ``max_frames`` binds.
    """

    low: int
    high: int
    back: int
    count: int
    is_rest: bool = False


def length(fps: float, multiple_of: int) -> tuple[float, int]:
    """Seconds and frames of a full window.

    A window is the shortest of at least ``_SHORTEST_S`` in which ``fps`` frames per second come to
    a whole multiple of ``multiple_of`` frames.
    """
    frames = multiple_of * max(1, math.ceil(_SHORTEST_S * fps / multiple_of - 1e-9))
    return frames / fps, frames


def windows_of(info: MediaInfo, spec: SamplingSpec) -> list[Window]:
    """The windows of a clip; a single one, the whole clip, where a bound on the frames binds.

    Args:
        info: What the container says about the clip, packet table included.
        spec: Policy and budget.
    """
    packets = info.packets
    assert packets is not None
    if is_unbound(info, spec):
        windows = list(_cut(packets, asked_count(info, spec), spec))
        # Frames may come in bursts, so that there are windows with fewer than wanted.
        if sum(window.count for window in windows) >= min(spec.min_frames, len(packets)):
            return windows
    return [Window(0, len(packets), 0, target_count(info, spec), is_rest=True)]


def _cut(packets: PacketTable, asked: int, spec: SamplingSpec) -> Iterator[Window]:
    """Full windows, then the rest of the clip as a shorter window."""
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
        # From a keyframe on: of a GOP that is cut, stage 1 would see a wrong length.
        later = starts[np.searchsorted(starts, back) :]
        back = int(later[0]) if len(later) and later[0] <= low else back
        yield Window(low, high, back, min(wanted, high - low), is_rest=number == full)


def rows(packets: PacketTable, low: int, high: int) -> PacketTable:
    """The rows ``low`` to ``high`` (exclusive) of a packet table, as a table of their own."""
    part = slice(low, high)
    return replace(
        packets,
        pts=packets.pts[part],
        time=packets.time[part],
        size=packets.size[part],
        is_key=packets.is_key[part],
        order=packets.order[part],
    )
