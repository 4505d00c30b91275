"""Size of an mm item's encoder output, and work of encoding the item."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

# Input values of the encoder for one token, where the input itself is not at hand: 4 patches of
# 2 x 14 x 14 pixels in 3 colours (Qwen2-VL and later).
_VALUES_PER_TOKEN = 4 * 1176
# Work for one input value, relative to that of pixels. Qwen2.5-Omni's towers have 0.64e9 parameters
# for 256 mel values a position, and 0.67e9 for 1,176 pixel values a patch.
_WORK = {"audio": 4.4}


def encode_cost(modality: str, tokens: int, values: Iterable[int] | None) -> float:
    """Work of encoding an item, in units of one pixel value going through the vision encoder.

    Merging or pooling tokens does not change the work, but makes the output smaller.

    Args:
        modality: vLLM's name of the item's modality.
        tokens: Embeddings that the encoder makes of the item.
        values: Number of values in each tensor of the encoder's input, if they are known.
    """
    known = sum(values) if values is not None else 0
    return float(known or tokens * _VALUES_PER_TOKEN) * _WORK.get(modality, 1.0)


class OutputBytes:
    """Bytes of one embedding.

    Args:
        default: Bytes for modalities that were not measured.
        measured: Bytes by modality.
    """

    def __init__(self, default: int, measured: Mapping[str, int]) -> None:
        self._default = default
        self._measured = dict(measured)
        self.largest = max(self._measured.values(), default=default)

    def of(self, modality: str) -> int:
        """Bytes of one embedding of a modality."""
        return self._measured.get(modality, self._default)


def deepstack_levels(hf_config: Any) -> int:
    """Layers whose outputs a vision encoder appends to its last one (Qwen3-VL's DeepStack).

    Args:
        hf_config: The model's configuration; omni models nest a ``thinker_config`` in it.
    """
    inner = getattr(hf_config, "thinker_config", hf_config)
    vision = getattr(inner, "vision_config", None)
    return len(getattr(vision, "deepstack_visual_indexes", None) or ())
