"""What the videos of a request would cost at a given plan: frames, pixels and prompt tokens."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Self

from vllm_mm_ext.config.options import NO_REDUCTION, Reduction
from vllm_mm_ext.media.audio.stream_choice import chosen_audio
from vllm_mm_ext.media.fetch.fetcher import MediaRef
from vllm_mm_ext.media.output_bytes import audio_seconds
from vllm_mm_ext.media.sampling.timeline import target_count
from vllm_mm_ext.media.sizing import target_size
from vllm_mm_ext.media.span import info_of
from vllm_mm_ext.media.traits import ModelTraits
from vllm_mm_ext.media.types import DecodeLimits, MediaInfo, VideoStream
from vllm_mm_ext.media.video_plan import VideoPlan
from vllm_mm_ext.policies.quality.videos import VideoDecision
from vllm_mm_ext.video.token_counts import TokenCount


@dataclass(frozen=True)
class PlannedVideo:
    """A video of a request before it is decoded.

    Attributes:
        url: URL of the video, as the request spells it.
        uses: How often the conversation shows the video.
        ref: The content behind the URL.
        info: What the container says about the video; where the plan has a span, about the span.
        stream: Its video stream.
        plan: What the server delivers of the video unless the quality controller lowers it.
    """

    url: str
    uses: int
    ref: MediaRef
    info: MediaInfo
    stream: VideoStream
    plan: VideoPlan

    @classmethod
    def of(
        cls, url: str, uses: int, ref: MediaRef, info: MediaInfo, plan: VideoPlan
    ) -> Self | None:
        """A probed video; None where the file has no video stream.

        Args:
            url, uses, ref, plan: See the attributes.
            info: Of the whole file.

        Raises:
            MediaError: The plan's span begins after the end of the video.
        """
        part = info_of(info, plan.sampling)
        return None if part.video is None else cls(url, uses, ref, part, part.video, plan)

    def planned(self, decision: VideoDecision, densest: float | None) -> VideoPlan:
        """The plan as the quality controller has decided.

        Args:
            decision: The decision about this video.
            densest: Most frames of a second, see ``FrontendCosts.densest``; None for no bound.
        """
        asked, most = self.plan.sampling, densest or math.inf
        sampling = replace(
            asked,
            # ``adaptive`` takes more than ``max_fps`` where one of the other rates asks for it.
            fps=min(decision.fps, most),
            min_fps=min(asked.min_fps, most),
            max_fps=min(asked.max_fps, most),
            min_frames=decision.min_frames,
            max_frames=decision.max_frames,
        )
        size = replace(self.plan.size, max_frame_pixels=decision.frame_pixels)
        return replace(self.plan, sampling=sampling, size=size, reduction=decision.reduction)


class FrontendCosts:
    """The ``VideoCosts`` of the quality controller: frames, pixels and tokens of a plan.

    Args:
        videos: The request's videos; the methods take the index of one of them.
        processor: vLLM's multimodal processor of the model.
        traits: What the model wants from the front-end.
        limits: The front-end's limits; sound longer than ``max_audio_s`` is cut.
        cut: The request lets the processor cut its videos into segments. Whole videos have about
            the tokens of their segments.

    The processor counts tokens with its tokenizer, which vLLM uses on one thread only. So call
    ``knows_tokens`` and ``tokens`` on that thread (``rendering_wrappers.on_processor_thread``).
    """

    def __init__(
        self,
        videos: Sequence[PlannedVideo],
        processor: Any,
        traits: ModelTraits,
        limits: DecodeLimits,
        *,
        cut: bool = True,
    ) -> None:
        self._videos = videos
        self._traits = traits
        self._limits = limits
        self._cut = cut
        self._count = getattr(processor, "video_tokens", None)
        self._known: dict[tuple[int, int, int, Reduction], TokenCount] = {}

    @property
    def knows_tokens(self) -> bool:
        """Whether the model's processor can count the tokens of all these videos."""
        if self._count is None:
            return False
        try:
            for index in range(len(self._videos)):
                self.tokens(index, self._traits.frame_multiple, 0, NO_REDUCTION)
        except ValueError:
            # The processor leaves such a video, or every video on this server, to stock vLLM.
            return False
        return True

    def frames(self, index: int, fps: float, min_frames: int, max_frames: int) -> int:
        """Number of frames that sampling would deliver.

        Args:
            index: Index of the video.
            fps: Frames per second.
            min_frames, max_frames: Bounds on the number of frames.
        """
        video = self._videos[index]
        spec = replace(video.plan.sampling, fps=fps, min_frames=min_frames, max_frames=max_frames)
        return target_count(video.info, spec)

    def pixels(self, index: int, frames: int, cap: int) -> int:
        """Pixels of one delivered frame.

        Args:
            index: Index of the video.
            frames: Number of frames delivered.
            cap: Most pixels of a frame; 0 for no cap.
        """
        height, width = self._size(index, frames, cap)
        return height * width

    def tokens(self, index: int, frames: int, cap: int, reduction: Reduction) -> int:
        """Prompt tokens of one use of the video, with its sound.

        Args:
            index: Index of the video.
            frames: Number of frames delivered.
            cap: Most pixels of a frame; 0 for no cap.
            reduction: The token reduction.
        """
        return int(self._whole(index, frames, cap, reduction).total)

    def item_tokens(
        self, index: int, frames: int, cap: int, reduction: Reduction, fps: float
    ) -> int:
        """Most tokens of a segment of the video, or of the video if it is not cut.

        Where the keyframes of a video are is not known yet, so for ``keyframe`` this is a guess:
        that they are evenly spaced.

        Args:
            index: Index of the video.
            frames: Number of frames delivered.
            cap: Most pixels of a frame; 0 for no cap.
            reduction: The token reduction.
            fps: Frames per second asked for; ``frames`` may be fewer.
        """
        if not self._cut:
            # Its sound is an item of its own.
            return int(self._whole(index, frames, cap, reduction).visual)
        video = self._videos[index]
        if not self._samples(video):
            # Cut by the number of frames alone.
            return int(self._whole(index, frames, cap, reduction).largest)
        sampling, duration = video.plan.sampling, max(video.stream.duration, 1e-6)
        if sampling.policy == "adaptive":
            # As many frames in any second; ``densest`` sees to it that there are no more.
            most = max(1, math.ceil(frames / duration - 1e-6))
            return self._item(index, frames, cap, reduction, most)
        # Where a bound on the frames binds: from the first frame of the clip to the last.
        rate = max(1, frames - 1) / (duration * max(1 - 1 / video.stream.num_frames, 1e-6))
        if sampling.policy == "uniform" and frames > duration * fps - sampling.multiple_of:
            # Otherwise ``fps`` holds, and after the last frame there may be room for another.
            rate = max(rate, fps)
        return self._item(index, frames, cap, reduction, rate)

    def densest(
        self, index: int, frames: int, cap: int, reduction: Reduction, fps: float, limit: int
    ) -> float:
        """Most frames of a second with which ``adaptive`` makes no segment of more tokens.

        Args:
            index: Index of the video.
            frames: Number of frames delivered.
            cap: Most pixels of a frame; 0 for no cap.
            reduction: The token reduction.
            fps: Frames per second asked for.
            limit: Most tokens of a segment.

        Returns:
            A whole number; where more would fit, one that no rate of the sampling exceeds.
        """
        most = max(fps, self._videos[index].plan.sampling.max_fps)
        rates = range(math.ceil(most), 1, -1)
        fits = (r for r in rates if self._item(index, frames, cap, reduction, r) <= limit)
        return float(next(fits, 1))

    def _item(self, index: int, frames: int, cap: int, reduction: Reduction, rate: float) -> int:
        times = [k / rate for k in range(frames)]
        return int(self._counted(index, times, cap, reduction).largest)

    def _whole(self, index: int, frames: int, cap: int, reduction: Reduction) -> TokenCount:
        """Tokens of a video; counting is slow, so counts are kept."""
        key = index, frames, cap, reduction
        if key not in self._known:
            # Times decide how many digits are written. Of all of them, evenly spaced ones tell
            # enough.
            times = [k * self._videos[index].stream.duration / frames for k in range(frames)]
            self._known[key] = self._counted(index, times, cap, reduction)
        return self._known[key]

    def _counted(
        self, index: int, times: Sequence[float], cap: int, reduction: Reduction
    ) -> TokenCount:
        """Tokens of a video with frames at these times."""
        video, frames = self._videos[index], len(times)
        height, width = self._size(index, frames, cap)
        assert self._count is not None
        count: TokenCount = self._count(
            frames,
            height,
            width,
            times=times,
            audio_samples=self._samples(video),
            reduction=reduction,
            cut=self._cut,
        )
        return count

    def _size(self, index: int, frames: int, cap: int) -> tuple[int, int]:
        video = self._videos[index]
        rule = replace(video.plan.size, max_frame_pixels=cap)
        stream = video.stream
        return target_size(rule, width=stream.width, height=stream.height, num_frames=frames)

    def _samples(self, video: PlannedVideo) -> int:
        heard = video.info.audio if video.plan.audio else ()
        track = chosen_audio(heard, video.plan.audio_stream)
        if track is None:
            return 0
        seconds = audio_seconds(video.info, track, self._limits, with_frames=True)
        return round(seconds * (self._traits.audio_rate or track.sample_rate))
