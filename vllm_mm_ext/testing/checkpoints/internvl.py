"""InternVL in the transformers layout: image tiles and video frames, one fixed-size tower."""

from __future__ import annotations

from pathlib import Path

from transformers import (
    GotOcr2ImageProcessor,
    InternVLConfig,
    InternVLForConditionalGeneration,
    InternVLProcessor,
    InternVLVideoProcessor,
)

from vllm_mm_ext.testing.checkpoints.qwen_vl import text_2_5
from vllm_mm_ext.testing.checkpoints.sizes import Sizes
from vllm_mm_ext.testing.checkpoints.tiny_tokenizer import chatml_template, make_tokenizer
from vllm_mm_ext.testing.checkpoints.weights import randomise, save_weights

_PATCH = 14
_DOWNSAMPLE = 0.5


def build_internvl(path: Path, seed: int, sizes: Sizes) -> None:
    """Write an InternVL checkpoint."""
    named = {
        "start_image_token": "<img>",
        "end_image_token": "</img>",
        "context_image_token": "<IMG_CONTEXT>",
        "video_token": "<video>",
    }
    tokenizer = make_tokenizer(
        list(named.values()),
        vocab_size=sizes.vocab_size,
        named=named,
        chat_template=chatml_template(image="<IMG_CONTEXT>\\n", video="<video>\\n"),
    )
    side = sizes.image_size
    tokens_per_tile = int((side // _PATCH) ** 2 * _DOWNSAMPLE**2)
    text = text_2_5(sizes)
    text["rope_parameters"] = {"rope_type": "default", "rope_theta": 1e6}
    config = InternVLConfig(
        vision_config={
            "hidden_size": 144,
            "intermediate_size": 288,
            "patch_size": [_PATCH, _PATCH],
            "image_size": [side, side],
            "num_hidden_layers": sizes.vision_layers,
            "num_attention_heads": 2,
            "attention_bias": True,
            # Published towers start from 0.1 and learn the scale; random layers would stay unheard.
            "layer_scale_init_value": 1.0,
        },
        text_config={"model_type": "qwen2", **text},
        image_token_id=tokenizer.convert_tokens_to_ids("<IMG_CONTEXT>"),
        image_seq_length=tokens_per_tile,
        downsample_ratio=_DOWNSAMPLE,
        tie_word_embeddings=False,
    )
    size = {"height": side, "width": side}
    processor = InternVLProcessor(
        image_processor=GotOcr2ImageProcessor(size=size, min_patches=1, max_patches=4),
        tokenizer=tokenizer,
        video_processor=InternVLVideoProcessor(size=size),
        image_seq_length=tokens_per_tile,
        chat_template=tokenizer.chat_template,
    )
    model = InternVLForConditionalGeneration(config)
    randomise(model, seed)
    config.architectures = [type(model).__name__]
    contents = {**config.to_dict(), "dtype": "bfloat16"}
    save_weights(model, contents, path, eos=tokenizer.eos_token_id, pad=tokenizer.pad_token_id)
    processor.save_pretrained(path)
