"""Qwen3-Omni: sound of each video and real frame times."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from vllm.model_executor.models.qwen3_omni_moe_thinker import (
    Qwen3OmniMoeThinkerMultiModalProcessor,
    _get_feat_extract_output_lengths,
)

from vllm_mm_ext.adapters.processors.sound_tracks import SoundTrackProcessor
from vllm_mm_ext.media.payload import Waveform
from vllm_mm_ext.video.cuts import Run
from vllm_mm_ext.video.grid_times import GridTimes, interleave_tokens
from vllm_mm_ext.video.track_pieces import AudioWindow


def audio_window(audio_config: Any) -> AudioWindow:
    """The audio encoder's window: it attends within ``n_window_infer`` mel frames.

    The encoder convolves chunks of ``2 * n_window`` mel frames. It pads the last chunk to the
    longest of the batch first, so a piece of sound must have at least one whole chunk to be encoded
    as it is within the whole track.
    """
    chunk = 2 * int(audio_config.n_window)
    chunks = int(audio_config.n_window_infer) // chunk
    tokens = int(_get_feat_extract_output_lengths(torch.tensor(chunk)))
    return AudioWindow(tokens * chunks, chunk * chunks, tokens)


class Qwen3OmniMoeMultiModalProcessor(SoundTrackProcessor, Qwen3OmniMoeThinkerMultiModalProcessor):  # type: ignore[misc]
    """vLLM's processor of the thinker, which takes segments and their sound."""

    assumed_fps = 1.0

    def audio_tokens(self, num_mel_frames: int) -> int:
        """13 tokens per second, which has 100 mel frames."""
        if num_mel_frames == 0:
            return 0
        return int(_get_feat_extract_output_lengths(torch.tensor(num_mel_frames)))

    def audio_window(self) -> AudioWindow:
        """Windows of ``n_window_infer`` mel frames."""
        return audio_window(self.info.get_hf_config().audio_config)

    @property
    def unit_s(self) -> float:
        """Two chunks, two seconds with the released checkpoints.

        The encoder then attends within two seconds instead of a whole window (eight seconds); it
        was trained with attention over one to eight seconds (Qwen3-Omni's technical report).
        """
        window = self.audio_window()
        return 2 * window.seconds * window.least / window.tokens

    def interleave(
        self, grids: GridTimes, tokens_per_grid: int, num_audio_tokens: int
    ) -> list[Run]:
        """By time, grid by grid."""
        return interleave_tokens(
            grids,
            tokens_per_grid=tokens_per_grid,
            num_audio_tokens=num_audio_tokens,
            positions_per_second=self.positions_per_second,
        )

    def track_features(self, track: Waveform) -> torch.Tensor:
        """Log-mel spectrogram of the track, padded to a whole mel frame as vLLM pads all audio."""
        extractor = self.info.get_feature_extractor()
        hop = extractor.hop_length
        padded = np.pad(np.asarray(track), (0, -len(track) % hop))
        out = extractor(
            padded,
            sampling_rate=extractor.sampling_rate,
            padding=True,
            truncation=False,
            return_tensors="pt",
        )
        features: torch.Tensor = out["input_features"][0]
        return features[:, : len(padded) // hop]
