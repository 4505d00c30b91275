"""How many bytes a decode job will make, told before it begins."""

from __future__ import annotations

from vllm_mm_ext.media.sampling.timeline import target_count
from vllm_mm_ext.media.sizing import target_size
from vllm_mm_ext.media.types import AudioStream, DecodeLimits, DecodeRequest, MediaInfo


def frame_bytes(info: MediaInfo, request: DecodeRequest) -> int:
    """Bytes of the frames of a job, at most.

    More than ``limits.max_output_bytes`` are never decoded.

    Raises:
        MediaError: See ``target_size``.
    """
    sampling, video = request.sampling, info.video
    if sampling is None or video is None:
        return 0
    if sampling.indices is not None:
        count = len(sampling.indices)
    elif sampling.policy == "keyframe":
        count = min(sampling.max_frames, video.num_frames)
    else:
        count = target_count(info, sampling)
    height, width = target_size(
        request.size, width=video.width, height=video.height, num_frames=count
    )
    return min(count * height * width * 3, request.limits.max_output_bytes)


def audio_bytes(stream: AudioStream, limits: DecodeLimits, rate: int | None = None) -> int:
    """Bytes of a decoded track, mixed to mono, if its header is right.

    A track that is more than ``limits.max_output_bytes`` at its own rate is never decoded.

    Args:
        stream: The track.
        limits: Of the job.
        rate: Hz; None for the track's own.
    """
    seconds = min(stream.duration, limits.max_audio_s)
    num_bytes = min(int(seconds * stream.sample_rate) * 4, limits.max_output_bytes)
    return num_bytes if rate is None else num_bytes * rate // stream.sample_rate
