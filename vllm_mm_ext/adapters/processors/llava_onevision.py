"""LLaVA-OneVision: segments of whole frames; a newline embedding follows a video's last frame."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from vllm.model_executor.models.llava_onevision import (
    LlavaOnevisionMultiModalProcessor as _StockProcessor,
)
from vllm.model_executor.models.llava_onevision import (
    LlavaOnevisionProcessingInfo as _StockInfo,
)
from vllm.multimodal.inputs import MultiModalFieldConfig

from vllm_mm_ext.adapters.processors.per_frame import PerFrameInfo, PerFrameProcessor
from vllm_mm_ext.adapters.processors.segment_items import part_of
from vllm_mm_ext.video.segments import Segment, VideoSegment

ENDS = "video_ends"
"""bool per item: whether the segment is the last one of its video."""


class LlavaOnevisionProcessingInfo(PerFrameInfo, _StockInfo):  # type: ignore[misc]
    """vLLM's processing info, with video items no larger than a segment."""

    def frame_tokens(self) -> tuple[int, int]:
        """A square, as frames of any size are resized to a square."""
        # vLLM counts one newline per video, which is no token of a frame.
        tokens = self.get_num_video_tokens(image_width=1, image_height=1, num_frames=1) - 1
        return (math.isqrt(tokens),) * 2


class LlavaOnevisionMultiModalProcessor(PerFrameProcessor, _StockProcessor):  # type: ignore[misc]
    """vLLM's processor, which takes segments instead of videos."""

    tail = 1

    @property
    def video_token_id(self) -> int:
        """Id of ``<video>``."""
        return int(self.info.get_hf_config().video_token_index)

    def placeholder(self, part: Segment) -> list[int]:
        """One token per visual token, and in the last segment one for the newline."""
        return [self.video_token_id] * (part.visual + (self.tail if part.is_last else 0))

    def encode_inputs(
        self, segments: Sequence[VideoSegment], hf_kwargs: Mapping[str, object]
    ) -> dict[str, Any]:
        """Pixels of each segment, and whether the segment is the last one of its video."""
        return {
            "pixel_values_videos": self.frame_pixels(segments, hf_kwargs),
            ENDS: torch.tensor([part.is_last for part in map(part_of, segments)]),
        }

    def _get_mm_fields_config(
        self, hf_inputs: Any, hf_processor_mm_kwargs: Mapping[str, object]
    ) -> Mapping[str, MultiModalFieldConfig]:
        fields = super()._get_mm_fields_config(hf_inputs, hf_processor_mm_kwargs)
        return {**fields, ENDS: MultiModalFieldConfig.batched("video", keep_on_cpu=True)}
