"""Costs of made-up videos by the rules of real families: size, patches, timestamps, reduction."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from vllm_mm_ext.config.options import Reduction
from vllm_mm_ext.media.sizing import target_size
from vllm_mm_ext.media.types import SizeRule
from vllm_mm_ext.policies.quality.videos import Family, SamplingDefaults, VideoSource

QWEN2_5_VL = SizeRule("qwen_vl", factor=28, min_pixels=128 * 784, max_pixels=768 * 784)
# A pixel budget for the whole video: fewer frames are larger ones.
QWEN3_VL = SizeRule("qwen3_vl", factor=32, min_pixels=4096, max_pixels=25_165_824)
FIXED = SizeRule("fixed", height=384, width=384)

FAMILY = Family(resizable=True, reducible=True, countable=True, frame_multiple=2)


def video(
    name: str = "v", seconds: float = 60.0, width: int = 1280, height: int = 720
) -> VideoSource:
    return VideoSource(name, seconds, max(1, round(seconds * 25)), width, height)


@dataclass
class RuleCosts:
    """``VideoCosts`` by arithmetic; ``calls`` counts token counts asked for."""

    videos: Sequence[VideoSource]
    rule: SizeRule = QWEN2_5_VL
    multiple: int = 2
    sound_rate: int = 0
    calls: list[int] = field(default_factory=list)

    def frames(self, index: int, fps: float, min_frames: int, max_frames: int) -> int:
        source = self.videos[index]
        count = max(min(round(source.duration * fps), max_frames), min_frames)
        count = min(count, source.num_frames)
        return max(1, count - count % self.multiple if count >= self.multiple else count)

    def size(self, index: int, frames: int, cap: int) -> tuple[int, int]:
        source = self.videos[index]
        rule = replace(self.rule, max_frame_pixels=cap)
        return target_size(rule, width=source.width, height=source.height, num_frames=frames)

    def pixels(self, index: int, frames: int, cap: int) -> int:
        return math.prod(self.size(index, frames, cap))

    def tokens(self, index: int, frames: int, cap: int, reduction: Reduction) -> int:
        self.calls.append(index)
        height, width = self.size(index, frames, cap)
        grids = math.ceil(frames / self.multiple)
        side = self.rule.factor
        visual = reduction.count(grids, height // side, width // side)
        return visual + 2 + round(self.videos[index].duration * self.sound_rate)

    def item_tokens(
        self,
        index: int,
        frames: int,
        cap: int,
        reduction: Reduction,
        fps: float,  # noqa: ARG002
    ) -> int:
        """Made-up videos are not cut."""
        return self.tokens(index, frames, cap, reduction)


def defaults(fps: float = 1.0, max_frames: int = 64) -> SamplingDefaults:
    return SamplingDefaults(fps, min(4, max_frames), max_frames, Reduction())
