"""The composer, small: 4 x 4 patches a frame, sound in windows of two seconds."""

from __future__ import annotations

from pathlib import Path

from transformers import Qwen3Config, SiglipVisionConfig, WhisperConfig

from vllm_mm_ext.composer.configuration import SPECIAL_TOKENS, ComposerConfig
from vllm_mm_ext.testing.checkpoints.sizes import Sizes
from vllm_mm_ext.testing.checkpoints.tiny_tokenizer import chatml_template, make_tokenizer
from vllm_mm_ext.testing.checkpoints.weights import randomise, save_weights

_PATCH = 14
# Short windows, so that short clips have several.
_WINDOW_S = 2.0
_STATES_PER_SECOND = 50


def build_composer(path: Path, seed: int, sizes: Sizes) -> None:
    """Write a composer checkpoint that declares every kind of reduction."""
    from vllm_mm_ext.composer.reference import ComposerForConditionalGeneration

    tokenizer = make_tokenizer(
        list(SPECIAL_TOKENS.values()),
        vocab_size=sizes.vocab_size,
        named={},
        chat_template=chatml_template(video="<|video_pad|>", audio="<|audio_pad|>"),
    )
    config = ComposerConfig(
        text_config=Qwen3Config(
            vocab_size=sizes.vocab_size,
            hidden_size=sizes.hidden_size,
            intermediate_size=2 * sizes.hidden_size,
            num_hidden_layers=sizes.layers,
            num_attention_heads=sizes.heads,
            num_key_value_heads=sizes.kv_heads,
            head_dim=sizes.head_dim,
            max_position_embeddings=sizes.max_position,
            tie_word_embeddings=False,
        ),
        vision_config=SiglipVisionConfig(
            hidden_size=128,
            intermediate_size=256,
            patch_size=_PATCH,
            image_size=sizes.image_size // 2,
            num_hidden_layers=sizes.vision_layers,
            num_attention_heads=2,
            vision_use_head=False,
        ),
        audio_config=WhisperConfig(
            d_model=128,
            encoder_layers=sizes.audio_layers,
            encoder_attention_heads=2,
            encoder_ffn_dim=256,
            num_mel_bins=80,
            max_source_positions=int(_WINDOW_S * _STATES_PER_SECOND),
        ),
        reductions=[
            {"pool": 2, "temporal": 1},
            {"pool": 1, "temporal": 3, "method": "average"},
            {"pool": 1, "temporal": 4},
            {"pool": 2, "temporal": 4},
        ],
        default_reduction={"pool": 2, "temporal": 4},
        audio_window_s=_WINDOW_S,
        audio_stack=4,
        audio_pad_windows=False,
        **{key: tokenizer.convert_tokens_to_ids(token) for key, token in SPECIAL_TOKENS.items()},
    )
    model = ComposerForConditionalGeneration(config)
    randomise(model, seed)
    save_weights(
        model,
        {**config.to_dict(), "dtype": "bfloat16"},
        path,
        eos=tokenizer.eos_token_id,
        pad=tokenizer.pad_token_id,
    )
    tokenizer.save_pretrained(path)
