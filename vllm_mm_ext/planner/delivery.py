"""What a server makes of every video: the settings that a plan chooses and its levers change."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from vllm_mm_ext.config.options import NO_REDUCTION, Reduction
from vllm_mm_ext.media.sampling.basic import select_uniform
from vllm_mm_ext.media.types import MediaInfo, PacketTable, SamplingSpec, VideoStream
from vllm_mm_ext.planner.workload import Video

# ``media.sampling.max_frames`` is at most this.
MAX_FRAMES = 4096


@dataclass(frozen=True)
class Delivery:
    """How videos are sampled, sized and reduced.

    Attributes:
        max_frames: Most frames of a video.
        min_frames: Fewest frames of a video that has as many.
        frame_pixels: Most pixels of a frame; 0 for no bound beside the processor's own.
        reduction: The token reduction.
    """

    max_frames: int
    min_frames: int = 4
    frame_pixels: int = 0
    reduction: Reduction = NO_REDUCTION


def frame_times(video: Video, delivery: Delivery, frame_multiple: int) -> tuple[float, ...]:
    """Times of the frames that uniform sampling takes of a video; adaptive takes as many.

    Args:
        video: The video, taken to have frames at a constant rate.
        delivery: How it is sampled.
        frame_multiple: Frames of the model's temporal patch.

    Returns:
        Seconds from the start of the video, ascending.
    """
    count = max(1, round(video.seconds * video.source_fps))
    time = np.arange(count) / video.source_fps
    packets = PacketTable(
        pts=np.arange(count, dtype=np.int64),
        time=time,
        size=np.ones(count, np.int32),
        is_key=np.ones(count, np.bool_),
        time_base=1 / video.source_fps,
    )
    stream = VideoStream(
        index=0,
        codec=video.codec,
        width=video.width,
        height=video.height,
        rotation=0,
        fps=video.source_fps,
        is_vfr=False,
        num_frames=count,
        duration=count / video.source_fps,
        pixel_format="",
    )
    spec = SamplingSpec(
        fps=video.fps,
        max_frames=delivery.max_frames,
        min_frames=min(delivery.min_frames, delivery.max_frames),
        multiple_of=frame_multiple,
    )
    info = MediaInfo("", 0, stream.duration, stream, (), packets)
    chosen = select_uniform(info, spec)
    return tuple(chosen.times.tolist())


def frames_asked(video: Video) -> int:
    """Frames that the rate alone asks for."""
    return max(1, int(min(video.seconds * video.fps, video.seconds * video.source_fps) + 1e-6))
