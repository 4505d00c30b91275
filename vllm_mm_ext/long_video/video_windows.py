"""The windows of videos: where each begins and ends, and how many of them there may be."""

from __future__ import annotations

import math
from collections.abc import Sequence

from vllm_mm_ext.errors import OptionBoundError
from vllm_mm_ext.long_video.asking import Window

# Seconds of a video's last window at least; what is shorter may hold no frame.
_SHORTEST_S = 1.0
# Seconds of a window at most, as the option `window_s` allows.
_LONGEST_S = 600


def windows_of(
    durations: Sequence[float], window_s: float, overlap_s: float, max_windows: int
) -> list[Window]:
    """The windows of videos, in the order of the videos and of time.

    Every moment lies in a window, and each window shares ``overlap_s`` seconds with the next one.
    All windows of a video have ``window_s`` seconds, but the last one: it ends with the video, and
    is never shorter than the overlap. A video that has grown at its end has the same windows as
    before, but for the last.

    Args:
        durations: Seconds of each video, positive.
        window_s: Seconds of a window.
        overlap_s: Seconds that it shares with the next one, at most half of ``window_s``.
        max_windows: Windows of all videos at most.

    Raises:
        OptionBoundError: There would be more windows; the message says what would fit.
    """
    counts = [_count(duration, window_s, overlap_s) for duration in durations]
    if (total := sum(counts)) > max_windows:
        raise OptionBoundError(
            f"{total} windows of {window_s:g} s are more than max_windows = {max_windows}: "
            + _what_fits(durations, overlap_s, max_windows),
            parameter="mm_ext.long_video.window_s",
            value=window_s,
        )
    stride = window_s - overlap_s
    return [
        Window(video, number, number * stride, duration if last else number * stride + window_s)
        for video, (duration, count) in enumerate(zip(durations, counts, strict=True))
        for number in range(count)
        for last in [number == count - 1]
    ]


def _count(duration: float, window_s: float, overlap_s: float) -> int:
    stride = window_s - overlap_s
    count = 1 + max(0, math.ceil((duration - window_s) / stride))
    # A rest too short to be a window by itself makes the window before it longer.
    if count > 1 and duration - (count - 1) * stride < max(overlap_s, _SHORTEST_S):
        count -= 1
    return count


def _what_fits(durations: Sequence[float], overlap_s: float, max_windows: int) -> str:
    for window_s in range(math.ceil(max(4, 2 * overlap_s)), _LONGEST_S + 1):
        if sum(_count(d, window_s, overlap_s) for d in durations) <= max_windows:
            return f"window_s = {window_s} would fit"
    hours = max_windows * (_LONGEST_S - overlap_s) / 3600
    return f"with the longest windows, of {_LONGEST_S} s, {hours:.1f} hours would fit"
