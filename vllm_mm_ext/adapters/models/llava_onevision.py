"""LLaVA-OneVision with segments and token reduction."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from vllm.model_executor.models.llava_onevision import LlavaOnevisionDummyInputsBuilder
from vllm.model_executor.models.llava_onevision import (
    LlavaOnevisionForConditionalGeneration as _Stock,
)
from vllm.multimodal import MULTIMODAL_REGISTRY

from vllm_mm_ext.adapters.models.per_frame import PerFrameModel
from vllm_mm_ext.adapters.processors.llava_onevision import (
    ENDS,
    LlavaOnevisionMultiModalProcessor,
    LlavaOnevisionProcessingInfo,
)


@MULTIMODAL_REGISTRY.register_processor(
    LlavaOnevisionMultiModalProcessor,
    info=LlavaOnevisionProcessingInfo,
    dummy_inputs=LlavaOnevisionDummyInputsBuilder,
)
class LlavaOnevisionForConditionalGeneration(PerFrameModel, _Stock):  # type: ignore[misc]
    """vLLM's model, its processor replaced."""

    @property
    def patches_per_frame(self) -> int:
        """Before the model's own pooling, which video alone goes through."""
        return int(self._side**2)

    @property
    def frame_tokens(self) -> tuple[int, int]:
        """What vLLM's `apply_pooling` leaves of the square of patches."""
        return (math.ceil(self._side / 2),) * 2

    @property
    def _side(self) -> int:
        vision = self.config.vision_config
        return int(vision.image_size // vision.patch_size)

    def frames_of(self, kwargs: Mapping[str, Any]) -> Sequence[int]:
        """Frames come as one tensor per video."""
        return [len(frames) for frames in kwargs["pixel_values_videos"]]

    def _image_pixels_to_features(
        self, vision_tower: Any, pixel_values: torch.Tensor
    ) -> torch.Tensor:
        encode = partial(super()._image_pixels_to_features, vision_tower)
        return self.in_batches(encode, pixel_values)

    def _video_pixels_to_features(
        self, vision_tower: Any, pixel_values: torch.Tensor
    ) -> torch.Tensor:
        encode = partial(super()._video_pixels_to_features, vision_tower)
        return self.in_batches(encode, pixel_values)

    def _process_video_pixels(self, inputs: Any) -> list[torch.Tensor]:
        """Tokens ``[frames * tokens, channels]`` of each item, without a newline."""
        videos = inputs["pixel_values_videos"]
        stacked = isinstance(videos, torch.Tensor)
        frames = videos.flatten(0, 1) if stacked else torch.cat(videos)
        tokens = self._video_pixels_to_features(self.vision_tower, frames)
        return [part.flatten(0, 1) for part in tokens.split([len(video) for video in videos])]

    def embed_multimodal(self, **kwargs: Any) -> Any:
        """Embeddings per item, with a newline where a video ends."""
        made = super().embed_multimodal(**kwargs)
        if "pixel_values_videos" not in kwargs:
            return made
        # vLLM batches items of one modality at a time. An item that is no segment is a whole video.
        ends = kwargs.get(ENDS, (True,) * len(made))
        newline = self.image_newline[None]
        return tuple(
            torch.cat([tokens, newline]) if end else tokens
            for tokens, end in zip(made, ends, strict=True)
        )
