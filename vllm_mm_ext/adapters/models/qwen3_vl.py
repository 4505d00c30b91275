"""Qwen3-VL with segments and token reduction."""

from __future__ import annotations

from vllm.model_executor.models.qwen3_vl import Qwen3VLDummyInputsBuilder, Qwen3VLProcessingInfo
from vllm.model_executor.models.qwen3_vl import Qwen3VLForConditionalGeneration as _Stock
from vllm.multimodal import MULTIMODAL_REGISTRY

from vllm_mm_ext.adapters.models.reduced import ReducedVideoModel
from vllm_mm_ext.adapters.models.timestamped import TimestampedModel
from vllm_mm_ext.adapters.processors.qwen3_vl import Qwen3VLMultiModalProcessor
from vllm_mm_ext.adapters.processors.session_media import SessionInfo


class Qwen3VLSessionInfo(SessionInfo, Qwen3VLProcessingInfo):  # type: ignore[misc]
    """vLLM's processing info, which does not count a session's media."""


@MULTIMODAL_REGISTRY.register_processor(
    Qwen3VLMultiModalProcessor,
    info=Qwen3VLSessionInfo,
    dummy_inputs=Qwen3VLDummyInputsBuilder,
)
class Qwen3VLForConditionalGeneration(TimestampedModel, ReducedVideoModel, _Stock):  # type: ignore[misc]
    """vLLM's model, its processor replaced."""
