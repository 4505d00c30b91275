"""InternVL in the transformers layout with segments and token reduction."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from vllm.model_executor.models.interns1 import InternS1DummyInputsBuilder
from vllm.model_executor.models.interns1 import InternS1ForConditionalGeneration as _Stock
from vllm.multimodal import MULTIMODAL_REGISTRY

from vllm_mm_ext.adapters.models.per_frame import PerFrameModel
from vllm_mm_ext.adapters.processors.internvl import (
    InternVLMultiModalProcessor,
    InternVLProcessingInfo,
)


@MULTIMODAL_REGISTRY.register_processor(
    InternVLMultiModalProcessor,
    info=InternVLProcessingInfo,
    dummy_inputs=InternS1DummyInputsBuilder,
)
class InternVLForConditionalGeneration(PerFrameModel, _Stock):  # type: ignore[misc]
    """vLLM's model, its processor replaced."""

    @property
    def patches_per_frame(self) -> int:
        """Of one 14 x 14 pixels patch each, before they are shuffled into fewer tokens."""
        vision = self.config.vision_config
        rows, columns = (
            size // patch for size, patch in zip(vision.image_size, vision.patch_size, strict=True)
        )
        return int(rows * columns)

    @property
    def frame_tokens(self) -> tuple[int, int]:
        """The square that pixel shuffling leaves."""
        vision = self.config.vision_config
        side = vision.image_size[0] // vision.patch_size[0]
        return (int(side * self.config.downsample_ratio),) * 2

    def frames_of(self, kwargs: Mapping[str, Any]) -> Sequence[int]:
        """A frame is one tile."""
        return [int(frames) for frames in kwargs["video_num_patches"]]

    def extract_feature(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """Tokens ``[frames, tokens, channels]`` of frames or tiles, in bounded calls."""
        return self.in_batches(super().extract_feature, pixel_values)
