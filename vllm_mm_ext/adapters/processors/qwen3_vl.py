"""Qwen3-VL: segments; the time of every pair of frames is written into the prompt."""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from typing import Any

from vllm.model_executor.models.qwen3_vl import Qwen3VLMultiModalProcessor as _Stock
from vllm.multimodal.processing import PromptUpdateDetails

from vllm_mm_ext.adapters.processors.patch_segments import PatchSegmentProcessor
from vllm_mm_ext.config.options import Reduction
from vllm_mm_ext.video.segments import Segment, VideoLayout, VideoShape, group_means

# Written times whose length in tokens is kept: times have tenths of a second, and this many tenths
# are almost two hours.
_MAX_TIMES = 1 << 16


class Qwen3VLMultiModalProcessor(PatchSegmentProcessor, _Stock):  # type: ignore[misc]
    """vLLM's processor, which takes segments instead of videos."""

    # Any value will do: times are text, and M-RoPE starts anew at every pair of frames.
    positions_per_second = 1.0

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        # The quality controller counts the same times again and again to fit a long video.
        self._written_length = lru_cache(maxsize=_MAX_TIMES)(self._encoded_length)

    def splits(self, hf_kwargs: Mapping[str, object]) -> bool:
        """Whether videos are split; not if the request has a list of options, one per video."""
        return (
            super().splits(hf_kwargs)
            and not self._get_per_video_kwargs(hf_kwargs)
            and self._expands_only_video_token(self.info.get_hf_processor())
        )

    def seconds_per_grid(self, shape: VideoShape, hf_kwargs: Mapping[str, object]) -> float:
        """Not used by this family."""
        return 1.0

    def timestamps(self, shape: VideoShape) -> tuple[float, ...] | None:
        """The mean time of each pair of frames."""
        patch = int(self.info.get_video_processor().temporal_patch_size)
        if shape.times is None:
            assert shape.metadata is not None  # vLLM refuses a video without metadata.
            return tuple(self.info._get_video_second_idx(shape.metadata, do_sample_frames=False))
        indices: Any = list(shape.times)
        return tuple(self.info._calculate_timestamps(indices, 1.0, patch))

    def placeholder(self, part: Segment) -> list[int] | PromptUpdateDetails:
        """For each group of frames: its time, and its tokens between start and end of vision."""
        config = self.info.get_hf_config()
        times = part.timestamps
        assert times is not None
        return self.get_video_repl(
            tokens_per_frame=list(part.left),
            timestamps=times,
            tokenizer=self.info.get_tokenizer(),
            vision_start_token_id=config.vision_start_token_id,
            vision_end_token_id=config.vision_end_token_id,
            video_token_id=config.video_token_id,
            select_token_id=True,
        )

    def text_tokens(self, layout: VideoLayout, grids: tuple[int, int], reduction: Reduction) -> int:
        """Tokens of the written times, and of the start and the end of vision of each group."""
        assert layout.timestamps is not None
        times = group_means(layout.timestamps[slice(*grids)], reduction.temporal)
        return sum(2 + self._written_length(f"<{seconds:.1f} seconds>") for seconds in times)

    def _encoded_length(self, text: str) -> int:
        return len(self.info.get_tokenizer().encode(text, add_special_tokens=False))
