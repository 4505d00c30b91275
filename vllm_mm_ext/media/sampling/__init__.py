"""Which frames of a video to show a model: pure, deterministic policies on its timeline."""

from __future__ import annotations

from vllm_mm_ext.errors import MediaError, NoSuchStreamError, UnreadableMediaError
from vllm_mm_ext.media.sampling.adaptive import Thumbnails, select_adaptive
from vllm_mm_ext.media.sampling.basic import select_explicit, select_keyframe, select_uniform
from vllm_mm_ext.media.types import FrameSelection, MediaInfo, SamplingSpec

__all__ = ["Thumbnails", "select"]


def select(info: MediaInfo, spec: SamplingSpec, thumbnails: Thumbnails) -> FrameSelection:
    """Choose the frames of a video that the model will see.

    Args:
        info: What the container says about the file, packet table included.
        spec: The policy, the frame rates in frames per second, and the bounds on the number of
            frames.
        thumbnails: Decodes the frames at the given sorted indices to uint8 ``[n, h * 3 / 2, w]``
            (Y, then Cb and Cr at half the size), longest edge about 64 pixels. The second argument
            are those of the indices that are likely to be chosen. Called at most once, and only by
            ``adaptive``.

    Returns:
        Strictly increasing frame indices (``explicit`` indices may repeat) with exact times, at
        most ``spec.max_frames`` of them. Equal arguments give equal selections.

    Raises:
        NoSuchStreamError: The file has no video stream.
        UnreadableMediaError: The file's video stream has no frames.
        MediaError: The spec is impossible, or ``explicit`` indices do not fit the clip.
    """
    if info.video is None or info.packets is None:
        raise NoSuchStreamError("the file has no video stream", parameter="video_url")
    if not len(info.packets):
        raise UnreadableMediaError("the video stream has no frames", parameter="video_url")
    for name, least in (("max_frames", 1), ("min_frames", 0), ("multiple_of", 1)):
        if getattr(spec, name) < least:
            raise MediaError(f"{name} must be at least {least}", parameter=name)
    if spec.policy == "uniform":
        return select_uniform(info, spec)
    if spec.policy == "keyframe":
        return select_keyframe(info, spec)
    if spec.policy == "explicit":
        return select_explicit(info, spec)
    return select_adaptive(info, spec, thumbnails)
