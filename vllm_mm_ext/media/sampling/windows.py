"""Fixed windows of time in which ``adaptive`` chooses frames, one window after the other.

The frames chosen in a window follow from what the clip shows up to the window's end alone. So a
clip that is extended keeps the frames of all its full windows.

Whether something is seen for a short time only shows after it. So a window leaves the frames of its
last second, or more, to the next window, which chooses among them as well.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np

from vllm_mm_ext.media.sampling.timeline import (
    asked_count,
    clip_duration,
    gop_starts,
    is_unbound,
    target_count,
)
from vllm_mm_ext.media.types import MediaInfo, PacketTable, SamplingSpec

# Seconds and frames of a window at least. Shorter windows leave little to choose from; of longer
# ones more has to be chosen anew when a clip is extended.
_SHORTEST_S = 8.0
_FEWEST = 8
# Seconds at least that a window leaves to the next: REACH_S of ``thumbnail_scan``, and the way to a
# thumbnail.
_LATER_S = 1.0
# Seconds before a window that also show what is usual in the clip.
_LOOK_BACK_S = 16.0


@dataclass(frozen=True)
class Window:
    """A part of a clip, and how many frames to choose there.

    Attributes:
        low, high: The frames to choose from: presentation-order indices, ``high`` exclusive.
        first, last: The frames of the window itself, ``last`` exclusive; at least as late as these.
        back: First frame that shows what is usual, at most ``first``.
        end: The moment in seconds at which the window ends: nothing after it is known.
        wanted: Frames to choose, if there are so many.
        later: Frames due in what the window leaves to the next one.
        is_rest: A longer clip would have another window here: this one is what is left behind the
            full windows, or the whole clip, as ``min_frames`` or ``max_frames`` binds.
    """

    low: int
    high: int
    first: int
    last: int
    back: int
    end: float
    wanted: int
    later: int = 0
    is_rest: bool = False

    @property
    def count(self) -> int:
        """Frames to choose."""
        return min(self.wanted, self.high - self.low)


def length(fps: float, multiple_of: int) -> tuple[float, int]:
    """Seconds and frames of a full window.

    A window is the shortest of at least ``_SHORTEST_S`` and ``_FEWEST`` frames in which ``fps``
    frames per second come to a whole multiple of ``multiple_of`` frames.
    """
    frames = multiple_of * math.ceil(max(_SHORTEST_S * fps, _FEWEST) / multiple_of - 1e-9)
    return frames / fps, frames


def handed_on(fps: float, multiple_of: int) -> int:
    """Frames that are due in the last seconds of a window, which it leaves to the next window.

    A whole multiple of ``multiple_of``: so each window has the seconds for the frames due in it,
    however few frames a second may have.
    """
    return multiple_of * math.ceil(max(_LATER_S * fps, 1) / multiple_of - 1e-9)


def full_windows(asked: int, frames: int, multiple_of: int) -> int:
    """How many of a clip's windows do not change if the clip is extended.

    Args:
        asked: How many frames ``fps`` asks for in the whole clip.
        frames: Frames of a full window.
        multiple_of: The clip's last two frames at least, or so many, are in the rest behind them.
    """
    return max(0, (asked - max(2, multiple_of)) // frames)


def windows_of(info: MediaInfo, spec: SamplingSpec) -> list[Window]:
    """The windows of a clip; a single one, the whole clip, where a bound on the frames binds.

    Args:
        info: What the container says about the clip, packet table included.
        spec: Policy and budget.
    """
    packets = info.packets
    assert packets is not None
    size, duration = len(packets), clip_duration(info)
    if is_unbound(info, spec):
        windows = list(_cut(packets, duration, asked_count(info, spec), spec))
        # Frames may come in bursts, so that there are windows with fewer than wanted.
        if sum(window.count for window in windows) >= min(spec.min_frames, size):
            return windows
    return [Window(0, size, 0, size, 0, duration, target_count(info, spec), is_rest=True)]


def _cut(packets: PacketTable, duration: float, asked: int, spec: SamplingSpec) -> Iterator[Window]:
    """Full windows, then the rest of the clip as a window of another length."""
    time, starts = packets.time, gop_starts(packets)
    seconds, frames = length(spec.fps, spec.multiple_of)
    full = full_windows(asked, frames, spec.multiple_of)
    handed = handed_on(spec.fps, spec.multiple_of)
    low = first = given = 0
    for number in range(full + 1):
        is_rest = number == full
        end, high, last, due = duration, len(time), len(time), asked - asked % spec.multiple_of
        if not is_rest:
            end = (number + 1) * seconds
            high, last = np.searchsorted(time, np.array([end - handed / spec.fps, end]) - 1e-6)
            due = (number + 1) * frames - handed
        # Frames that the window lacks are not made up for by more of the second before it.
        most = (handed if number else 0) + high - first
        wanted, given = min(due - given, most), due
        if low == high and first == last:
            continue
        back = int(np.searchsorted(time, number * seconds - _LOOK_BACK_S))
        # From a keyframe on: of a GOP that is cut, stage 1 would see a wrong length.
        later = starts[np.searchsorted(starts, back) :]
        back = int(later[0]) if len(later) and later[0] <= first else min(back, first)
        left = 0 if is_rest else handed
        yield Window(low, high, first, last, back, end, wanted, left, is_rest)
        low, first = high, last


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
