"""What the videos of a request would cost, in the terms the quality controller plans in."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from vllm_mm_ext.config.options import NO_REDUCTION, Reduction
from vllm_mm_ext.media.fetch.fetcher import MediaRef
from vllm_mm_ext.media.sampling.timeline import target_count
from vllm_mm_ext.media.sizing import target_size
from vllm_mm_ext.media.traits import ModelTraits
from vllm_mm_ext.media.types import DecodeLimits, MediaInfo, VideoStream
from vllm_mm_ext.media.video_plan import VideoPlan


@dataclass(frozen=True)
class PlannedVideo:
    """A video of a request before it is decoded.

    Attributes:
        url: As the request spells it.
        uses: How often the conversation shows it.
        ref: Its content.
        info: What its container says.
        stream: Its video stream.
        plan: What the server would deliver of it, unless anything is lowered.
    """

    url: str
    uses: int
    ref: MediaRef
    info: MediaInfo
    stream: VideoStream
    plan: VideoPlan


class FrontendCosts:
    """The ``VideoCosts`` of the quality controller: frames, pixels and tokens of a plan.

    Args:
        videos: The request's videos; methods name one by its index.
        processor: vLLM's multimodal processor of the model.
        traits: What the model wants from the front-end.
        limits: The front-end's limits, which cut long sound.

    The processor counts with a tokenizer of its own, which vLLM keeps to one thread: tokens are
    counted there only (``rendering_wrappers.on_processor_thread``).
    """

    def __init__(
        self,
        videos: Sequence[PlannedVideo],
        processor: Any,
        traits: ModelTraits,
        limits: DecodeLimits,
    ) -> None:
        self._videos = videos
        self._traits = traits
        self._limits = limits
        self._count = getattr(processor, "video_tokens", None)

    @property
    def knows_tokens(self) -> bool:
        """Whether the model's processor counts tokens, for all of these videos."""
        if self._count is None:
            return False
        try:
            for index in range(len(self._videos)):
                self.tokens(index, self._traits.frame_multiple, 0, NO_REDUCTION)
        except ValueError:
            # Such a video, or every video as the server is set up, is left to stock vLLM.
            return False
        return True

    def frames(self, index: int, fps: float, min_frames: int, max_frames: int) -> int:
        """Frames that sampling would deliver."""
        video = self._videos[index]
        spec = replace(video.plan.sampling, fps=fps, min_frames=min_frames, max_frames=max_frames)
        return target_count(video.info, spec)

    def pixels(self, index: int, frames: int, cap: int) -> int:
        """Pixels of one delivered frame; ``cap`` is the most it may have, 0 for no cap."""
        height, width = self._size(index, frames, cap)
        return height * width

    def tokens(self, index: int, frames: int, cap: int, reduction: Reduction) -> int:
        """Prompt tokens of one use of the video, its sound included."""
        video = self._videos[index]
        height, width = self._size(index, frames, cap)
        # Only families that write times into the prompt look at them, and only at their digits.
        times = [k * video.stream.duration / frames for k in range(frames)]
        assert self._count is not None
        count = self._count(
            frames,
            height,
            width,
            times=times,
            audio_samples=self._samples(video),
            reduction=reduction,
        )
        return int(count.total)

    def _size(self, index: int, frames: int, cap: int) -> tuple[int, int]:
        video = self._videos[index]
        rule = replace(video.plan.size, max_frame_pixels=cap)
        stream = video.stream
        return target_size(rule, width=stream.width, height=stream.height, num_frames=frames)

    def _samples(self, video: PlannedVideo) -> int:
        if not (video.plan.audio and video.info.audio):
            return 0
        track = video.info.audio[0]
        seconds = min(track.duration, self._limits.max_audio_s)
        return round(seconds * (self._traits.audio_rate or track.sample_rate))
