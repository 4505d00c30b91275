"""Folders with the sizes of released models: what a plan reads of them, without weights.

The sizes are those of the models' ``config.json`` and processors on the Hugging Face hub. The
tokenizer is that of the family's tiny checkpoint, which writes times in as many tokens as Qwen's
and is used for the chat template besides.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from vllm_mm_ext.testing.checkpoints import checkpoint

_QWEN2_7B = {
    "hidden_size": 3584,
    "intermediate_size": 18944,
    "num_hidden_layers": 28,
    "num_attention_heads": 28,
    "num_key_value_heads": 4,
    "layer_types": ["full_attention"] * 28,
}
_MROPE_25 = {"rope_parameters": {"mrope_section": [16, 24, 24]}}
_MROPE_3 = {"rope_parameters": {"mrope_section": [24, 20, 20], "rope_theta": 5e6}}
_VISION_25 = {
    "depth": 32,
    "hidden_size": 1280,
    "intermediate_size": 3420,
    "num_heads": 16,
    "out_hidden_size": 3584,
    "fullatt_block_indexes": [7, 15, 23, 31],
}
_VISION_3 = {
    "depth": 27,
    "hidden_size": 1152,
    "intermediate_size": 4304,
    "num_heads": 16,
    "num_position_embeddings": 2304,
    "deepstack_visual_indexes": [8, 16, 24],
}
_AUDIO = {
    "encoder_layers": 32,
    "encoder_attention_heads": 20,
    "encoder_ffn_dim": 5120,
    "d_model": 1280,
}
_IMAGE_25 = {"size": {"shortest_edge": 3136, "longest_edge": 12845056}}
_IMAGE_3 = {"size": {"shortest_edge": 65536, "longest_edge": 16777216}}
_GRID_384 = [[384 * row, 384 * column] for row in range(1, 7) for column in range(1, 7)]

# By the name on the hub: the family, what is set in config.json, and in processor_config.json.
MODELS: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "Qwen/Qwen2.5-VL-7B-Instruct": (
        "qwen2_5_vl",
        {
            "text_config": {
                **_QWEN2_7B,
                **_MROPE_25,
                "vocab_size": 152064,
                "max_position_embeddings": 128000,
            },
            "vision_config": _VISION_25,
        },
        {"image_processor": _IMAGE_25, "video_processor": _IMAGE_25},
    ),
    "Qwen/Qwen3-VL-8B-Instruct": (
        "qwen3_vl",
        {
            "text_config": {
                **_MROPE_3,
                "hidden_size": 4096,
                "intermediate_size": 12288,
                "num_hidden_layers": 36,
                "num_attention_heads": 32,
                "num_key_value_heads": 8,
                "head_dim": 128,
                "vocab_size": 151936,
                "max_position_embeddings": 262144,
            },
            "vision_config": {**_VISION_3, "out_hidden_size": 4096},
        },
        {
            "image_processor": _IMAGE_3,
            "video_processor": {"size": {"shortest_edge": 4096, "longest_edge": 25165824}},
        },
    ),
    "Qwen/Qwen2.5-Omni-7B": (
        "qwen2_5_omni",
        {
            "thinker_config": {
                "text_config": {
                    **_QWEN2_7B,
                    **_MROPE_25,
                    "vocab_size": 152064,
                    "max_position_embeddings": 32768,
                },
                "vision_config": _VISION_25,
                "audio_config": {**_AUDIO, "output_dim": 3584},
            }
        },
        {"image_processor": _IMAGE_25, "video_processor": _IMAGE_25},
    ),
    "Qwen/Qwen3-Omni-30B-A3B-Instruct": (
        "qwen3_omni",
        {
            "thinker_config": {
                "text_config": {
                    **_MROPE_3,
                    "hidden_size": 2048,
                    "intermediate_size": 768,
                    "moe_intermediate_size": 768,
                    "num_hidden_layers": 48,
                    "num_attention_heads": 32,
                    "num_key_value_heads": 4,
                    "head_dim": 128,
                    "num_experts": 128,
                    "num_experts_per_tok": 8,
                    "vocab_size": 152064,
                    "max_position_embeddings": 65536,
                },
                "vision_config": {**_VISION_3, "out_hidden_size": 2048, "image_size": 768},
                "audio_config": {**_AUDIO, "output_dim": 2048, "downsample_hidden_size": 480},
            }
        },
        {"image_processor": _IMAGE_3, "video_processor": _IMAGE_3},
    ),
    "llava-hf/llava-onevision-qwen2-7b-ov-hf": (
        "llava_onevision",
        {
            "text_config": {
                **_QWEN2_7B,
                "vocab_size": 152000,
                "max_position_embeddings": 32768,
            },
            "vision_config": {
                "hidden_size": 1152,
                "intermediate_size": 4304,
                "num_hidden_layers": 26,
                "num_attention_heads": 16,
                "image_size": 384,
            },
            "image_grid_pinpoints": _GRID_384,
        },
        {
            "image_processor": {
                "size": {"height": 384, "width": 384},
                "image_grid_pinpoints": _GRID_384,
            },
            "video_processor": {"size": {"height": 384, "width": 384}},
            "num_image_tokens": 729,
        },
    ),
}


def released(name: str, parent: Path) -> Path:
    """A folder with the files of a released model, but for the weights and the vocabulary.

    Args:
        name: Its name on the hub.
        parent: Where the folder is made.
    """
    family, config, processor = MODELS[name]
    source, folder = checkpoint(family), parent / name.replace("/", "--")
    folder.mkdir(parents=True)
    for file in source.iterdir():
        if file.suffix != ".safetensors":
            shutil.copy(file, folder)
    for file_name, changes in (("config.json", config), ("processor_config.json", processor)):
        path = folder / file_name
        path.write_text(json.dumps(_changed(json.loads(path.read_text()), changes), indent=1))
    return folder


def _changed(values: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    for key, value in changes.items():
        if isinstance(value, dict):
            values[key] = _changed(dict(values.get(key) or {}), value)
        else:
            values[key] = value
    return values
