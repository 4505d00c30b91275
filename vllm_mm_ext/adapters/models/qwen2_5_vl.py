"""Qwen2.5-VL with segments, token reduction and real frame times."""

from __future__ import annotations

from vllm.model_executor.models.qwen2_5_vl import (
    Qwen2_5_VLDummyInputsBuilder,
    Qwen2_5_VLProcessingInfo,
)
from vllm.model_executor.models.qwen2_5_vl import Qwen2_5_VLForConditionalGeneration as _Stock
from vllm.multimodal import MULTIMODAL_REGISTRY

from vllm_mm_ext.adapters.models.frame_positions import FrameTimesModel
from vllm_mm_ext.adapters.models.reduced import ReducedVideoModel
from vllm_mm_ext.adapters.processors.qwen2_5_vl import Qwen2_5_VLMultiModalProcessor
from vllm_mm_ext.adapters.processors.segment_info import SegmentInfo


class Qwen2_5_VLSegmentInfo(SegmentInfo, Qwen2_5_VLProcessingInfo):  # type: ignore[misc]  # noqa: N801
    """vLLM's info, sized for segments."""


@MULTIMODAL_REGISTRY.register_processor(
    Qwen2_5_VLMultiModalProcessor,
    info=Qwen2_5_VLSegmentInfo,
    dummy_inputs=Qwen2_5_VLDummyInputsBuilder,
)
class Qwen2_5_VLForConditionalGeneration(FrameTimesModel, ReducedVideoModel, _Stock):  # type: ignore[misc]  # noqa: N801
    """vLLM's model, its processor replaced."""
