"""Models whose encoder sees every frame by itself: bounded encoder calls, fewer tokens."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from vllm_mm_ext.adapters.models.encoder_batches import encode_frames_in_batches
from vllm_mm_ext.adapters.models.reduced_outputs import ReducedOutputs


class PerFrameModel(ReducedOutputs):
    """Mixin in front of a model class; the class passes its encoder through `in_batches`."""

    @property
    def patches_per_frame(self) -> int:
        """Patches that the encoder makes of one frame, or of one tile of an image."""
        raise NotImplementedError

    @property
    def frame_tokens(self) -> tuple[int, int]:
        """Tokens of a frame of video vertically and horizontally, after the model's own pooling."""
        raise NotImplementedError

    def frames_of(self, kwargs: Mapping[str, Any]) -> Sequence[int]:
        """Frames of each video among the model's inputs."""
        raise NotImplementedError

    def token_grids(self, kwargs: Mapping[str, Any]) -> list[tuple[int, int, int]]:
        """A grid per frame."""
        return [(frames, *self.frame_tokens) for frames in self.frames_of(kwargs)]

    def in_batches(
        self, encode: Callable[[torch.Tensor], torch.Tensor], pixels: torch.Tensor
    ) -> torch.Tensor:
        """Encode frames in calls of bounded size.

        Args:
            encode: The encoder: ``[frames, ...]`` to ``[frames, tokens, channels]``.
            pixels: ``[frames, 3, height, width]``.
        """
        bound = self.encoder_max_patches
        frames = max(1, bound // self.patches_per_frame) if bound else 0
        return encode_frames_in_batches(encode, pixels, frames)
