"""Segments for families whose encoder takes every frame by itself, at one fixed size.

A temporal grid is one frame, and there are no temporal positions. So a segment is any number of
consecutive frames.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from vllm_mm_ext.adapters import vllm_compat
from vllm_mm_ext.adapters.processors.model_traits import video_kwargs
from vllm_mm_ext.adapters.processors.segment_info import limits_items_to_segments
from vllm_mm_ext.adapters.processors.segment_processor import SegmentProcessor
from vllm_mm_ext.video.segments import VideoLayout, VideoSegment, VideoShape


class PerFrameInfo:
    """Mixin in front of a family's processing info: a video item is no larger than a segment."""

    ctx: Any

    def frame_tokens(self) -> tuple[int, int]:
        """Tokens of a frame, vertically and horizontally, after the model's own pooling."""
        raise NotImplementedError

    def get_num_frames_with_most_features(self, seq_len: int, mm_counts: Mapping[str, int]) -> int:
        """Frames of the largest video item; vLLM sizes and profiles its encoder cache by this."""
        stock: int = super().get_num_frames_with_most_features(seq_len, mm_counts)  # type: ignore[misc]
        if not limits_items_to_segments(self.ctx):
            return stock
        target = vllm_compat.settings_of(self.ctx.model_config).segments.tokens
        rows, columns = self.frame_tokens()
        return min(stock, max(1, target // (rows * columns)))


class PerFrameProcessor(SegmentProcessor):
    """Mixin in front of a per-frame family's multimodal processor; its info is a `PerFrameInfo`."""

    tail = 0
    """Tokens the model adds after the last frame of a video."""

    numbered = False
    """Whether the number of each frame within its video is written into the prompt."""

    def layout(self, shape: VideoShape, hf_kwargs: Mapping[str, object]) -> VideoLayout | None:
        """One grid per frame; None if the processor has no fixed size of frames."""
        size = dict(self.info.get_hf_processor(**hf_kwargs).video_processor.size)
        if not size.get("height") or not size.get("width"):
            return None
        rows, columns = self.info.frame_tokens()
        return VideoLayout(
            size=(int(size["height"]), int(size["width"])),
            grids=shape.frames,
            height=rows,
            width=columns,
            temporal_patch=1,
            # Equal frames with other numbers must be another item to vLLM's processor cache.
            positions=np.arange(shape.frames) if self.numbered else None,
            tail=self.tail,
        )

    def frame_pixels(
        self, segments: Sequence[VideoSegment], hf_kwargs: Mapping[str, object]
    ) -> list[torch.Tensor]:
        """Each segment's frames ``[frames, 3, height, width]`` as the encoder takes them."""
        processor = self.info.get_hf_processor(**hf_kwargs).video_processor
        given = video_kwargs(self.info, hf_kwargs)
        known = processor.valid_kwargs.__annotations__.keys()
        options = {key: value for key, value in given.items() if key in known}
        options |= {"do_sample_frames": False, "return_tensors": "pt"}
        # One segment at a time: transformers would stack segments of equal length, a copy of all.
        return [
            self._finished(processor(videos=[_channels_first(frames)], **options))
            for frames in segments
        ]

    def _finished(self, made: Mapping[str, Sequence[torch.Tensor]]) -> torch.Tensor:
        pixels = made["pixel_values_videos"][0]
        dtype = self.info.ctx.model_config.dtype if pixels.is_floating_point() else None
        return pixels.to(device="cpu", dtype=dtype)


def _channels_first(frames: VideoSegment) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(frames)).permute(0, 3, 1, 2).contiguous()
