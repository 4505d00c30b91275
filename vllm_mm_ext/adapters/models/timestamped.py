"""M-RoPE positions of models that write each group of frames' time into the prompt (Qwen3-VL)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch

from vllm_mm_ext.adapters.models.frame_positions import field
from vllm_mm_ext.adapters.models.mrope import Item, positions_of, vision_positions
from vllm_mm_ext.adapters.processors import fields
from vllm_mm_ext.video.positions import reduced_positions


class TimestampedModel:
    """Mixin in front of a model class that places every group of frames by itself.

    vLLM's code reads whole grids off the prompt, so it serves segments as it is; where tokens were
    reduced, they keep their places on the source grid.
    """

    config: Any

    def get_mrope_input_positions(
        self, input_tokens: list[int], mm_features: list[Any]
    ) -> tuple[torch.Tensor, int]:
        """M-RoPE positions ``[3, tokens]`` and what to add to a token's index from then on."""
        if all(
            fields.reduction_of(field(feature, fields.REDUCTION)).is_identity
            for feature in mm_features
        ):
            return super().get_mrope_input_positions(  # type: ignore[misc,no-any-return]
                input_tokens, mm_features
            )
        items = list(self._items(input_tokens, mm_features))
        positions = positions_of(input_tokens, items, None)
        return torch.from_numpy(positions), int(positions.max()) + 1 - len(input_tokens)

    def _items(self, tokens: Sequence[int], mm_features: Sequence[Any]) -> Iterator[Item]:
        """One item per image and per group of frames that has tokens left."""
        ids = np.asarray(tokens)
        merge = self.config.vision_config.spatial_merge_size
        for feature in sorted(mm_features, key=lambda f: f.mm_position.offset):
            offset, length = feature.mm_position.offset, feature.mm_position.length
            grid = feature.data[f"{feature.modality}_grid_thw"].data.tolist()
            grids, height, width = grid[0], grid[1] // merge, grid[2] // merge
            if feature.modality == "image":
                yield Item(offset, length, vision_positions(np.zeros(1, np.int64), height, width))
                continue
            reduction = fields.reduction_of(field(feature, fields.REDUCTION))
            kept = field(feature, fields.KEPT)
            cells = None if kept is None or not kept.numel() else kept.numpy()
            left = reduced_positions(np.arange(grids), height, width, reduction, cells)
            visual = np.flatnonzero(ids[offset : offset + length] == self.config.video_token_id)
            begin = 0
            while begin < len(visual):
                group = left[:, left[0] == left[0, begin]]
                end = begin + group.shape[1]
                group[0] = 0
                yield Item(offset + int(visual[begin]), end - begin, group)
                begin = end
