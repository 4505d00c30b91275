"""What the omni models share: positions of, and embeddings for, videos with their sound."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from contextlib import AbstractContextManager
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from vllm.multimodal.utils import get_mm_embedding_modalities, set_mm_embedding_modality
from vllm.utils.gpu_sync_debug import gpu_sync_allowed

from vllm_mm_ext.adapters.models.frame_positions import FrameTimesModel
from vllm_mm_ext.adapters.models.mrope import Markers

_MOVED = ("video", "audio")
# What vLLM's omni models take all other items for. A client's own embeddings are among them.
_OTHER = "image"


def in_prompt_order(
    embeddings: Sequence[torch.Tensor], kinds: Sequence[str], modality: np.ndarray[Any, Any]
) -> list[torch.Tensor]:
    """Cut encoder outputs into runs and put them in the order of their placeholder tokens.

    vLLM hands over a video's outputs and then its track's (or the reverse), each whole, though
    their tokens alternate or, within one step, even come in the opposite order.

    Args:
        embeddings: Encoder outputs ``[tokens, hidden]``, in order within each modality.
        kinds: Modality of each.
        modality: Of each placeholder token of the step, in prompt order: ``video``, ``audio``, or
            ``image`` for one of any other item.

    Returns:
        The same rows, marked with their modality: one tensor per run of tokens of video or of
        audio, and the outputs of other items as they came.

    Raises:
        ValueError: There are more or fewer rows than tokens.
    """
    pairs = list(zip(embeddings, kinds, strict=True))
    streams = {
        kind: torch.cat([e for e, k in pairs if k == kind]) for kind in _MOVED if kind in kinds
    }
    # These are in order already. Some may have more columns than others.
    others = deque(e for e, k in pairs if k not in _MOVED)
    given = {kind: len(stream) for kind, stream in streams.items()}
    given[_OTHER] = sum(map(len, others))
    placed = {kind: int((modality == kind).sum()) for kind in given}
    if given != placed or sum(placed.values()) != len(modality):
        raise ValueError(f"encoder outputs {given} for placeholder tokens {placed}")
    taken = dict.fromkeys(streams, 0)
    bounds = [0, *(np.flatnonzero(modality[1:] != modality[:-1]) + 1).tolist(), len(modality)]
    runs = []
    for begin, end in pairwise(bounds):
        kind = str(modality[begin])
        if kind == _OTHER:
            left = end - begin
            while left > 0:
                runs.append(set_mm_embedding_modality(others.popleft()[:], kind))
                left -= len(runs[-1])
            continue
        first = taken[kind]
        taken[kind] = first + end - begin
        runs.append(set_mm_embedding_modality(streams[kind][first : taken[kind]], kind))
    return runs


class SoundTrackModel(FrameTimesModel):
    """Mixin in front of an omni family's model class.

    Attributes:
        shares_markers: See ``mrope.Markers.shared``.
    """

    shares_markers: bool

    def searching_nothing(self) -> AbstractContextManager[None]:
        """While this is open, vLLM does not look for video and sound that alternate.

        vLLM asks for the place of each token by itself, a millisecond for each 100 tokens, and then
        places embeddings by modality. Those that are in the order of the prompt go where they
        belong without that.
        """
        raise NotImplementedError

    def markers(self) -> Markers:
        """Token ids around sound in video."""
        config = self.config
        return Markers(
            video=config.video_token_id,
            audio=config.audio_token_id,
            vision_start=config.vision_start_token_id,
            vision_end=config.vision_end_token_id,
            shared=self.shares_markers,
        )

    def positions_per_second(self) -> float:
        """M-RoPE positions per second of video and sound."""
        return float(self.config.position_id_per_seconds)

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
            modality = np.full(len(placed), _OTHER)
            modality[placed == self.config.video_token_id] = "video"
            modality[placed == self.config.audio_token_id] = "audio"
            ordered = in_prompt_order(given, get_mm_embedding_modalities(given), modality)
            with self.searching_nothing():
                return self._embedded(input_ids, ordered, is_multimodal)
        return self._embedded(input_ids, given, is_multimodal)

    def _embedded(self, input_ids: torch.Tensor, embeddings: Any, placed: Any) -> torch.Tensor:
        embedded: torch.Tensor = super().embed_input_ids(  # type: ignore[misc]
            input_ids, embeddings, is_multimodal=placed
        )
        return embedded


def nothing_alternates(*_: Any) -> bool:
    """Says of video and sound that they do not alternate, in the place of vLLM's search."""
    return False
