"""What a worker may say of a file and of its result: the pool believes nothing unseen.

A worker decodes what a stranger made, so a hostile file may have taken it over. These checks keep
values that cannot be true out of the server: memory is mapped, and numbers are used, after them.
"""

from __future__ import annotations

import math

import numpy as np

from vllm_mm_ext.media.audio.audio_track import MAX_SAMPLE_RATE
from vllm_mm_ext.media.audio.sound_placement import MAX_ORIGINS
from vllm_mm_ext.media.decode.packets import MAX_PACKETS
from vllm_mm_ext.media.types import (
    AudioStream,
    DecodeRequest,
    FrameSelection,
    MediaInfo,
    PacketTable,
    VideoStream,
)

# Bounds of what a worker may tell of a file: FFmpeg opens no more streams, and names are short.
_MAX_STREAMS = 1000
_MAX_STAGES = 16
_MAX_NAME = 256
# Pixels of a picture's side: FFmpeg knows no longer ones.
_MAX_SIDE = 1 << 31


class MalformedMessageError(ValueError):
    """What a worker sent is no message, or one that cannot be true."""


def require(holds: bool, what: str) -> None:
    """Refuse a message unless a condition holds.

    Args:
        holds: The condition.
        what: What of the message is wrong otherwise.

    Raises:
        MalformedMessageError: The condition does not hold.
    """
    if not holds:
        raise MalformedMessageError(f"a worker sent an impossible {what}")


def check_reservation(num_bytes: int, request: DecodeRequest) -> None:
    """Hold what a worker wants to reserve against the limits of its job.

    Raises:
        MalformedMessageError: The limits allow no such result.
    """
    require(not request.probe_only, "reservation of a probe")
    # The limit holds for frames and for sound.
    require(0 <= num_bytes <= 2 * request.limits.max_output_bytes, "number of bytes to reserve")


def check_frames(
    shape: tuple[int, int, int, int] | None,
    selection: FrameSelection | None,
    info: MediaInfo,
    request: DecodeRequest,
) -> None:
    """Hold decoded frames against the request.

    Args:
        shape: Shape of the frames, None without frames.
        selection: Which frames they are.
        info: What the container says; ``check_info`` passed it.
        request: What was asked.

    Raises:
        MalformedMessageError: The frames are no answer to the request, or past its limits.
    """
    wanted = request.sampling is not None
    require((selection is not None) == (shape is not None) == wanted, "set of frames")
    if selection is None or shape is None:
        return
    require(min(shape) > 0 and shape[3] == 3, "shape of the frames")
    require(shape[0] <= request.limits.max_frames, "number of frames")
    require(math.prod(shape) <= request.limits.max_output_bytes, "size of the frames")
    indices, times, step = selection.indices, selection.times, selection.step
    require(len(indices) == len(times) == shape[0], "number of selected frames")
    require(selection.profile is None, "activity profile")
    last = -1 if info.video is None else info.video.num_frames - 1
    inside = bool(indices[0] >= 0 and indices[-1] <= last)
    require(inside and bool((np.diff(indices) >= 0).all()), "frame index")
    require(bool(np.isfinite(times).all()), "frame time")
    require(step is None or (math.isfinite(step) and step > 0), "step between frames")
    require(selection.activity is None or 0 <= selection.activity <= 1, "activity")


def check_sound(samples: int | None, rate: int, request: DecodeRequest) -> None:
    """Hold decoded sound against the request.

    Args:
        samples: Number of samples, None without sound.
        rate: Sampling rate in Hz.
        request: What was asked.

    Raises:
        MalformedMessageError: The sound is no answer to the request, or past its limits.
    """
    if samples is None:
        require(request.audio != "required", "lack of sound")
        return
    require(request.audio != "none", "sound")
    require(0 < samples <= request.limits.max_output_bytes // 4, "length of the sound")
    require(0 < rate <= MAX_SAMPLE_RATE, "sampling rate")


def check_timings(timings: dict[str, float]) -> None:
    """Refuse times of stages that are no times.

    Raises:
        MalformedMessageError: There are too many stages, or a time is no number of seconds.
    """
    require(len(timings) <= _MAX_STAGES, "number of stages")
    for name, seconds in timings.items():
        known = len(name) <= _MAX_NAME and math.isfinite(seconds) and seconds >= 0
        require(known, "time of a stage")


def check_info(info: MediaInfo) -> None:
    """Refuse a description of a file that no file can have.

    Raises:
        MalformedMessageError: A value is out of its range, or values contradict each other.
    """
    require(len(info.container) <= _MAX_NAME and info.num_bytes >= 0, "container")
    require(math.isfinite(info.duration) and info.duration >= 0, "duration")
    require(len(info.audio) <= _MAX_STREAMS, "number of streams")
    for sound in info.audio:
        _check_audio(sound)
    if info.video is not None:
        _check_video(info.video)
    if info.packets is not None:
        _check_packets(info.packets, 0 if info.video is None else info.video.num_frames)


def _check_audio(stream: AudioStream) -> None:
    require(len(stream.codec) <= _MAX_NAME and stream.index >= 0, "audio stream")
    require(stream.sample_rate > 0 and stream.channels >= 0, "audio stream")
    require(math.isfinite(stream.duration) and stream.duration >= 0, "duration")
    require(math.isfinite(stream.start) and stream.number >= 0, "audio stream")


def _check_video(stream: VideoStream) -> None:
    names = (stream.codec, stream.pixel_format)
    require(all(len(name) <= _MAX_NAME for name in names) and stream.index >= 0, "video stream")
    require(min(stream.width, stream.height, stream.num_frames) > 0, "video stream")
    require(0 <= stream.num_keyframes <= stream.num_frames, "number of keyframes")
    require(stream.rotation in (0, 90, 180, 270), "rotation")
    require(math.isfinite(stream.sample_aspect) and stream.sample_aspect > 0, "pixel aspect")
    require(all(0 <= cut <= _MAX_SIDE for cut in stream.crop), "cropping")
    require(all(math.isfinite(x) and x >= 0 for x in (stream.fps, stream.duration)), "duration")
    require(math.isfinite(stream.start), "start time")
    origins = stream.origins
    require(len(origins) <= MAX_ORIGINS and all(map(math.isfinite, origins)), "start time")


def _check_packets(table: PacketTable, num_frames: int) -> None:
    columns = (table.pts, table.time, table.size, table.is_key, table.order)
    require(all(len(column) == num_frames <= MAX_PACKETS for column in columns), "packet table")
    require(math.isfinite(table.time_base), "time base")
    times = bool(np.isfinite(table.time).all() and (np.diff(table.time) >= 0).all())
    require(times, "packet times")
    require(bool((table.size >= 0).all() and (table.order >= 0).all()), "packet table")
