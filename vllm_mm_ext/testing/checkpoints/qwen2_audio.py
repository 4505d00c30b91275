"""Qwen2-Audio: audio only."""

from __future__ import annotations

from pathlib import Path

from transformers import (
    Qwen2AudioConfig,
    Qwen2AudioForConditionalGeneration,
    Qwen2AudioProcessor,
    WhisperFeatureExtractor,
)

from vllm_mm_ext.testing.checkpoints.qwen_vl import SYSTEM, text_2_5
from vllm_mm_ext.testing.checkpoints.sizes import Sizes
from vllm_mm_ext.testing.checkpoints.tiny_tokenizer import chatml_template, make_tokenizer
from vllm_mm_ext.testing.checkpoints.weights import randomise, save_weights


def build_qwen2_audio(path: Path, seed: int, sizes: Sizes) -> None:
    """Write a Qwen2-Audio checkpoint."""
    tokenizer = make_tokenizer(
        ["<|AUDIO|>", "<|audio_bos|>", "<|audio_eos|>"],
        vocab_size=sizes.vocab_size,
        named={
            "audio_token": "<|AUDIO|>",
            "audio_bos_token": "<|audio_bos|>",
            "audio_eos_token": "<|audio_eos|>",
        },
        chat_template=chatml_template(
            audio="Audio {n}: <|audio_bos|><|AUDIO|><|audio_eos|>\\n", system=SYSTEM
        ),
    )
    text = text_2_5(sizes)
    text["rope_parameters"] = {"rope_type": "default", "rope_theta": 1e6}
    config = Qwen2AudioConfig(
        audio_config={
            "model_type": "qwen2_audio_encoder",
            "num_mel_bins": 128,
            "encoder_layers": sizes.audio_layers,
            "encoder_attention_heads": 2,
            "encoder_ffn_dim": 256,
            "d_model": 128,
            "max_source_positions": 1500,
        },
        text_config={"model_type": "qwen2", **text},
        audio_token_index=tokenizer.convert_tokens_to_ids("<|AUDIO|>"),
    )
    processor = Qwen2AudioProcessor(
        feature_extractor=WhisperFeatureExtractor(
            feature_size=128, sampling_rate=16000, hop_length=160, chunk_length=30, n_fft=400
        ),
        tokenizer=tokenizer,
        chat_template=tokenizer.chat_template,
    )
    model = Qwen2AudioForConditionalGeneration(config)
    randomise(model, seed)
    config.architectures = [type(model).__name__]
    contents = {**config.to_dict(), "dtype": "bfloat16"}
    save_weights(
        model,
        contents,
        path,
        eos=tokenizer.eos_token_id,
        pad=tokenizer.pad_token_id,
        # transformers 5.19 repeats a level when it maps its names back to the published ones.
        rename=lambda name: name.replace("language_model.model.model.", "language_model.model."),
    )
    processor.save_pretrained(path)
