"""Qwen2.5-Omni: sound of each video, real frame times, audio features without padding to 300 s."""

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
from vllm_mm_ext.video.track_pieces import MEL_RATE, AudioWindow

# A convolution and a pooling layer of stride 2 each (transformers, ``Qwen2_5OmniAudioEncoder``).
_MEL_FRAMES_PER_TOKEN = 4


def audio_window(audio_config: Any) -> AudioWindow:
    """The audio encoder's window: it convolves and attends within ``2 * n_window`` mel frames."""
    mel_frames = 2 * int(audio_config.n_window)
    return AudioWindow(mel_frames // _MEL_FRAMES_PER_TOKEN, mel_frames, 1)


class Qwen2_5OmniMultiModalProcessor(SoundTrackProcessor, Qwen2_5OmniThinkerMultiModalProcessor):  # type: ignore[misc]  # noqa: N801
    """vLLM's processor of the thinker, which takes segments and their sound."""

    assumed_fps = 2.0

    def audio_tokens(self, num_mel_frames: int) -> int:
        """About one token per four mel frames."""
        return omni_audio_tokens(num_mel_frames)

    def audio_window(self) -> AudioWindow:
        """Windows of two seconds, with the released checkpoints."""
        return audio_window(self.info.get_hf_config().audio_config)

    @property
    def unit_s(self) -> float:
        """A whole number of windows and of chunks; two seconds with the released checkpoints."""
        window = self.audio_window().mel_frames
        chunk = MEL_RATE * int(self.info.get_hf_config().seconds_per_chunk)
        return math.lcm(window, chunk) / MEL_RATE

    def interleave(
        self, grids: GridTimes, tokens_per_grid: int, num_audio_tokens: int
    ) -> list[Run]:
        """In chunks of ``seconds_per_chunk``, two seconds with the released checkpoints."""
        return interleave_chunks(
            grids,
            tokens_per_grid=tokens_per_grid,
            num_audio_tokens=num_audio_tokens,
            positions_per_second=self.positions_per_second,
            seconds_per_chunk=self.info.get_hf_config().seconds_per_chunk,
        )

    def track_features(self, track: Waveform) -> torch.Tensor:
        """Log-mel spectrogram of the track, without padding."""
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
        """Call transformers' processor, with audio padded no further than necessary.

        By default transformers pads every waveform to 300 seconds before the transform, and vLLM
        drops the padding's features afterwards.
        """
        hf_processor = self.info.get_hf_processor(**hf_kwargs)
        if audios := hf_data.get("audio"):
            given = self.info.ctx.get_merged_mm_kwargs(hf_kwargs).get("audio_kwargs") or {}
            longest = max(len(audio) for audio in audios)
            audio_kwargs = {"max_length": padded_length(longest), **given}
            hf_kwargs = {**hf_kwargs, "audio_kwargs": audio_kwargs}
        return self.info.ctx.call_hf_processor(hf_processor, hf_data, hf_kwargs)
