"""The composer that ships with the package, before training."""

from __future__ import annotations

from typing import Any

import torch
from transformers import Qwen3Config, SiglipVisionConfig, WhisperConfig

from vllm_mm_ext.composer.configuration import SPECIAL_TOKENS, ComposerConfig
from vllm_mm_ext.composer.reference import ComposerForConditionalGeneration


def tiny_config(tokenizer: Any, *, layers: int = 4) -> ComposerConfig:
    """Configuration of the shipped composer: 16 tokens a frame of 64 x 64, 2.5 a second of sound.

    Args:
        tokenizer: Holds the special tokens.
        layers: Of the text model.
    """
    return ComposerConfig(
        text_config=Qwen3Config(
            vocab_size=len(tokenizer),
            hidden_size=192,
            intermediate_size=512,
            num_hidden_layers=layers,
            num_attention_heads=6,
            num_key_value_heads=2,
            head_dim=32,
            max_position_embeddings=32768,
            rope_theta=10000.0,
            tie_word_embeddings=True,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
            bos_token_id=None,
        ),
        vision_config=SiglipVisionConfig(
            hidden_size=128,
            intermediate_size=384,
            num_hidden_layers=3,
            num_attention_heads=4,
            image_size=64,
            patch_size=16,
            vision_use_head=False,
        ),
        audio_config=WhisperConfig(
            d_model=128,
            encoder_layers=2,
            encoder_attention_heads=4,
            encoder_ffn_dim=384,
            decoder_layers=1,
            num_mel_bins=80,
            max_source_positions=1500,
        ),
        reductions=[
            {"pool": 2, "temporal": 1},
            {"pool": 1, "temporal": 4},
            {"pool": 2, "temporal": 4},
        ],
        audio_stack=20,
        audio_pad_windows=False,
        **{key: tokenizer.convert_tokens_to_ids(token) for key, token in SPECIAL_TOKENS.items()},
    )


def fresh_model(config: ComposerConfig, seed: int) -> ComposerForConditionalGeneration:
    """A composer with random weights that follow from the seed, in float32."""
    torch.manual_seed(seed)
    return ComposerForConditionalGeneration(config)
