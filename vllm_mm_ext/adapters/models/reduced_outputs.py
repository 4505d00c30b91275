"""Token reduction of what a model's encoder makes of videos, wherever vLLM runs the encoder.

vLLM asks for outputs in one of two ways: ``embed_multimodal`` (both model runners), or, with
``cudagraph_mm_encoder``, its encoder graph manager, which calls the model's encoder by itself.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from vllm_mm_ext.adapters import vllm_compat
from vllm_mm_ext.adapters.encoder_cache.outputs import fit_to_keep
from vllm_mm_ext.adapters.processors.fields import KEPT, REDUCTION, reduction_of
from vllm_mm_ext.config.options import Reduction
from vllm_mm_ext.video.reduce import reduce_tokens


class ReducedOutputs:
    """Mixin in front of a model class. A family says which grid its video tokens form.

    Attributes:
        encoder_max_patches: Patches of one encoder call, which the family keeps to; what the
            encoder must see at once (an image, a temporal grid) is never cut. 0: no bound.

    Raises:
        ValueError: The server takes LoRA adapters for the vision tower.
    """

    multimodal_config: Any
    encoder_max_patches: int

    def __init__(self, *, vllm_config: Any, prefix: str = "") -> None:
        lora = vllm_config.lora_config
        if lora is not None and lora.enable_tower_connector_lora:
            # vLLM tells by an item's embeddings which patches of a call an adapter is for. Here a
            # call may have a part of the patches, and an item fewer embeddings.
            raise ValueError(
                "enable_tower_connector_lora must be false: mm_ext reduces videos and divides "
                "calls of the encoder, for which vLLM cannot tell whose adapter to use. LoRA on "
                "the language model works."
            )
        super().__init__(vllm_config=vllm_config, prefix=prefix)  # type: ignore[call-arg]
        settings = vllm_compat.settings_of(vllm_config.model_config)
        self.encoder_max_patches = settings.compression.encoder_max_patches

    def token_grids(self, kwargs: Mapping[str, Any]) -> list[tuple[int, int, int]]:
        """Grids, height and width of each video's tokens before reduction.

        Args:
            kwargs: The model's inputs of some videos.
        """
        raise NotImplementedError

    def similarity_channels(self) -> int | None:
        """Leading channels of a token that decide how similar it is to another; None: all."""
        return None

    def embed_multimodal(self, **kwargs: Any) -> Any:
        """Encoder outputs of some items of one modality, videos reduced as their fields ask.

        Args:
            kwargs: The model's inputs; fields ``REDUCTION`` and ``KEPT`` for videos.

        Returns:
            Tokens ``[tokens, channels]`` of each item, each in memory of its own.
        """
        outputs = super().embed_multimodal(**kwargs)  # type: ignore[misc]
        if REDUCTION in kwargs:
            outputs = self._reduced(outputs, kwargs)
        return fit_to_keep(outputs)

    def _reduced(
        self, outputs: Sequence[torch.Tensor], kwargs: Mapping[str, Any]
    ) -> tuple[torch.Tensor, ...]:
        channels = self.similarity_channels()
        return tuple(
            _reduce_video(output, grid, reduction_of(spec), kept, channels)
            for output, grid, spec, kept in zip(
                outputs,
                self.token_grids(kwargs),
                kwargs[REDUCTION],
                kwargs[KEPT],
                strict=True,
            )
        )

    # --- vLLM's encoder graph manager ---------------------------------------------------------

    def get_encoder_cudagraph_config(self) -> Any:
        """As vLLM's, without videos where ranks exchange outputs: it counts unreduced tokens."""
        config = super().get_encoder_cudagraph_config()  # type: ignore[misc]
        if self.multimodal_config.mm_encoder_tp_mode != "data":
            return config
        without_video = [modality for modality in config.modalities if modality != "video"]
        return dataclasses.replace(config, modalities=without_video)

    def select_encoder_cudagraph_items(
        self, mm_kwargs: dict[str, Any], indices: list[int]
    ) -> dict[str, Any]:
        """Inputs of some items, with the fields that say how they are reduced."""
        selected: dict[str, Any] = super().select_encoder_cudagraph_items(  # type: ignore[misc]
            mm_kwargs, indices
        )
        for name in (REDUCTION, KEPT):
            if name in mm_kwargs:
                selected[name] = [mm_kwargs[name][index] for index in indices]
        return selected

    def postprocess_encoder_output(
        self,
        outputs: dict[str, torch.Tensor],
        indices: list[int],
        per_item_out_tokens: list[int],
        dest: Any,
        clone: bool = False,
        batch_mm_kwargs: dict[str, Any] | None = None,
    ) -> None:
        """Hand out the encoder's tokens, videos reduced."""
        super().postprocess_encoder_output(  # type: ignore[misc]
            outputs,
            indices,
            per_item_out_tokens,
            dest,
            clone=clone,
            batch_mm_kwargs=batch_mm_kwargs,
        )
        if batch_mm_kwargs is None or REDUCTION not in batch_mm_kwargs:
            return
        whole = [dest[index] for index in indices]
        for index, tokens in zip(indices, self._reduced(whole, batch_mm_kwargs), strict=True):
            dest[index] = tokens


def _reduce_video(
    tokens: torch.Tensor,
    grid: tuple[int, int, int],
    reduction: Reduction,
    kept: torch.Tensor,
    channels: int | None,
) -> torch.Tensor:
    if reduction.is_identity:
        return tokens
    # What follows the grid (a newline) is not reduced.
    cells = math.prod(grid)
    selected = kept if reduction.static != "none" else None
    reduced = reduce_tokens(tokens[:cells], grid, reduction, selected, channels)
    return reduced if len(tokens) == cells else torch.cat([reduced, tokens[cells:]])
