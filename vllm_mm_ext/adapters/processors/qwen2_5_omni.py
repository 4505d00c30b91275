"""Qwen2.5-Omni: sound of each video, real frame times, audio features at their own length."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from vllm.model_executor.models.qwen2_5_omni_thinker import Qwen2_5OmniThinkerMultiModalProcessor

from vllm_mm_ext.adapters.processors.sound_tracks import SoundTrackProcessor
from vllm_mm_ext.media.audio.waveforms import padded_length
from vllm_mm_ext.media.payload import Waveform
from vllm_mm_ext.video.cuts import Run
from vllm_mm_ext.video.grid_times import GridTimes, interleave_chunks
from vllm_mm_ext.video.token_counts import omni_audio_tokens
from vllm_mm_ext.video.track_pieces import AudioWindow

# Two strides of two (``Qwen2_5OmniAudioEncoder``).
_MEL_FRAMES_PER_TOKEN = 4


def audio_window(audio_config: Any) -> AudioWindow:
    """Windows are convolved and attended to one by one."""
    mel_frames = 2 * int(audio_config.n_window)
    return AudioWindow(mel_frames // _MEL_FRAMES_PER_TOKEN, mel_frames, 1)


class Qwen2_5OmniMultiModalProcessor(SoundTrackProcessor, Qwen2_5OmniThinkerMultiModalProcessor):  # type: ignore[misc]  # noqa: N801
    """Processor of the thinker."""

    assumed_fps = 2.0

    def audio_tokens(self, num_mel_frames: int) -> int:
        """One token per four frames."""
        return omni_audio_tokens(num_mel_frames)

    def audio_window(self) -> AudioWindow:
        """Windows of two seconds."""
        return audio_window(self.info.get_hf_config().audio_config)

    def interleave(
        self, grids: GridTimes, tokens_per_grid: int, num_audio_tokens: int
    ) -> list[Run]:
        """Chunks of ``seconds_per_chunk`` (two seconds)."""
        return interleave_chunks(
            grids,
            tokens_per_grid=tokens_per_grid,
            num_audio_tokens=num_audio_tokens,
            positions_per_second=self.positions_per_second,
            seconds_per_chunk=self.info.get_hf_config().seconds_per_chunk,
        )

    def track_features(self, track: Waveform) -> torch.Tensor:
        """Features for the length of the track."""
        extractor = self.info.get_feature_extractor()
        out = extractor(
            np.asarray(track),
            sampling_rate=extractor.sampling_rate,
            padding="max_length",
            max_length=padded_length(len(track)),
            return_tensors="pt",
        )
        features: torch.Tensor = out["input_features"][0]
        return features[:, : math.ceil(len(track) / extractor.hop_length)]

    def _call_hf_processor(self, hf_data: Mapping[str, Any], hf_kwargs: Mapping[str, Any]) -> Any:
        """Compute audio features for the length of the audio.

        By default transformers pads every waveform to 300 seconds before the transform, and vLLM
        throws the padding's features away.
        """
        hf_processor = self.info.get_hf_processor(**hf_kwargs)
        if audios := hf_data.get("audio"):
            given = self.info.ctx.get_merged_mm_kwargs(hf_kwargs).get("audio_kwargs") or {}
            longest = max(len(audio) for audio in audios)
            audio_kwargs = {"max_length": padded_length(longest), **given}
            hf_kwargs = {**hf_kwargs, "audio_kwargs": audio_kwargs}
        return self.info.ctx.call_hf_processor(hf_processor, hf_data, hf_kwargs)
