"""Qwen3-VL with experts: as the dense model."""

from __future__ import annotations

from vllm.model_executor.models.qwen3_vl import Qwen3VLDummyInputsBuilder
from vllm.model_executor.models.qwen3_vl_moe import Qwen3VLMoeForConditionalGeneration as _Stock
from vllm.model_executor.models.qwen3_vl_moe import Qwen3VLMoeProcessingInfo
from vllm.multimodal import MULTIMODAL_REGISTRY

from vllm_mm_ext.adapters.models.reduced import ReducedVideoModel
from vllm_mm_ext.adapters.models.timestamped import TimestampedModel
from vllm_mm_ext.adapters.processors.qwen3_vl import Qwen3VLMultiModalProcessor
from vllm_mm_ext.adapters.processors.session_media import SessionInfo


class Qwen3VLMoeSessionInfo(SessionInfo, Qwen3VLMoeProcessingInfo):  # type: ignore[misc]
    """vLLM's processing info, which does not count a session's media."""


@MULTIMODAL_REGISTRY.register_processor(
    Qwen3VLMultiModalProcessor,
    info=Qwen3VLMoeSessionInfo,
    dummy_inputs=Qwen3VLDummyInputsBuilder,
)
class Qwen3VLMoeForConditionalGeneration(TimestampedModel, ReducedVideoModel, _Stock):  # type: ignore[misc]
    """vLLM's model, its processor replaced."""
