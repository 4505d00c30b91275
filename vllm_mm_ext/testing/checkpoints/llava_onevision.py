"""LLaVA-OneVision: image and video through a fixed-size SigLIP tower."""

from __future__ import annotations

from pathlib import Path

from transformers import (
    LlavaOnevisionConfig,
    LlavaOnevisionForConditionalGeneration,
    LlavaOnevisionImageProcessor,
    LlavaOnevisionProcessor,
    LlavaOnevisionVideoProcessor,
)

from vllm_mm_ext.testing.checkpoints.qwen_vl import text_2_5
from vllm_mm_ext.testing.checkpoints.sizes import Sizes
from vllm_mm_ext.testing.checkpoints.tiny_tokenizer import make_tokenizer
from vllm_mm_ext.testing.checkpoints.weights import randomise, save_weights

_PATCH = 14


def _template() -> str:
    """The family puts images first, then videos, then the text on a line of its own."""
    return (
        "{%- for message in messages %}"
        "{{- '<|im_start|>' + message['role'] }}"
        "{%- if message['content'] is string %}{{- '\\n' + message['content'] }}{%- else %}"
        "{%- for kind, token in [('image', '<image>'), ('video', '<video>')] %}"
        "{%- for part in message['content'] if part['type'] == kind %}{{- ' ' + token }}"
        "{%- endfor %}{%- endfor %}"
        "{%- for part in message['content'] if part['type'] == 'text' %}"
        "{{- '\\n' + part['text'] }}{%- endfor %}"
        "{%- endif %}"
        "{{- '<|im_end|>' }}"
        "{%- endfor %}"
        "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"
    )


def build_llava_onevision(path: Path, seed: int, sizes: Sizes) -> None:
    """Write a LLaVA-OneVision checkpoint.

    The grid of image tilings is kept to 1x2, 2x1 and 2x2: the real one goes to 6x6.
    """
    tokenizer = make_tokenizer(
        ["<image>", "<video>"],
        vocab_size=sizes.vocab_size,
        named={"image_token": "<image>", "video_token": "<video>"},
        chat_template=_template(),
    )
    side = sizes.image_size
    pinpoints = [[side, side], [side, 2 * side], [2 * side, side], [2 * side, 2 * side]]
    text = text_2_5(sizes)
    text["rope_parameters"] = {"rope_type": "default", "rope_theta": 1e6}
    config = LlavaOnevisionConfig(
        vision_config={
            "model_type": "siglip_vision_model",
            "hidden_size": 144,
            "intermediate_size": 288,
            "patch_size": _PATCH,
            "image_size": side,
            "num_hidden_layers": sizes.vision_layers,
            "num_attention_heads": 2,
            "vision_use_head": False,
        },
        text_config={"model_type": "qwen2", **text},
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        video_token_index=tokenizer.convert_tokens_to_ids("<video>"),
        vision_feature_select_strategy="full",
        vision_feature_layer=-1,
        vision_aspect_ratio="anyres_max_9",
        image_grid_pinpoints=pinpoints,
        tie_word_embeddings=False,
    )
    size = {"height": side, "width": side}
    processor = LlavaOnevisionProcessor(
        image_processor=LlavaOnevisionImageProcessor(size=size, image_grid_pinpoints=pinpoints),
        tokenizer=tokenizer,
        video_processor=LlavaOnevisionVideoProcessor(size=size),
        num_image_tokens=(side // _PATCH) ** 2,
        vision_feature_select_strategy="full",
        chat_template=tokenizer.chat_template,
    )
    model = LlavaOnevisionForConditionalGeneration(config)
    randomise(model, seed)
    config.architectures = [type(model).__name__]
    contents = {**config.to_dict(), "dtype": "bfloat16"}
    save_weights(
        model,
        contents,
        path,
        eos=tokenizer.eos_token_id,
        pad=tokenizer.pad_token_id,
        # transformers 5 dropped a level that the published checkpoints have.
        rename=lambda name: name.replace("vision_tower.", "vision_tower.vision_model."),
    )
    processor.save_pretrained(path)
