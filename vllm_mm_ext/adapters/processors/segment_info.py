"""Tells vLLM to profile and budget for the largest segment instead of the longest video."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from vllm_mm_ext.adapters import vllm_compat
from vllm_mm_ext.adapters.processors.model_traits import size_rule_for
from vllm_mm_ext.adapters.processors.session_media import SessionInfo
from vllm_mm_ext.video.track_pieces import AudioWindow


def prunes_videos(ctx: Any) -> bool:
    """Whether vLLM prunes videos: it counts and places the tokens of whole ones.

    Args:
        ctx: vLLM's ``InputProcessingContext`` of the served model.
    """
    return bool(ctx.get_mm_config().is_multimodal_pruning_enabled())


def limits_items_to_segments(ctx: Any) -> bool:
    """Whether no video item that a server takes needs to be larger than a segment.

    Args:
        ctx: As for ``prunes_videos``.
    """
    # Where no video is allowed, vLLM still takes embeddings of whole ones.
    return (
        vllm_compat.settings_of(ctx.model_config).segments.tokens > 0
        and not prunes_videos(ctx)
        and ctx.get_mm_config().get_limit_per_prompt("video") > 0
    )


class SegmentInfo(SessionInfo):
    """Mixin in front of the processing info of a family with a pixel budget per frame."""

    ctx: Any

    def largest_segment(self) -> int | None:
        """Tokens of the largest segment; None where videos are not cut.

        A segment has at most the configured number of tokens, or more where it cannot be cut: one
        grid of the largest frames or, for a family that hears videos, all grids within one window
        of the audio encoder at the configured frame rates, with their sound.
        """
        if not limits_items_to_segments(self.ctx):
            return None
        settings = vllm_compat.settings_of(self.ctx.model_config)
        target, grid = settings.segments.tokens, self._largest_grid()
        window = self.audio_window()
        fps = max(settings.media.sampling.fps, settings.live.fps if settings.live.enabled else 0.0)
        frames = fps * (window.seconds if window else 0.0)
        grids = max(1, math.ceil(frames / self._temporal_patch()))
        return max(target, grids * grid + (window.tokens if window else 0))

    def audio_window(self) -> AudioWindow | None:
        """The audio encoder's window; None for a family that does not hear videos."""
        return None

    def _temporal_patch(self) -> int:
        info: Any = self
        return int(info.get_hf_processor().video_processor.temporal_patch_size)

    def _largest_grid(self) -> int:
        info: Any = self
        rule = size_rule_for(info, {}, info.get_hf_processor())
        return rule.max_pixels // rule.factor**2

    def get_max_video_tokens(self, seq_len: int, mm_counts: Mapping[str, int]) -> int:
        """Most embeddings of a video item."""
        largest = self.largest_segment()
        if largest is not None:
            return min(seq_len, largest)
        stock: int = super().get_max_video_tokens(seq_len, mm_counts)  # type: ignore[misc]
        return stock

    def get_num_frames_with_most_features(
        self, seq_len: int, mm_counts: Mapping[str, int], *args: Any, **kwargs: Any
    ) -> int:
        """Frames of the video with which vLLM profiles memory."""
        stock: int = super().get_num_frames_with_most_features(  # type: ignore[misc]
            seq_len, mm_counts, *args, **kwargs
        )
        largest = self.largest_segment()
        if largest is None:
            return stock
        return min(stock, self._temporal_patch() * max(1, largest // max(1, self._largest_grid())))


def largest_item(config: Any, info: Any, *, cut: bool = True) -> int:
    """Most tokens of a segment, or of a video that is one mm item: what vLLM's encoder cache holds.

    Args:
        config: vLLM's configuration of the engine.
        info: vLLM's ``BaseProcessingInfo`` of the served model.
        cut: Whether the videos become segments where the settings say so.

    Returns:
        0, for no limit, of a family whose videos can be cut anywhere.
    """
    tokens: int = config.scheduler_config.max_num_batched_tokens
    if not cut:
        # The cache holds the largest item of any modality that is served; some families tell the
        # sizes of others as well.
        served = dict.fromkeys((kind for kind, limit in info.allowed_mm_limits.items() if limit), 1)
        length = config.model_config.max_model_len
        largest: Mapping[str, int] = info.get_mm_max_tokens_per_item(length, served) or {}
        return max(tokens, *(largest.get(kind, 0) for kind in served))
    if not vllm_compat.settings_of(config.model_config).segments.tokens:
        return tokens
    return max(tokens, info.largest_segment() or 0) if isinstance(info, SegmentInfo) else 0
