"""Qwen3-Omni: sound of each video and real frame times."""

from __future__ import annotations

import torch
from vllm.model_executor.models.qwen3_omni_moe_thinker import (
    Qwen3OmniMoeThinkerMultiModalProcessor,
    _get_feat_extract_output_lengths,
)

from vllm_mm_ext.processing.grid_times import GridTimes, interleave_tokens
from vllm_mm_ext.processing.sound_tracks import SoundTrackProcessor


class Qwen3OmniMoeMultiModalProcessor(SoundTrackProcessor, Qwen3OmniMoeThinkerMultiModalProcessor):  # type: ignore[misc]
    """Processor of the thinker."""

    def audio_tokens(self, num_mel_frames: int) -> int:
        """Thirteen tokens per second of one hundred frames."""
        if num_mel_frames == 0:
            return 0
        return int(_get_feat_extract_output_lengths(torch.tensor(num_mel_frames)))

    def interleave(
        self, grids: GridTimes, tokens_per_grid: int, num_audio_tokens: int
    ) -> list[tuple[int, int]]:
        """By time, grid by grid."""
        return interleave_tokens(
            grids,
            tokens_per_grid=tokens_per_grid,
            num_audio_tokens=num_audio_tokens,
            positions_per_second=self.positions_per_second,
        )
