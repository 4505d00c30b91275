"""Models of the Qwen families with encoder calls of bounded size and reduced video tokens."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from vllm_mm_ext.adapters.models.encoder_batches import Grid, encode_in_batches
from vllm_mm_ext.adapters.models.reduced_outputs import ReducedOutputs

_PIXELS = {"image": "pixel_values", "video": "pixel_values_videos"}
_GRIDS = {"image": "image_grid_thw", "video": "video_grid_thw"}


class ReducedVideoModel(ReducedOutputs):
    """Mixin in front of a model class whose encoder takes patches and ``grid_thw``."""

    config: Any

    def token_grids(self, kwargs: Mapping[str, Any]) -> list[tuple[int, int, int]]:
        """Grids, height and width of each video's tokens before reduction."""
        merge = self.config.vision_config.spatial_merge_size
        return [(t, h // merge, w // merge) for t, h, w in _as_lists(kwargs[_GRIDS["video"]])]

    def similarity_channels(self) -> int | None:
        """The token's own channels; those that feed deeper layers (deepstack) follow them."""
        return int(self.config.vision_config.out_hidden_size)

    def _process_image_input(self, image_input: Any) -> Any:
        return self._bounded(
            super()._process_image_input,  # type: ignore[misc]
            image_input,
            "image",
        )

    def _process_video_input(self, video_input: Any) -> Any:
        return self._bounded(
            super()._process_video_input,  # type: ignore[misc]
            video_input,
            "video",
        )

    def _bounded(
        self, process: Callable[[Any], Sequence[torch.Tensor]], given: Any, modality: str
    ) -> Any:
        """Outputs of ``process``, the model's own, from calls with a part of the input each."""
        pixels_key, grids_key = _PIXELS[modality], _GRIDS[modality]
        if given["type"] != pixels_key:  # Embeddings that the client computed.
            return process(given)
        grids = given[grids_key]

        def encode(pixels: torch.Tensor, shapes: list[Grid]) -> Sequence[torch.Tensor]:
            part = {pixels_key: pixels, grids_key: grids.new_tensor(shapes)}
            return process(type(given)(type=pixels_key, **part))

        return tuple(
            encode_in_batches(encode, given[pixels_key], grids.tolist(), self.encoder_max_patches)
        )

    def encoder_eager_forward(
        self, mm_kwargs: dict[str, Any], path: str = "default"
    ) -> torch.Tensor:
        """What vLLM's encoder graph manager runs for items no graph is large enough for."""
        modality = self.get_input_modality(mm_kwargs)  # type: ignore[attr-defined]
        pixels_key, grids_key = _PIXELS[modality], _GRIDS[modality]
        forward = super().encoder_eager_forward  # type: ignore[misc]
        cells = self.config.vision_config.spatial_merge_size**2

        def encode(pixels: torch.Tensor, shapes: list[Grid]) -> Sequence[torch.Tensor]:
            output: torch.Tensor = forward({pixels_key: pixels, grids_key: shapes}, path=path)
            parts: Sequence[torch.Tensor] = output.split([t * h * w // cells for t, h, w in shapes])
            return parts

        return torch.cat(
            encode_in_batches(
                encode,
                mm_kwargs[pixels_key],
                _as_lists(mm_kwargs[grids_key]),
                self.encoder_max_patches,
            )
        )


def _as_lists(grids: torch.Tensor | list[Grid]) -> list[Grid]:
    return grids if isinstance(grids, list) else grids.tolist()
