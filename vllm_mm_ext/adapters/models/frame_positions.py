"""M-RoPE positions of segments: one video again, at the times its frames really have."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch

from vllm_mm_ext.adapters.models.mrope import (
    Item,
    Markers,
    Positions,
    positions_of,
    vision_positions,
)
from vllm_mm_ext.adapters.processors import fields
from vllm_mm_ext.video.grid_times import even_grid
from vllm_mm_ext.video.positions import reduced_positions


class FrameTimesModel:
    """Mixin in front of a model class with M-RoPE."""

    config: Any

    merges_segments = True
    """False leaves each segment at positions of its own (what a test compares with)."""

    def get_mrope_input_positions(
        self, input_tokens: list[int], mm_features: list[Any]
    ) -> tuple[torch.Tensor, int]:
        """M-RoPE positions ``[3, tokens]`` and what to add to a token's index from then on.

        Prompts without segments go to vLLM's code.
        """
        if not any(is_segment(feature) for feature in mm_features):
            return super().get_mrope_input_positions(  # type: ignore[misc,no-any-return]
                input_tokens, mm_features
            )
        positions = positions_of(input_tokens, list(self._items(mm_features)), self.markers())
        return torch.from_numpy(positions), int(positions.max()) + 1 - len(input_tokens)

    def markers(self) -> Markers | None:
        """Token ids around sound in video; None for a model that takes none."""
        return None

    def positions_per_second(self) -> float:
        """M-RoPE positions per second of video."""
        return float(self.config.vision_config.tokens_per_second)

    def _items(self, mm_features: Sequence[Any]) -> Iterator[Item]:
        """Media items by offset, consecutive segments of a video as one."""
        tracked = tracked_offsets(mm_features)
        features = sorted(
            (
                feature
                for feature in mm_features
                if not (feature.modality == "audio" and feature.mm_position.offset in tracked)
            ),
            key=lambda feature: feature.mm_position.offset,
        )
        begin = 0
        while begin < len(features):
            end = begin + 1
            while end < len(features) and self.merges_segments and continues(features[end]):
                end += 1
            group = features[begin:end]
            begin = end
            first, last = group[0].mm_position, group[-1].mm_position
            if group[0].modality == "audio":
                yield Item(first.offset, first.length)
                continue
            has_track = any(feature.mm_position.offset in tracked for feature in group)
            length = last.offset + last.length - first.offset
            yield Item(first.offset, length, self._visual(group), has_track)

    def _visual(self, group: Sequence[Any]) -> Positions:
        """Positions of an image's tokens, or of those of a video's segments together."""
        merge = self.config.vision_config.spatial_merge_size
        done = 0
        blocks = []
        for feature in group:
            grid = feature.data[f"{feature.modality}_grid_thw"].data.tolist()
            grids, height, width = grid[0], grid[1] // merge, grid[2] // merge
            temporal = field(feature, fields.POSITIONS)
            if temporal is None or not temporal.numel():
                step = field(feature, "second_per_grid_ts")
                seconds = 1.0 if step is None else float(step)
                even = even_grid(done + grids, seconds).temporal_positions(
                    self.positions_per_second()
                )
                at = even[done:]
            else:
                at = temporal.numpy()
            done += grids
            reduction = fields.reduction_of(field(feature, fields.REDUCTION))
            if reduction.is_identity:
                blocks.append(vision_positions(at, height, width))
            else:
                kept = field(feature, fields.KEPT)
                cells = None if kept is None or not kept.numel() else kept.numpy()
                blocks.append(reduced_positions(at, height, width, reduction, cells))
        return np.concatenate(blocks, axis=1)


def tracked_offsets(mm_features: Sequence[Any]) -> set[int]:
    """Offsets at which a segment and its sound share their tokens."""
    at: dict[str, set[int]] = {"video": set(), "audio": set()}
    for feature in mm_features:
        at.setdefault(feature.modality, set()).add(feature.mm_position.offset)
    return at["video"] & at["audio"]


def field(feature: Any, name: str) -> torch.Tensor | None:
    """A per-item field's value, if the item has it."""
    element = feature.data.get(name) if feature.data is not None else None
    value: torch.Tensor | None = None if element is None else element.data
    return value


def is_segment(feature: Any) -> bool:
    """Whether an item was made by the plugin's processors."""
    return field(feature, fields.CONTINUES) is not None


def continues(feature: Any) -> bool:
    """Whether an item goes on where the one before it ended."""
    flag = field(feature, fields.CONTINUES)
    return flag is not None and bool(flag)
