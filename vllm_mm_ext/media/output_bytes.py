"""How many bytes a decode job will make, told before it begins."""

from __future__ import annotations

import math

from vllm_mm_ext.media.audio.audio_track import MAX_SAMPLE_RATE
from vllm_mm_ext.media.sampling.timeline import target_count
from vllm_mm_ext.media.sizing import target_size
from vllm_mm_ext.media.types import AudioStream, DecodeLimits, DecodeRequest, MediaInfo


def frame_bytes(info: MediaInfo, request: DecodeRequest) -> int:
    """Bytes of the frames of a job, at most.

    More than ``limits.max_output_bytes`` are never decoded. Here and below, ``info`` is that of the
    wanted span (``media.span.info_of``) where the job has one.

    Raises:
        MediaError: See ``target_size``.
    """
    sampling, video = request.sampling, info.video
    if sampling is None or video is None:
        return 0
    taken = sampling.indices
    count = target_count(info, sampling) if taken is None else len(taken)
    height, width = target_size(
        request.size, width=video.width, height=video.height, num_frames=count
    )
    return min(count * height * width * 3, request.limits.max_output_bytes)


def audio_seconds(
    info: MediaInfo, stream: AudioStream, limits: DecodeLimits, *, with_frames: bool
) -> float:
    """Seconds of sound that are delivered, if the headers are right.

    Args:
        info: What the container says.
        stream: The audio stream.
        limits: Of the job.
        with_frames: The sound comes with the frames of the video, on whose clock it lies.
    """
    if info.video is None or not with_frames:
        return min(stream.duration, limits.max_audio_s)
    picture = min(info.video.duration, limits.max_audio_s)
    if not stream.duration:
        return picture
    return min(max(0.0, stream.start + stream.duration - info.video.start), picture)


def audio_bytes(
    info: MediaInfo, stream: AudioStream, request: DecodeRequest, rate: int | None = None
) -> int:
    """Bytes of a decoded track, mixed to mono, at most, if its header is right.

    An estimated length bounds nothing. With frames, the picture's length bounds the track, whatever
    the header says: sound is placed by its timestamps.

    A track that is more than ``limits.max_output_bytes`` at its own rate is never decoded.

    Args:
        info: What the container says.
        stream: The track.
        request: The job.
        rate: Hz; None for the track's own.
    """
    limits = request.limits
    seconds = limits.max_audio_s
    if request.sampling is not None and info.video is not None:
        seconds = min(info.video.duration, seconds)
    elif stream.duration and not stream.estimated:
        seconds = min(stream.duration, seconds)
    return _sound_bytes(seconds, stream, limits, rate)


def claimed_audio_bytes(
    info: MediaInfo, stream: AudioStream, request: DecodeRequest, rate: int | None = None
) -> int:
    """As ``audio_bytes``, but what its header claims, if only by an estimate."""
    limits = request.limits
    seconds = audio_seconds(info, stream, limits, with_frames=request.sampling is not None)
    return _sound_bytes(seconds, stream, limits, rate)


def _sound_bytes(
    seconds: float, stream: AudioStream, limits: DecodeLimits, rate: int | None
) -> int:
    # A header may claim any rate; past this limit nothing is decoded.
    own = min(stream.sample_rate, MAX_SAMPLE_RATE)
    num_bytes = min(math.ceil(seconds * own) * 4, limits.max_output_bytes)
    return num_bytes if rate is None else num_bytes * rate // own
