"""What videos are to get before any token budget: as asked, or less under load. Pure."""

from __future__ import annotations

import math
from dataclasses import dataclass

from vllm_mm_ext.config.options import NO_REDUCTION, Reduction, RequestOptions
from vllm_mm_ext.config.quality_settings import QualitySettings
from vllm_mm_ext.policies.quality.fit import Target
from vllm_mm_ext.policies.quality.videos import Family, SamplingDefaults, VideoCosts, VideoSource


@dataclass(frozen=True)
class Delivery:
    """How one video is sampled and sized.

    Attributes:
        fps, min_frames, max_frames: For its sampling.
        frames: Frames that sampling delivers then.
        cap: Cap on the pixels of one frame, 0 for none.
        pixels: Pixels that one frame has then.
    """

    fps: float
    min_frames: int
    max_frames: int
    frames: int
    cap: int
    pixels: int


@dataclass(frozen=True)
class Targets:
    """Says for each video of a request what it is to get, and how far it may be lowered.

    Attributes:
        settings: The ``quality`` section.
        costs: What the videos would become.
        defaults: What a video gets if the request does not say.
        family: What can be done to videos of the served model.
        options: What the request asks.
    """

    settings: QualitySettings
    costs: VideoCosts
    defaults: SamplingDefaults
    family: Family
    options: RequestOptions

    @property
    def reduction(self) -> Reduction:
        """The token reduction that the request or the server asks for."""
        if not self.family.reducible:
            return NO_REDUCTION
        return self.options.reduction or self.defaults.reduction

    def asked(self, index: int) -> Delivery:
        """A video as asked. An explicit lower bound lifts the default upper one."""
        options, defaults = self.options, self.defaults
        fps = options.fps or defaults.fps
        lower = max(options.min_frames or 1, options.floor.frames or 1)
        max_frames = options.max_frames or max(defaults.max_frames, lower)
        min_frames = options.min_frames or min(defaults.min_frames, max_frames)
        cap = defaults.cap if options.resolution is None else options.resolution**2
        frames = self.costs.frames(index, fps, min_frames, max_frames)
        pixels = self.costs.pixels(index, frames, cap)
        return Delivery(fps, min_frames, max_frames, frames, cap, pixels)

    def under_load(self, index: int, video: VideoSource, asked: Delivery, level: int) -> Delivery:
        """What a load tier leaves of a video as asked; floors are respected.

        Rate and upper bound shrink alike: a long clip that its bound limits loses as much as a
        short one that its rate limits, and a clip on a fixed step stays on one.
        """
        if not level:
            return asked
        tiers, options = self.settings.tiers, self.options
        rate, side = tiers.frame_rate[level], tiers.resolution[level] / tiers.resolution[0]
        floor = self._floor_frames(video, asked)
        fps = max(asked.fps * rate, min(asked.fps, options.floor.fps or 0.0))
        max_frames = max(math.ceil(asked.max_frames * rate), floor)
        min_frames = min(max(asked.min_frames, floor), max_frames)
        frames = self.costs.frames(index, fps, min_frames, max_frames)
        cap, pixels = asked.cap, asked.pixels
        if self.family.resizable:
            lowest = min(asked.pixels, self._floor_pixels)
            cap = max(int(asked.pixels * side**2), lowest)
            pixels = self.costs.pixels(index, frames, cap)
        return Delivery(fps, min_frames, max_frames, frames, cap, pixels)

    def target(self, video: VideoSource, asked: Delivery, wanted: Delivery) -> Target:
        """What fitting to a budget starts from.

        Args:
            video: The video.
            asked: The video as asked.
            wanted: What the load leaves of that.
        """
        budget = self.settings.budget
        sparse = min(math.ceil(budget.sparse_fps * video.duration), budget.sparse_frames)
        return Target(
            video,
            frames=wanted.frames,
            sparse_frames=sparse,
            floor_frames=min(wanted.frames, self._floor_frames(video, asked)),
            cap=wanted.cap,
            pixels=wanted.pixels,
            floor_pixels=self._floor_pixels,
            reduction=self.reduction,
            reductions=budget.reductions,
        )

    def _floor_frames(self, video: VideoSource, asked: Delivery) -> int:
        """Frames that a video keeps; what the request says of that outranks the server's floor."""
        floor = self.options.floor
        own = [
            floor.frames,
            self.options.min_frames,
            None if floor.fps is None else math.ceil(floor.fps * video.duration),
        ]
        given = [frames for frames in own if frames is not None]
        return min(asked.frames, max(given, default=self.settings.budget.floor_frames))

    @property
    def _floor_pixels(self) -> int:
        side = self.options.floor.resolution or self.settings.budget.floor_resolution
        return side**2
