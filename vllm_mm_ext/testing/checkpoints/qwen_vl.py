"""Qwen2.5-VL and Qwen3-VL: image and video."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import (
    PreTrainedTokenizerFast,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2_5_VLProcessor,
    Qwen2VLImageProcessor,
    Qwen2VLVideoProcessor,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
    Qwen3VLProcessor,
    Qwen3VLVideoProcessor,
)

from vllm_mm_ext.testing.checkpoints.sizes import Sizes
from vllm_mm_ext.testing.checkpoints.tiny_tokenizer import chatml_template, make_tokenizer
from vllm_mm_ext.testing.checkpoints.weights import randomise, save_weights

SYSTEM = "You are a helpful assistant."
_TOKENS = ("<|vision_start|>", "<|vision_end|>", "<|vision_pad|>", "<|image_pad|>", "<|video_pad|>")


def image_processor(sizes: Sizes, *, patch: int) -> Any:
    """Image processor shared by the Qwen families, with the tiny model's pixel budget."""
    return Qwen2VLImageProcessor(
        size={"shortest_edge": (2 * patch) ** 2 * 4, "longest_edge": sizes.image_max_pixels},
        patch_size=patch,
        temporal_patch_size=2,
        merge_size=2,
        **_normalisation(patch),
    )


def _normalisation(patch: int) -> dict[str, list[float]]:
    # The third generation (patch 16) dropped CLIP's statistics for plain [-1, 1] scaling.
    return {"image_mean": [0.5] * 3, "image_std": [0.5] * 3} if patch == 16 else {}


def video_processor(sizes: Sizes, *, patch: int) -> Any:
    """Qwen2-VL video processor; ``video_max_pixels`` is per frame."""
    return Qwen2VLVideoProcessor(
        size={"shortest_edge": (2 * patch) ** 2 * 4, "longest_edge": sizes.video_max_pixels},
        patch_size=patch,
        **_normalisation(patch),
        # Today's default, said aloud: transformers 5.22 changes it.
        cap_pixels_per_frame=False,
    )


def video_processor_3(sizes: Sizes) -> Any:
    """Qwen3-VL video processor; the budget is over all frames (32 of them by default)."""
    return Qwen3VLVideoProcessor(
        size={"shortest_edge": 4 * 32 * 32, "longest_edge": 32 * sizes.video_max_pixels}
    )


def vision_2_5(sizes: Sizes) -> dict[str, Any]:
    """Vision tower of the 2.5 generation: window attention with one full-attention layer."""
    return {
        "depth": sizes.vision_layers,
        "hidden_size": 160,
        "intermediate_size": 320,
        "num_heads": 2,
        "in_channels": 3,
        "patch_size": 14,
        "spatial_merge_size": 2,
        "temporal_patch_size": 2,
        "window_size": 112,
        "out_hidden_size": sizes.hidden_size,
        "fullatt_block_indexes": [sizes.vision_layers - 1],
    }


def vision_3(sizes: Sizes) -> dict[str, Any]:
    """Vision tower of the 3 generation: learned positions, deepstack into the language model."""
    return {
        "depth": sizes.vision_layers,
        "hidden_size": 144,
        "intermediate_size": 288,
        "num_heads": 2,
        "in_channels": 3,
        "patch_size": 16,
        "spatial_merge_size": 2,
        "temporal_patch_size": 2,
        "out_hidden_size": sizes.hidden_size,
        "num_position_embeddings": 24**2,
        "deepstack_visual_indexes": [0],
    }


def text_2_5(sizes: Sizes) -> dict[str, Any]:
    """Language model of the 2.5 generation."""
    return {
        "vocab_size": sizes.vocab_size,
        "hidden_size": sizes.hidden_size,
        "intermediate_size": 2 * sizes.hidden_size,
        "num_hidden_layers": sizes.layers,
        "num_attention_heads": sizes.heads,
        "num_key_value_heads": sizes.kv_heads,
        "max_position_embeddings": sizes.max_position,
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 1e6,
            "mrope_section": sizes.mrope_section(),
        },
        "use_sliding_window": False,
        "tie_word_embeddings": False,
        "bos_token_id": None,
        "eos_token_id": None,
    }


def text_3(sizes: Sizes) -> dict[str, Any]:
    """Language model of the 3 generation: explicit head width, interleaved M-RoPE."""
    text = text_2_5(sizes)
    del text["use_sliding_window"]
    text["head_dim"] = sizes.head_dim
    text["rope_parameters"] = {**text["rope_parameters"], "mrope_interleaved": True}
    return text


def _tokenizer(sizes: Sizes, system: str | None) -> PreTrainedTokenizerFast:
    template = chatml_template(
        image="<|vision_start|><|image_pad|><|vision_end|>",
        video="<|vision_start|><|video_pad|><|vision_end|>",
        system=system,
    )
    named = {"image_token": "<|image_pad|>", "video_token": "<|video_pad|>"}
    return make_tokenizer(_TOKENS, vocab_size=sizes.vocab_size, named=named, chat_template=template)


def _ids(tokenizer: PreTrainedTokenizerFast) -> dict[str, int]:
    return {
        "image_token_id": tokenizer.convert_tokens_to_ids("<|image_pad|>"),
        "video_token_id": tokenizer.convert_tokens_to_ids("<|video_pad|>"),
        "vision_start_token_id": tokenizer.convert_tokens_to_ids("<|vision_start|>"),
        "vision_end_token_id": tokenizer.convert_tokens_to_ids("<|vision_end|>"),
    }


def build_qwen2_5_vl(path: Path, seed: int, sizes: Sizes) -> None:
    """Write a Qwen2.5-VL checkpoint."""
    tokenizer = _tokenizer(sizes, SYSTEM)
    config = Qwen2_5_VLConfig(
        text_config=text_2_5(sizes),
        vision_config={**vision_2_5(sizes), "tokens_per_second": 2},
        tie_word_embeddings=False,
        **_ids(tokenizer),
    )
    processor = Qwen2_5_VLProcessor(
        image_processor=image_processor(sizes, patch=14),
        tokenizer=tokenizer,
        video_processor=video_processor(sizes, patch=14),
        chat_template=tokenizer.chat_template,
    )
    _save(Qwen2_5_VLForConditionalGeneration(config), processor, tokenizer, path, seed)


def build_qwen3_vl(path: Path, seed: int, sizes: Sizes) -> None:
    """Write a Qwen3-VL checkpoint."""
    tokenizer = _tokenizer(sizes, None)
    config = Qwen3VLConfig(
        text_config=text_3(sizes),
        vision_config=vision_3(sizes),
        tie_word_embeddings=False,
        **_ids(tokenizer),
    )
    processor = Qwen3VLProcessor(
        image_processor=image_processor(sizes, patch=16),
        tokenizer=tokenizer,
        video_processor=video_processor_3(sizes),
        chat_template=tokenizer.chat_template,
    )
    _save(Qwen3VLForConditionalGeneration(config), processor, tokenizer, path, seed)


def _save(
    model: Any, processor: Any, tokenizer: PreTrainedTokenizerFast, path: Path, seed: int
) -> None:
    randomise(model, seed)
    model.config.architectures = [type(model).__name__]
    config = {**model.config.to_dict(), "dtype": "bfloat16"}
    save_weights(model, config, path, eos=tokenizer.eos_token_id, pad=tokenizer.pad_token_id)
    processor.save_pretrained(path)
