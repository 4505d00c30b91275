"""Models whose encoder sees every frame by itself: bounded encoder calls, fewer tokens."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch

from vllm_mm_ext.compression.reduce import reduce_tokens
from vllm_mm_ext.processing import fields


class PerFrameModel:
    """Mixin in front of a model class; the class bounds its encoder calls with `in_batches`.

    Attributes:
        encoder_max_patches: Patches per encoder call, 0 for no bound.
    """

    encoder_max_patches: int = 0

    @property
    def patches_per_frame(self) -> int:
        """Patches that the encoder makes of one frame, or of one tile of an image."""
        raise NotImplementedError

    @property
    def frame_tokens(self) -> tuple[int, int]:
        """Tokens of a frame of video vertically and horizontally, after the model's own pooling."""
        raise NotImplementedError

    def in_batches(
        self, encode: Callable[[torch.Tensor], torch.Tensor], pixels: torch.Tensor
    ) -> torch.Tensor:
        """Encode frames in calls of at most ``encoder_max_patches`` patches, or one frame each.

        Args:
            encode: The encoder: ``[frames, ...]`` to ``[frames, tokens, channels]``.
            pixels: ``[frames, 3, height, width]``.
        """
        frames = max(1, self.encoder_max_patches // self.patches_per_frame)
        if not self.encoder_max_patches or len(pixels) <= frames:
            return encode(pixels)
        return torch.cat([encode(part) for part in pixels.split(frames)])

    def embed_multimodal(self, **kwargs: Any) -> Any:
        """Embeddings per item; those of segments after their reduction."""
        made = super().embed_multimodal(**kwargs)  # type: ignore[misc]
        if fields.REDUCTION not in kwargs:
            return made
        # vLLM batches items of one modality at a time, so these are all segments.
        return tuple(
            self.reduced(tokens.flatten(0, -2), values, kept)
            for tokens, values, kept in _per_item(made, kwargs)
        )

    def reduced(
        self, tokens: torch.Tensor, values: torch.Tensor, kept: torch.Tensor
    ) -> torch.Tensor:
        """Tokens of one segment made fewer.

        Args:
            tokens: ``[frames * rows * columns, channels]``.
            values: The segment's field ``fields.REDUCTION``.
            kept: The segment's field ``fields.KEPT``.
        """
        rows, columns = self.frame_tokens
        reduction = fields.reduction_of(values)
        selected = None if reduction.static == "none" else kept
        grid = (len(tokens) // (rows * columns), rows, columns)
        return reduce_tokens(tokens, grid, reduction, selected)


def _per_item(
    made: Iterable[torch.Tensor], kwargs: dict[str, Any]
) -> Iterable[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    return zip(made, kwargs[fields.REDUCTION], kwargs[fields.KEPT], strict=True)
