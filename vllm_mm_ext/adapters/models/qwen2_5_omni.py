"""Qwen2.5-Omni (thinker) with segments, per-video sound tracks and real frame times."""

from __future__ import annotations

from contextlib import AbstractContextManager

from vllm.model_executor.models import qwen2_5_omni_thinker
from vllm.model_executor.models.qwen2_5_omni_thinker import (
    Qwen2_5OmniThinkerDummyInputsBuilder,
    Qwen2_5OmniThinkerForConditionalGeneration,
    Qwen2_5OmniThinkerProcessingInfo,
)
from vllm.multimodal import MULTIMODAL_REGISTRY

from vllm_mm_ext.adapters.models.omni import SoundTrackModel, nothing_alternates
from vllm_mm_ext.adapters.models.reduced import ReducedVideoModel
from vllm_mm_ext.adapters.patches import set_meanwhile
from vllm_mm_ext.adapters.processors.qwen2_5_omni import (
    Qwen2_5OmniMultiModalProcessor,
    audio_window,
)
from vllm_mm_ext.adapters.processors.segment_info import SegmentInfo
from vllm_mm_ext.video.track_pieces import AudioWindow


class Qwen2_5OmniSegmentInfo(SegmentInfo, Qwen2_5OmniThinkerProcessingInfo):  # type: ignore[misc]  # noqa: N801
    """vLLM's info, sized for segments."""

    def audio_window(self) -> AudioWindow:
        """What the audio encoder attends within."""
        return audio_window(self.get_hf_config().audio_config)


@MULTIMODAL_REGISTRY.register_processor(
    Qwen2_5OmniMultiModalProcessor,
    info=Qwen2_5OmniSegmentInfo,
    dummy_inputs=Qwen2_5OmniThinkerDummyInputsBuilder,
)
class Qwen2_5OmniForConditionalGeneration(  # noqa: N801
    SoundTrackModel,
    ReducedVideoModel,
    Qwen2_5OmniThinkerForConditionalGeneration,  # type: ignore[misc]
):
    """vLLM's thinker, its processor replaced."""

    shares_markers = True

    def searching_nothing(self) -> AbstractContextManager[None]:
        """As the mixin has it."""
        return set_meanwhile(
            qwen2_5_omni_thinker,
            "vllm.model_executor.models.qwen2_5_omni_thinker:check_interleaved_audio_video",
            nothing_alternates,
        )
