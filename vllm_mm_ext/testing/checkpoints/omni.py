"""Qwen2.5-Omni and Qwen3-Omni thinkers: image, video, audio, and audio in video."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import (
    PreTrainedTokenizerFast,
    Qwen2_5OmniProcessor,
    Qwen2_5OmniThinkerConfig,
    Qwen2_5OmniThinkerForConditionalGeneration,
    Qwen3OmniMoeProcessor,
    Qwen3OmniMoeThinkerConfig,
    Qwen3OmniMoeThinkerForConditionalGeneration,
    WhisperFeatureExtractor,
)

from vllm_mm_ext.testing.checkpoints import qwen_vl
from vllm_mm_ext.testing.checkpoints.sizes import Sizes
from vllm_mm_ext.testing.checkpoints.tiny_tokenizer import chatml_template, make_tokenizer
from vllm_mm_ext.testing.checkpoints.weights import randomise, save_weights


def _tokenizer(sizes: Sizes, tokens: dict[str, str], pad: str) -> PreTrainedTokenizerFast:
    template = chatml_template(
        image=tokens["vision_bos_token"] + tokens["image_token"] + tokens["vision_eos_token"],
        video=tokens["vision_bos_token"] + tokens["video_token"] + tokens["vision_eos_token"],
        audio=tokens["audio_bos_token"] + tokens["audio_token"] + tokens["audio_eos_token"],
    )
    return make_tokenizer(
        [*tokens.values(), pad],
        vocab_size=sizes.vocab_size,
        named=tokens,
        chat_template=template,
    )


def _feature_extractor(chunk_s: int) -> Any:
    return WhisperFeatureExtractor(
        feature_size=128, sampling_rate=16000, hop_length=160, chunk_length=chunk_s, n_fft=400
    )


def _audio_tower(sizes: Sizes) -> dict[str, Any]:
    return {
        "num_mel_bins": 128,
        "encoder_layers": sizes.audio_layers,
        "encoder_attention_heads": 2,
        "encoder_ffn_dim": 256,
        "d_model": 128,
        "output_dim": sizes.hidden_size,
        "max_source_positions": 1500,
    }


def build_qwen2_5_omni(path: Path, seed: int, sizes: Sizes) -> None:
    """Write a Qwen2.5-Omni checkpoint (thinker only: vLLM serves text out)."""
    tokens = {
        "image_token": "<|IMAGE|>",
        "audio_token": "<|AUDIO|>",
        "video_token": "<|VIDEO|>",
        "vision_bos_token": "<|vision_bos|>",
        "vision_eos_token": "<|vision_eos|>",
        "audio_bos_token": "<|audio_bos|>",
        "audio_eos_token": "<|audio_eos|>",
    }
    tokenizer = _tokenizer(sizes, tokens, "<|vision_pad|>")
    ids = {name: tokenizer.convert_tokens_to_ids(token) for name, token in tokens.items()}
    thinker = Qwen2_5OmniThinkerConfig(
        audio_config={**_audio_tower(sizes), "n_window": 100},
        vision_config={**qwen_vl.vision_2_5(sizes), "tokens_per_second": 25},
        text_config=qwen_vl.text_2_5(sizes),
        audio_token_index=ids["audio_token"],
        image_token_index=ids["image_token"],
        video_token_index=ids["video_token"],
        vision_start_token_id=ids["vision_bos_token"],
        vision_end_token_id=ids["vision_eos_token"],
        audio_start_token_id=ids["audio_bos_token"],
        audio_end_token_id=ids["audio_eos_token"],
        user_token_id=tokenizer.convert_tokens_to_ids("user"),
        position_id_per_seconds=25,
        seconds_per_chunk=2,
        pad_token_id=tokenizer.pad_token_id,
    )
    processor = Qwen2_5OmniProcessor(
        image_processor=qwen_vl.image_processor(sizes, patch=14),
        video_processor=qwen_vl.video_processor(sizes, patch=14),
        feature_extractor=_feature_extractor(300),
        tokenizer=tokenizer,
        chat_template=tokenizer.chat_template,
    )
    model = Qwen2_5OmniThinkerForConditionalGeneration(thinker)
    # The name under which the real checkpoint is published.
    identity = {"model_type": "qwen2_5_omni", "architectures": ["Qwen2_5OmniModel"]}
    _save(model, identity, processor, tokenizer, path, seed)


def build_qwen3_omni(path: Path, seed: int, sizes: Sizes) -> None:
    """Write a Qwen3-Omni checkpoint (mixture-of-experts thinker)."""
    tokens = {
        "image_token": "<|image_pad|>",
        "audio_token": "<|audio_pad|>",
        "video_token": "<|video_pad|>",
        "vision_bos_token": "<|vision_start|>",
        "vision_eos_token": "<|vision_end|>",
        "audio_bos_token": "<|audio_start|>",
        "audio_eos_token": "<|audio_end|>",
    }
    tokenizer = _tokenizer(sizes, tokens, "<|vision_pad|>")
    ids = {name: tokenizer.convert_tokens_to_ids(token) for name, token in tokens.items()}
    text = {
        **qwen_vl.text_3(sizes),
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": sizes.hidden_size,
        "decoder_sparse_step": 1,
    }
    thinker = Qwen3OmniMoeThinkerConfig(
        audio_config={
            **_audio_tower(sizes),
            "n_window": 50,
            "n_window_infer": 800,
            "conv_chunksize": 500,
            "downsample_hidden_size": 32,
        },
        # vLLM reads the last two off the published config; transformers infers them.
        vision_config={
            **qwen_vl.vision_3(sizes),
            "image_size": 24 * 16,
            "apply_vit_abs_pos_embed": True,
        },
        text_config=text,
        audio_token_id=ids["audio_token"],
        image_token_id=ids["image_token"],
        video_token_id=ids["video_token"],
        vision_start_token_id=ids["vision_bos_token"],
        vision_end_token_id=ids["vision_eos_token"],
        audio_start_token_id=ids["audio_bos_token"],
        audio_end_token_id=ids["audio_eos_token"],
        user_token_id=tokenizer.convert_tokens_to_ids("user"),
        position_id_per_seconds=13,
        seconds_per_chunk=2,
    )
    processor = Qwen3OmniMoeProcessor(
        image_processor=qwen_vl.image_processor(sizes, patch=16),
        video_processor=qwen_vl.video_processor(sizes, patch=16),
        feature_extractor=_feature_extractor(30),
        tokenizer=tokenizer,
        chat_template=tokenizer.chat_template,
    )
    model = Qwen3OmniMoeThinkerForConditionalGeneration(thinker)
    identity = {
        "model_type": "qwen3_omni_moe",
        "architectures": ["Qwen3OmniMoeForConditionalGeneration"],
    }
    _save(model, identity, processor, tokenizer, path, seed)


def _save(
    model: Any,
    identity: dict[str, Any],
    processor: Any,
    tokenizer: PreTrainedTokenizerFast,
    path: Path,
    seed: int,
) -> None:
    randomise(model, seed)
    # Without the talker and the vocoder, which vLLM does not load.
    contents = {
        **identity,
        "enable_audio_output": False,
        "thinker_config": model.config.to_dict(),
        "dtype": "bfloat16",
    }
    save_weights(
        model,
        contents,
        path,
        eos=tokenizer.eos_token_id,
        pad=tokenizer.pad_token_id,
        rename="thinker.{}".format,
    )
    processor.save_pretrained(path)
