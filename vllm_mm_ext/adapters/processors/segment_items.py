"""Segments as vLLM's processors see them: video items that are hashed by their digest."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from blake3 import blake3
from vllm.multimodal.parse import VideoProcessorItems

from vllm_mm_ext.config.options import Reduction
from vllm_mm_ext.media.payload import SampledFrames
from vllm_mm_ext.video.segments import Segment, VideoSegment


class SegmentItems(VideoProcessorItems):  # type: ignore[misc]
    """Video items that are segments, hashed by their digest."""

    def get_item_for_hash(self, index: int) -> object:
        """What vLLM hashes to identify the item in its caches."""
        segment = segment_at(self, index)
        return self.data[index] if segment is None else f"mm_ext:{segment.digest}"


def segment_at(items: Any, index: int) -> VideoSegment | None:
    """The segment at an index of a request's video items; None if that item is no segment."""
    if not isinstance(items, VideoProcessorItems):
        return None
    item = items.get(index)
    frames = item[0] if isinstance(item, tuple) else item
    return frames if isinstance(frames, VideoSegment) else None


def frames_of(video: Any) -> npt.NDArray[np.uint8] | None:
    """A video as frames ``[n, height, width, 3]``.

    Args:
        video: What a client gives for a video: an array, a tensor or a list of frames. As for
            transformers, the channels may stand before height and width.

    Returns:
        None if the video is anything else than bytes in main memory: floating-point frames, which
        cannot be cut without rounding them, frames on a GPU, embeddings.
    """
    if isinstance(video, torch.Tensor):
        if video.dtype != torch.uint8 or video.device.type != "cpu":
            return None
        video = video.numpy()
    elif isinstance(video, list):
        frames = [np.asarray(frame) for frame in video]
        if len({frame.shape for frame in frames}) != 1:
            return None
        video = np.stack(frames)
    if not isinstance(video, np.ndarray) or video.ndim != 4 or video.dtype != np.uint8:
        return None
    if video.shape[3] == 3:
        return video
    return np.moveaxis(video, 1, 3) if video.shape[1] == 3 else None


def wrapped(frames: npt.NDArray[np.uint8], reduction: Reduction) -> SampledFrames:
    """``SampledFrames`` of frames that came as a plain array, with a digest of their pixels."""
    contiguous = np.ascontiguousarray(frames)
    digest = blake3(repr(contiguous.shape).encode() + b"|").update(contiguous.data).hexdigest()
    return SampledFrames(contiguous, digest=str(digest), reduction=reduction)


def part_of(segment: VideoSegment) -> Segment:
    """The place of a segment in its video."""
    assert segment.part is not None  # Only arrays derived from a segment have none.
    return segment.part
