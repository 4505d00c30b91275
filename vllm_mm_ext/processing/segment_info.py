"""What vLLM profiles and budgets for: one segment, not the longest video."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from vllm_mm_ext import vllm_compat
from vllm_mm_ext.processing.traits import size_default_of, size_rule_of


class SegmentInfo:
    """Mixin in front of the processing info of a family with a pixel budget per frame."""

    ctx: Any

    def largest_segment(self) -> int | None:
        """Tokens of the largest segment: the configured size, or one grid of the largest frames.

        None where videos are not cut.
        """
        target = vllm_compat.settings_of(self.ctx.model_config).segments.tokens
        return max(target, self._largest_grid()) if target else None

    def _largest_grid(self) -> int:
        info: Any = self
        processor = info.get_hf_processor()
        merged = info.ctx.get_merged_mm_kwargs({})
        overrides = merged | dict(merged.get("videos_kwargs") or {})
        rule = size_rule_of(processor.video_processor, overrides, size_default_of(processor))
        return rule.max_pixels // rule.factor**2

    def get_max_video_tokens(self, seq_len: int, mm_counts: Mapping[str, int]) -> int:
        """Most embeddings of one video item."""
        stock: int = super().get_max_video_tokens(seq_len, mm_counts)  # type: ignore[misc]
        largest = self.largest_segment()
        return stock if largest is None else min(stock, largest)

    def get_num_frames_with_most_features(
        self, seq_len: int, mm_counts: Mapping[str, int], *args: Any, **kwargs: Any
    ) -> int:
        """Frames of the video that memory is profiled with."""
        stock: int = super().get_num_frames_with_most_features(  # type: ignore[misc]
            seq_len, mm_counts, *args, **kwargs
        )
        largest = self.largest_segment()
        if largest is None:
            return stock
        info: Any = self
        patch = int(info.get_hf_processor().video_processor.temporal_patch_size)
        return min(stock, patch * max(1, largest // max(1, self._largest_grid())))
