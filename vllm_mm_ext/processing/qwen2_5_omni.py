"""Qwen2.5-Omni: sound of each video, real frame times, audio features at their own length."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from vllm.model_executor.models.qwen2_5_omni_thinker import Qwen2_5OmniThinkerMultiModalProcessor

from vllm_mm_ext.media.audio import padded_length
from vllm_mm_ext.processing.grid_times import GridTimes, interleave_chunks
from vllm_mm_ext.processing.sound_tracks import SoundTrackProcessor


class Qwen2_5OmniMultiModalProcessor(SoundTrackProcessor, Qwen2_5OmniThinkerMultiModalProcessor):  # type: ignore[misc]  # noqa: N801
    """Processor of the thinker."""

    def audio_tokens(self, num_mel_frames: int) -> int:
        """One token per four frames (``Qwen2_5OmniAudioEncoder``: two strides of two)."""
        return max(0, ((num_mel_frames - 1) // 2 + 1 - 2) // 2 + 1)

    def interleave(
        self, grids: GridTimes, tokens_per_grid: int, num_audio_tokens: int
    ) -> list[tuple[int, int]]:
        """Chunks of ``seconds_per_chunk`` (two seconds)."""
        return interleave_chunks(
            grids,
            tokens_per_grid=tokens_per_grid,
            num_audio_tokens=num_audio_tokens,
            positions_per_second=self.positions_per_second,
            seconds_per_chunk=self.info.get_hf_config().seconds_per_chunk,
        )

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
