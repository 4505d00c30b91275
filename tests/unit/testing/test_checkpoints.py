"""Tiny checkpoints: real layout, small, reproducible."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from safetensors import safe_open
from transformers import AutoConfig, AutoProcessor, AutoTokenizer

from vllm_mm_ext.composer import hf_processor as _registers_itself  # noqa: F401
from vllm_mm_ext.testing.checkpoints import FAMILIES, build, checkpoint

PLACEHOLDERS = {
    "qwen2_5_omni": {
        "image": "<|vision_bos|><|IMAGE|><|vision_eos|>",
        "video": "<|vision_bos|><|VIDEO|><|vision_eos|>",
        "audio": "<|audio_bos|><|AUDIO|><|audio_eos|>",
    },
    "qwen3_omni": {
        "image": "<|vision_start|><|image_pad|><|vision_end|>",
        "video": "<|vision_start|><|video_pad|><|vision_end|>",
        "audio": "<|audio_start|><|audio_pad|><|audio_end|>",
    },
    "qwen2_5_vl": {
        "image": "<|vision_start|><|image_pad|><|vision_end|>",
        "video": "<|vision_start|><|video_pad|><|vision_end|>",
    },
    "qwen3_vl": {
        "image": "<|vision_start|><|image_pad|><|vision_end|>",
        "video": "<|vision_start|><|video_pad|><|vision_end|>",
    },
    "llava_onevision": {"image": "<image>", "video": "<video>"},
    "internvl": {"image": "<IMG_CONTEXT>", "video": "<video>"},
    "qwen2_audio": {"audio": "<|audio_bos|><|AUDIO|><|audio_eos|>"},
    "composer": {"video": "<|video_pad|>", "audio": "<|audio_pad|>"},
}


@pytest.fixture(scope="module", params=list(FAMILIES))
def family(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    return name


def weights(path: Path) -> dict[str, Any]:
    with safe_open(path / "model.safetensors", "pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118


def test_checkpoint_is_small(family: str) -> None:
    files = list(checkpoint(family).iterdir())
    assert sum(file.stat().st_size for file in files) < 6_000_000


def test_config_names_the_real_architecture(family: str) -> None:
    config = AutoConfig.from_pretrained(checkpoint(family))
    name = config.architectures[0].replace("_", "").lower().removeprefix("mmext")
    assert name.startswith(family.replace("_", ""))


def test_template_renders_the_familys_placeholders(family: str) -> None:
    tokenizer = AutoTokenizer.from_pretrained(checkpoint(family))
    parts = [{"type": kind} for kind in sorted(FAMILIES[family].modalities)]
    messages = [{"role": "user", "content": [*parts, {"type": "text", "text": "héllo"}]}]
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert set(PLACEHOLDERS[family]) == FAMILIES[family].modalities
    for placeholder in PLACEHOLDERS[family].values():
        assert text.count(placeholder) == 1
    assert text.endswith("<|im_start|>assistant\n")


def test_placeholders_are_single_tokens_and_text_round_trips(family: str) -> None:
    tokenizer = AutoTokenizer.from_pretrained(checkpoint(family))
    for placeholder in PLACEHOLDERS[family].values():
        assert len(tokenizer(placeholder).input_ids) == placeholder.count("<")
    text = "Zażółć gęślą 日本 <1.5 seconds>\n"
    assert tokenizer.decode(tokenizer(text).input_ids) == text


def test_processor_loads_without_network(family: str) -> None:
    processor = AutoProcessor.from_pretrained(checkpoint(family))
    assert type(processor).__name__.endswith("Processor")


def test_same_seed_same_weights_and_other_seed_other_weights(tmp_path: Path) -> None:
    paths = [
        build("qwen2_audio", tmp_path / name, seed=seed)
        for name, seed in (("a", 0), ("b", 0), ("c", 1))
    ]
    first, second, third = (weights(path)["language_model.lm_head.weight"] for path in paths)
    assert first.equal(second)
    assert not first.equal(third)


def test_an_existing_checkpoint_is_not_rebuilt_and_another_size_replaces_it(
    tmp_path: Path,
) -> None:
    path = build("qwen2_5_vl", tmp_path / "model")
    written = (path / "model.safetensors").stat().st_mtime_ns
    assert (build("qwen2_5_vl", path) / "model.safetensors").stat().st_mtime_ns == written
    build("qwen2_5_vl", path, hidden_size=256)
    assert json.loads((path / "config.json").read_text())["text_config"]["hidden_size"] == 256


def test_a_directory_of_somebody_else_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "precious.txt").write_text("mine")
    with pytest.raises(FileExistsError, match="not a tiny checkpoint"):
        build("qwen2_audio", tmp_path)
    assert (tmp_path / "precious.txt").read_text() == "mine"


def test_unknown_family_and_size_are_refused(tmp_path: Path) -> None:
    with pytest.raises(KeyError, match="one of"):
        build("gpt", tmp_path / "x")
    with pytest.raises(TypeError, match="depth"):
        build("qwen2_audio", tmp_path / "x", depth=3)
