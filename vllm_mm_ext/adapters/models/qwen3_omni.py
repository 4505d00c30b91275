"""Qwen3-Omni (thinker) with segments, per-video sound tracks and real frame times."""

from __future__ import annotations

from contextlib import AbstractContextManager

from vllm.model_executor.models import qwen3_omni_moe_thinker
from vllm.model_executor.models.qwen3_omni_moe_thinker import (
    Qwen3OmniMoeThinkerDummyInputsBuilder,
    Qwen3OmniMoeThinkerForConditionalGeneration,
    Qwen3OmniMoeThinkerProcessingInfo,
)
from vllm.multimodal import MULTIMODAL_REGISTRY

from vllm_mm_ext.adapters.models.omni import SoundTrackModel, nothing_alternates
from vllm_mm_ext.adapters.models.reduced import ReducedVideoModel
from vllm_mm_ext.adapters.patches import set_meanwhile
from vllm_mm_ext.adapters.processors.qwen3_omni import Qwen3OmniMoeMultiModalProcessor, audio_window
from vllm_mm_ext.adapters.processors.segment_info import SegmentInfo
from vllm_mm_ext.video.track_pieces import AudioWindow


class Qwen3OmniMoeSegmentInfo(SegmentInfo, Qwen3OmniMoeThinkerProcessingInfo):  # type: ignore[misc]
    """vLLM's info, sized for segments."""

    def audio_window(self) -> AudioWindow:
        """What the audio encoder attends within."""
        return audio_window(self.get_hf_config().audio_config)


@MULTIMODAL_REGISTRY.register_processor(
    Qwen3OmniMoeMultiModalProcessor,
    info=Qwen3OmniMoeSegmentInfo,
    dummy_inputs=Qwen3OmniMoeThinkerDummyInputsBuilder,
)
class Qwen3OmniMoeForConditionalGeneration(
    SoundTrackModel,
    ReducedVideoModel,
    Qwen3OmniMoeThinkerForConditionalGeneration,  # type: ignore[misc]
):
    """vLLM's thinker, its processor replaced."""

    shares_markers = False

    def searching_nothing(self) -> AbstractContextManager[None]:
        """As the mixin has it."""
        return set_meanwhile(
            qwen3_omni_moe_thinker,
            "vllm.model_executor.models.qwen3_omni_moe_thinker:check_interleaved_audio_video",
            nothing_alternates,
        )
