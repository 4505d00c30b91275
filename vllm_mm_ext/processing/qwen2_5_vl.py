"""Qwen2.5-VL: positions from real frame times where transformers' one rate per video is wrong."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from vllm.model_executor.models.qwen2_5_vl import Qwen2_5_VLMultiModalProcessor as _Stock

from vllm_mm_ext.processing.frame_times import (
    assumed_steps,
    frames_of,
    place,
    with_positions_field,
    write,
)


class Qwen2_5_VLMultiModalProcessor(_Stock):  # type: ignore[misc]  # noqa: N801
    """vLLM's processor, told when unevenly sampled frames are."""

    def _get_mm_fields_config(
        self, hf_inputs: Any, hf_processor_mm_kwargs: Mapping[str, object]
    ) -> Mapping[str, Any]:
        return with_positions_field(
            super()._get_mm_fields_config(hf_inputs, hf_processor_mm_kwargs)
        )

    def _postprocess_hf_mm_data(
        self, hf_data: Mapping[str, Any], hf_kwargs: Mapping[str, object], processed_data: Any
    ) -> Any:
        data = super()._postprocess_hf_mm_data(hf_data, hf_kwargs, processed_data)
        videos = hf_data.get("videos")
        # vLLM's pruning recomputes positions from one rate per video.
        if not videos or self.info.ctx.get_mm_config().video_pruning_rate:
            return data
        patch = int(self.info.get_hf_processor().video_processor.temporal_patch_size)
        placed = [
            place(
                frames_of(video),
                num_grids=int(grid[0]),
                temporal_patch=patch,
                assumed_step=step,
                exact=False,
            )
            for video, grid, step in zip(
                videos, data["video_grid_thw"], assumed_steps(data), strict=True
            )
        ]
        if any(grids is not None for grids in placed):
            write(data, placed, self.info.get_hf_config().vision_config.tokens_per_second)
        return data
