"""M-RoPE positions of videos whose frame times are known."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from vllm_mm_ext.models.mrope import Item, Markers, Positions, positions_of
from vllm_mm_ext.processing.frame_times import POSITIONS_FIELD
from vllm_mm_ext.processing.grid_times import even_grid


class FrameTimesModel:
    """Mixin in front of a model class with M-RoPE."""

    config: Any

    def get_mrope_input_positions(
        self, input_tokens: list[int], mm_features: list[Any]
    ) -> tuple[torch.Tensor, int]:
        """M-RoPE positions ``[3, tokens]`` and what to add to a token's index from then on.

        Prompts in which no video has times of its own, nor sound, go to vLLM's code.
        """
        tracked = tracked_offsets(mm_features)
        if not tracked and all(own_positions(feature) is None for feature in mm_features):
            return super().get_mrope_input_positions(  # type: ignore[misc,no-any-return]
                input_tokens, mm_features
            )
        items = [
            self._item(feature, feature.mm_position.offset in tracked)
            for feature in sorted(mm_features, key=lambda f: f.mm_position.offset)
            if not (feature.modality == "audio" and feature.mm_position.offset in tracked)
        ]
        positions = positions_of(input_tokens, items, self.markers())
        return torch.from_numpy(positions), int(positions.max()) + 1 - len(input_tokens)

    def markers(self) -> Markers | None:
        """Token ids around sound in video; None for a model that takes none."""
        return None

    def positions_per_second(self) -> float:
        """M-RoPE positions per second of video."""
        return float(self.config.vision_config.tokens_per_second)

    def _item(self, feature: Any, has_track: bool) -> Item:
        offset, length = feature.mm_position.offset, feature.mm_position.length
        if feature.modality == "audio":
            return Item(offset, length)
        merge = self.config.vision_config.spatial_merge_size
        grid_t, grid_h, grid_w = feature.data[f"{feature.modality}_grid_thw"].data.tolist()
        temporal = own_positions(feature)
        if temporal is None:
            step = feature.data.get("second_per_grid_ts")
            seconds = 1.0 if step is None else float(step.data)
            temporal = even_grid(grid_t, seconds).temporal_positions(self.positions_per_second())
        return Item(offset, length, temporal, grid_h // merge, grid_w // merge, has_track)


def tracked_offsets(mm_features: Sequence[Any]) -> set[int]:
    """Offsets at which a video and its sound share their tokens."""
    at: dict[str, set[int]] = {"video": set(), "audio": set()}
    for feature in mm_features:
        at.setdefault(feature.modality, set()).add(feature.mm_position.offset)
    return at["video"] & at["audio"]


def own_positions(feature: Any) -> Positions | None:
    """Temporal positions of a video whose frame times are known, else None."""
    field = feature.data.get(POSITIONS_FIELD) if feature.data is not None else None
    if field is None or field.data is None or field.data.numel() == 0:
        return None
    positions: np.ndarray[Any, np.dtype[np.int64]] = field.data.numpy()
    return positions
