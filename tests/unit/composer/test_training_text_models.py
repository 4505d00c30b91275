"""Training with text models that scale their logits, mask in their own way, or hear nothing."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import Gemma3TextConfig, GptOssConfig, GraniteConfig, LlamaConfig

from vllm_mm_ext.composer.configuration import ComposerConfig
from vllm_mm_ext.composer.reference import ComposerForConditionalGeneration
from vllm_mm_ext.composer.training.batches import (
    check_shares_clips,
    encode_media,
    make_batch,
    read_text,
)
from vllm_mm_ext.composer.training.compose import compose
from vllm_mm_ext.composer.training.data import generated_batches
from vllm_mm_ext.composer.training.evaluate import accuracy, held_out_samples
from vllm_mm_ext.composer.training.model import fresh_model, tiny_config
from vllm_mm_ext.composer.training.questions import Question
from vllm_mm_ext.composer.training.samples import Sample
from vllm_mm_ext.composer.training.tokenizer import build_tokenizer
from vllm_mm_ext.composer.training.towers import train_towers
from vllm_mm_ext.composer.training.trainer import Recipe, Trainer, save_checkpoint

TOKENIZER = build_tokenizer()
SIZES = {
    "vocab_size": len(TOKENIZER),
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "pad_token_id": TOKENIZER.pad_token_id,
    "eos_token_id": TOKENIZER.eos_token_id,
}
TEXTS = {
    "granite": GraniteConfig(**SIZES, logits_scaling=8.0, embedding_multiplier=3.0),
    "gemma3_text": Gemma3TextConfig(
        **SIZES, sliding_window=8, layer_types=["sliding_attention", "full_attention"]
    ),
    "gpt_oss": GptOssConfig(
        **SIZES,
        sliding_window=8,
        layer_types=["sliding_attention", "full_attention"],
        num_local_experts=2,
        num_experts_per_tok=1,
    ),
}
MUTE = ComposerConfig(**(tiny_config(TOKENIZER, layers=1).to_dict() | {"audio_config": None}))


def with_text(text: object) -> ComposerForConditionalGeneration:
    changes = {"text_config": text}
    model = fresh_model(ComposerConfig(**(tiny_config(TOKENIZER).to_dict() | changes)), 0)
    model.eval()
    return model


def talk(frames: int, *, sound: bool = False) -> Sample:
    turns = [Question("all", "what is it ?", "red"), Question("all", "and then ?", "blue circle")]
    pictures = np.random.default_rng(frames).integers(0, 255, (frames, 64, 64, 3), np.uint8)
    samples = np.zeros(16_000, np.float32) if sound else None
    return Sample(pictures, [0.5 * k for k in range(frames)], samples, turns, independent=False)


@pytest.mark.parametrize("kind", TEXTS)
def test_logits_in_training_are_those_of_the_text_model_by_itself(kind: str) -> None:
    model = with_text(TEXTS[kind])
    # One row is shorter than the other, and both are longer than the window of some layers.
    batch = make_batch(model.config, TOKENIZER, [talk(2), talk(5)], 1, 1)
    with torch.no_grad():
        media = encode_media(model, batch)
        read = read_text(model, batch, media)
        embeds = model.inputs_embeds(batch.input_ids, media.video, media.audio)
        alone = torch.cat(
            [
                model(inputs_embeds=embeds[span.row : span.row + 1, : span.end]).logits[
                    0, span.start :
                ]
                for span in batch.spans
            ]
        )
    torch.testing.assert_close(read.logits, alone, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (TEXTS["gemma3_text"], ["gemma3_text", "sliding_attention", "folder"]),
        (TEXTS["gpt_oss"], ["gpt_oss", "eager attention"]),
    ],
)
def test_the_generator_refuses_text_models_that_cannot_share_a_clip(
    text: object, words: list[str]
) -> None:
    with pytest.raises(ValueError) as caught:  # noqa: PT011
        check_shares_clips(with_text(text))
    assert all(word in str(caught.value) for word in words), caught.value
    check_shares_clips(with_text(TEXTS["granite"]))


def test_text_models_with_embeddings_in_every_layer_are_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "gemma3n_text"}))
    with pytest.raises(ValueError, match="gemma3n_text, which has embeddings"):
        compose(tmp_path, tmp_path, None, reductions=[])


def test_an_output_head_of_its_own_is_no_hidden_matrix() -> None:
    model = with_text(LlamaConfig(**SIZES, tie_word_embeddings=False))
    trainer = Trainer(model, TOKENIZER, Recipe(steps=1), generated_batches(MUTE, TOKENIZER, 0, 9))
    muon, adamw = trainer._optimizers
    head, rows = model.get_output_embeddings().weight, model.get_input_embeddings().weight
    assert head is not rows

    def trains(optimizer: torch.optim.Optimizer, weight: torch.Tensor) -> bool:
        return any(one is weight for group in optimizer.param_groups for one in group["params"])

    assert [trains(muon, head), trains(muon, rows)] == [False, False]
    assert [trains(adamw, head), trains(adamw, rows)] == [True, True]


def test_a_model_that_hears_nothing_is_trained_without_sound() -> None:
    model = fresh_model(MUTE, 0)
    before = model.vision_tower.encoder.layers[0].mlp.fc1.weight.clone()
    shares: list[set[str]] = []
    train_towers(model, 1, 0, lambda _, found: shares.append(set(found)))
    assert shares == [{"shape", "colour", "flash"}]
    assert not torch.equal(before, model.vision_tower.encoder.layers[0].mlp.fc1.weight)

    of_generator = generated_batches(MUTE, TOKENIZER, 3, 100)
    heard = make_batch(MUTE, TOKENIZER, [talk(3, sound=True)], 1, 1)
    one = Trainer(
        model,
        TOKENIZER,
        Recipe(steps=2, perception_steps=9),
        lambda step: heard if step else of_generator(step),
    )
    for _ in range(2):
        loss, _ = one.train_step()
        assert loss > 0
    asked = accuracy(model, TOKENIZER, held_out_samples(1, 64, sound=False), [(2, 4)])
    assert not set(asked["pool 2, temporal 4"]) & {"pitch", "glide", "on_screen"}


def test_a_reduction_added_to_a_checkpoint_starts_from_fresh_weights(tmp_path: Path) -> None:
    config = tiny_config(TOKENIZER, layers=1)
    model = fresh_model(config, 1)
    save_checkpoint(model, TOKENIZER, tmp_path)
    told = json.loads((tmp_path / "config.json").read_text())
    told["reductions"] += [{"pool": 4, "temporal": 2}]
    (tmp_path / "config.json").write_text(json.dumps(told))
    loaded = ComposerForConditionalGeneration.from_pretrained(tmp_path).video_projector
    old = model.video_projector.state_dict()
    for name, tensor in loaded.state_dict().items():
        if name in old:
            assert torch.equal(tensor, old[name]), name
        elif "norm" in name:
            assert set(tensor.unique().tolist()) == {float(name.endswith("weight"))}, name
        else:
            # As PyTorch and the modules themselves draw them: within 1 / sqrt(inputs), or so.
            assert 0 < float(tensor.std()) < 0.2, name
            assert float(tensor.abs().max()) < 0.6, name
