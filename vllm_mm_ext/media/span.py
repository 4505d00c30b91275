"""A span of a video as a clip by itself, which begins at 0. Pure functions of plain values."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np

from vllm_mm_ext.errors import MediaError
from vllm_mm_ext.media.sampling.timeline import clip_duration
from vllm_mm_ext.media.sampling.windows import rows
from vllm_mm_ext.media.types import AudioStream, MediaInfo, PacketTable, SamplingSpec

# A frame that begins so many seconds before a span begins, or before it ends, begins with it.
_SAME_S = 1e-6
# Decimals of a second to which times within a span are rounded: more only show which file the span
# is of, as the difference of two large numbers.
_DECIMALS = 9
# Gaps between frames that differ by more of the usual gap are uneven.
_UNEVEN = 0.02


def info_of(info: MediaInfo, sampling: SamplingSpec | None) -> MediaInfo:
    """What a probe would say if the wanted span were a file of its own.

    Args:
        info: Of the whole file. Without its packet table, the number of frames is an estimate, one
            too many rather than one too few; of keyframes there are as many at most.
        sampling: The frames wanted; without a span, ``info`` itself is returned.

    Raises:
        MediaError: The span is none, or begins after the end of the video.
    """
    video = info.video
    if sampling is None or sampling.span is None or video is None:
        return info
    begin, end = _checked(sampling.span, clip_duration(info))
    frames = min(video.num_frames, math.ceil((end - begin) * video.fps) + 1)
    video = replace(
        video,
        duration=end - begin,
        start=video.start + begin,
        origins=tuple(origin + begin for origin in video.origins),
        num_frames=frames,
        num_keyframes=min(video.num_keyframes, frames),
    )
    table = info.packets
    if table is not None:
        table = _part(table, begin, end)
        uneven, fps = _is_uneven(table), video.fps
        if uneven:
            fps = len(table) / (end - begin)
        elif video.is_vfr and len(table) > 1:
            fps = (len(table) - 1) / float(table.time[-1] - table.time[0])
        keys = int(table.is_key.sum())
        video = replace(video, num_frames=len(table), num_keyframes=keys, is_vfr=uneven, fps=fps)
    sounds = tuple(_clipped(sound, video.start, end - begin) for sound in info.audio)
    return replace(info, duration=end - begin, video=video, audio=sounds, packets=table)


def first_row(table: PacketTable, sampling: SamplingSpec | None) -> int:
    """Row of the frame that is on screen when the wanted span begins; 0 without a span."""
    if sampling is None or sampling.span is None:
        return 0
    return max(0, int(np.searchsorted(table.time, sampling.span[0] + _SAME_S, side="right")) - 1)


def _checked(span: tuple[float, float], duration: float) -> tuple[float, float]:
    """Start and end of a span within a clip of so many seconds."""
    begin, end = span
    if not (math.isfinite(begin) and math.isfinite(end) and 0 <= begin < end):
        raise MediaError(
            f"A span of a video must go from one second to a later one, got {begin:g} to {end:g}.",
            parameter="video_url",
            value=begin,
        )
    if begin >= duration - _SAME_S:
        raise MediaError(
            f"The span of {begin:g} to {end:g} s begins after the end of the video, which lasts "
            f"{duration:.3f} s.",
            parameter="video_url",
            value=begin,
        )
    return begin, min(end, duration)


def _part(table: PacketTable, begin: float, end: float) -> PacketTable:
    """Rows of the frames that are on screen from ``begin`` on and before ``end``."""
    low = max(0, int(np.searchsorted(table.time, begin + _SAME_S, side="right")) - 1)
    high = max(low + 1, int(np.searchsorted(table.time, end - _SAME_S)))
    part = rows(table, low, high)
    time = np.round(np.maximum(part.time - begin, 0.0), _DECIMALS)
    return replace(part, time=time)


def _is_uneven(table: PacketTable) -> bool:
    """Whether gaps differ by more than rounding explains, as the probe finds for whole files.

    Where a span begins between two frames, the first gap is a part of one.
    """
    gaps = np.diff(table.time)
    if len(gaps) < 2:
        return False
    usual, unit = float(np.median(gaps)), table.time_base
    rounding = 1.5 * unit if 4 * unit < usual else 0.0
    return bool(np.abs(gaps - usual).max() > _UNEVEN * usual + rounding)


def _clipped(sound: AudioStream, start: float, seconds: float) -> AudioStream:
    """The part of a stream that lies in a span which starts at ``start`` on the file's clock."""
    if not sound.duration:
        return sound
    begin = min(max(sound.start, start), start + seconds)
    end = min(sound.start + sound.duration, start + seconds)
    return replace(sound, start=begin, duration=max(0.0, end - begin))
