"""What vLLM asks about a composer before there are media, and the media that it profiles with."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from vllm.config.multimodal import MultiModalDummyOptions
from vllm.multimodal.parse import MultiModalDataParser
from vllm.multimodal.processing import BaseDummyInputsBuilder, BaseProcessingInfo

from vllm_mm_ext.adapters import vllm_compat
from vllm_mm_ext.adapters.processors.session_media import SessionInfo
from vllm_mm_ext.composer.configuration import SAMPLE_RATE, SPECIAL_TOKENS, ComposerConfig
from vllm_mm_ext.composer.hf_processor import ComposerProcessor
from vllm_mm_ext.config.options import Reduction


def default_reduction_of(config: ComposerConfig) -> Reduction:
    """The reduction that the checkpoint declares for requests that name none."""
    return Reduction(**(config.default_reduction or {}))


class ComposerProcessingInfo(SessionInfo, BaseProcessingInfo):  # type: ignore[misc]
    """vLLM's processing info of a composer: configuration, processor, limits and sizes."""

    def get_hf_config(self) -> ComposerConfig:
        """Configuration of the checkpoint."""
        config: ComposerConfig = self.ctx.get_hf_config(ComposerConfig)
        return config

    def get_hf_processor(self, **kwargs: object) -> ComposerProcessor:
        """Processor of the checkpoint."""
        processor: ComposerProcessor = self.ctx.get_hf_processor(ComposerProcessor, **kwargs)
        return processor

    def get_supported_mm_limits(self) -> Mapping[str, int | None]:
        """Any number of videos, and of sounds if the checkpoint has an audio tower."""
        hears = self.get_hf_config().audio_config is not None
        return {"video": None, "audio": None} if hears else {"video": None}

    def get_data_parser(self) -> MultiModalDataParser:
        """A parser that makes sound mono at 16 kHz."""
        return MultiModalDataParser(
            target_sr=SAMPLE_RATE,
            target_channels=1,
            expected_hidden_size=self._get_expected_hidden_size(),
        )

    def get_mm_max_tokens_per_item(
        self, seq_len: int, mm_counts: Mapping[str, int]
    ) -> Mapping[str, int]:
        """Number of embeddings of the largest segment, and of a window of sound."""
        config = self.get_hf_config()
        window = 0
        if config.audio_config is not None:
            window = config.audio_tokens(config.window_samples)[0]
        target = vllm_compat.settings_of(self.ctx.model_config).segments.tokens
        video = max(target, window, config.frame_tokens(1)) if target else seq_len
        return {"video": min(seq_len, video), "audio": window} if window else {"video": video}


class ComposerDummyInputsBuilder(BaseDummyInputsBuilder[ComposerProcessingInfo]):  # type: ignore[misc]
    """Makes the media with which vLLM profiles memory."""

    def get_dummy_text(self, mm_counts: Mapping[str, int]) -> str:
        """A text with one placeholder per item."""
        return "".join(
            SPECIAL_TOKENS[f"{modality}_pad_token_id"] * mm_counts.get(modality, 0)
            for modality in ("video", "audio")
        )

    def get_dummy_mm_data(
        self, seq_len: int, mm_counts: Mapping[str, int], mm_options: MultiModalDummyOptions
    ) -> Any:
        """Videos of one largest segment at the default reduction, and full windows of sound."""
        config = self.info.get_hf_config()
        settings = vllm_compat.settings_of(self.info.ctx.model_config)
        reduction = settings.compression.default_reduction(default_reduction_of(config))
        side, unit = int(config.vision_config.image_size), reduction.temporal
        group = reduction.count(unit, config.side, config.side)
        groups = max(1, min(settings.segments.tokens or seq_len, seq_len) // group)
        made: dict[str, Any] = {
            "video": self._get_dummy_videos(
                width=side,
                height=side,
                num_frames=groups * unit,
                num_videos=mm_counts.get("video", 0),
                overrides=mm_options.get("video"),
            )
        }
        if audios := mm_counts.get("audio", 0):
            made["audio"] = self._get_dummy_audios(
                length=config.window_samples,
                num_audios=audios,
                overrides=mm_options.get("audio"),
            )
        return made
