"""Sizes and encoding costs of vLLM's mm features."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Final

from vllm_mm_ext.adapters.encoder_cache.bare_items import BARE, is_bare
from vllm_mm_ext.policies.encoder_cache.items import OutputBytes, deepstack_levels, encode_cost

if TYPE_CHECKING:
    from vllm.config import VllmConfig

# Modality of embeddings that a client sends as part of the prompt: nothing encodes them, so no tier
# keeps them and no instance shares them. vLLM puts them into its encoder cache all the same.
PROMPT_EMBEDS: Final = "prompt_embeds"


def output_bytes(vllm_config: VllmConfig) -> OutputBytes:
    """Bytes of one embedding that the engine's model makes, by modality.

    With an EC connector vLLM measures the widths of embeddings. Otherwise they follow from the
    model's configuration.
    """
    model_config = vllm_config.model_config
    transfer = vllm_config.ec_transfer_config
    element = model_config.dtype.itemsize
    width = model_config.get_inputs_embeds_size() * (1 + deepstack_levels(model_config.hf_config))
    measured = transfer.mm_encoder_output_widths if transfer is not None else {}
    return OutputBytes(
        width * element, {modality: found * element for modality, found in measured.items()}
    )


def feature_cost(feature: Any) -> float:
    """Work of encoding an mm feature, from the encoder's input tensors where they are known.

    They are not known where vLLM keeps them in shared memory for the worker alone.
    """
    values = None
    if feature.data is not None:
        tensors = (element.data for element in feature.data.values())
        values = [tensor.numel() for tensor in tensors if hasattr(tensor, "numel")]
        if is_bare(feature):
            values.append(int(feature.data[BARE].data))
    return encode_cost(feature.modality, feature.mm_position.get_num_embeds(), values)


def sharing(features: Sequence[Any], index: int) -> tuple[bool, list[Any]]:
    """Whether an earlier item shares an item's placeholder, and the later items that do."""
    place = features[index].mm_position

    def shares(other: Any) -> bool:
        one = other.mm_position
        return bool(
            one.offset < place.offset + place.length and place.offset < one.offset + one.length
        )

    # Items are in the order of their placeholders, so those that share one are neighbours.
    later = []
    for other in features[index + 1 :]:
        if not shares(other):
            break
        later.append(other)
    return index > 0 and shares(features[index - 1]), later
