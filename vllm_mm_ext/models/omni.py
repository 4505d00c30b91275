"""What the omni models share: positions of, and embeddings for, videos with their sound."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from vllm.multimodal.utils import get_mm_embedding_modalities, set_mm_embedding_modality
from vllm.utils.gpu_sync_debug import gpu_sync_allowed

from vllm_mm_ext.models.mrope import Item, Markers, positions_of
from vllm_mm_ext.processing.grid_times import even_grid


def in_prompt_order(
    embeddings: Sequence[torch.Tensor], kinds: Sequence[str], modality: np.ndarray[Any, Any]
) -> list[torch.Tensor]:
    """Cut encoder outputs into runs and put them in the order of their placeholder tokens.

    vLLM hands over a video's outputs and then its track's (or the reverse), each whole, though
    their tokens alternate or, within one step, even come in the opposite order.

    Args:
        embeddings: Encoder outputs ``[tokens, hidden]``, in order within each modality.
        kinds: Modality of each.
        modality: Modality of each placeholder token of the step, in prompt order.

    Returns:
        The same rows, one tensor per run of tokens of one modality, marked with it.
    """
    streams = {
        kind: torch.cat([e for e, k in zip(embeddings, kinds, strict=True) if k == kind])
        for kind in dict.fromkeys(kinds)
    }
    taken = dict.fromkeys(streams, 0)
    bounds = [0, *(np.flatnonzero(modality[1:] != modality[:-1]) + 1).tolist(), len(modality)]
    runs = []
    for begin, end in pairwise(bounds):
        kind = str(modality[begin])
        first = taken[kind]
        taken[kind] = first + end - begin
        runs.append(set_mm_embedding_modality(streams[kind][first : taken[kind]], kind))
    wrong = {k: len(s) for k, s in streams.items() if taken[k] != len(s)}
    if wrong:
        raise ValueError(f"encoder outputs {wrong} for placeholder tokens {taken}")
    return runs


class SoundTrackModel:
    """Mixin in front of an omni family's model class.

    Attributes:
        shares_markers: See ``mrope.Markers.shared``.
    """

    shares_markers: bool
    config: Any

    def get_mrope_input_positions(
        self, input_tokens: list[int], mm_features: list[Any]
    ) -> tuple[torch.Tensor, int]:
        """M-RoPE positions ``[3, tokens]`` and what to add to a token's index from then on.

        Prompts without sound in video and without frame times of their own go to vLLM's code.
        """
        videos = {f.mm_position.offset: f for f in mm_features if f.modality == "video"}
        audios = [f for f in mm_features if f.modality == "audio"]
        tracked = {f.mm_position.offset for f in audios} & videos.keys()
        if not tracked and not any(_own_positions(f) is not None for f in videos.values()):
            return super().get_mrope_input_positions(  # type: ignore[misc,no-any-return]
                input_tokens, mm_features
            )
        items = [
            self._item(feature, feature.mm_position.offset in tracked)
            for feature in sorted(mm_features, key=lambda f: f.mm_position.offset)
            if not (feature.modality == "audio" and feature.mm_position.offset in tracked)
        ]
        config = self.config
        markers = Markers(
            video=config.video_token_id,
            audio=config.audio_token_id,
            vision_start=config.vision_start_token_id,
            vision_end=config.vision_end_token_id,
            shared=self.shares_markers,
        )
        positions = positions_of(input_tokens, items, markers)
        return torch.from_numpy(positions), int(positions.max()) + 1 - len(input_tokens)

    def _item(self, feature: Any, has_track: bool) -> Item:
        offset, length = feature.mm_position.offset, feature.mm_position.length
        if feature.modality == "audio":
            return Item(offset, length)
        merge = self.config.vision_config.spatial_merge_size
        grid_t, grid_h, grid_w = feature.data[f"{feature.modality}_grid_thw"].data.tolist()
        temporal = _own_positions(feature)
        if temporal is None:
            step = feature.data.get("second_per_grid_ts")
            seconds = 1.0 if step is None else float(step.data)
            per_second = self.config.position_id_per_seconds
            temporal = even_grid(grid_t, seconds).temporal_positions(per_second)
        return Item(offset, length, temporal, grid_h // merge, grid_w // merge, has_track)

    def embed_input_ids(
        self,
        input_ids: torch.Tensor,
        multimodal_embeddings: Any = None,
        *,
        is_multimodal: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Embed a step's tokens, encoder outputs in place of placeholders."""
        given = multimodal_embeddings
        kinds = {getattr(e, "modality", None) for e in given} if given is not None else set()
        if is_multimodal is not None and {"audio", "video"} <= kinds:
            with gpu_sync_allowed():
                placed = input_ids.cpu()[is_multimodal.cpu()].numpy()
            modality = np.full(len(placed), "image")
            modality[placed == self.config.video_token_id] = "video"
            modality[placed == self.config.audio_token_id] = "audio"
            multimodal_embeddings = in_prompt_order(
                multimodal_embeddings, get_mm_embedding_modalities(given), modality
            )
        embedded: torch.Tensor = super().embed_input_ids(  # type: ignore[misc]
            input_ids, multimodal_embeddings, is_multimodal=is_multimodal
        )
        return embedded


def _own_positions(feature: Any) -> np.ndarray[Any, np.dtype[np.int64]] | None:
    """Temporal positions of a video whose frame times are known, else None."""
    field = feature.data.get("video_grid_positions") if feature.data is not None else None
    if field is None or field.data is None or field.data.numel() == 0:
        return None
    positions: np.ndarray[Any, np.dtype[np.int64]] = field.data.numpy()
    return positions
