"""The weights that a plan counts on each GPU are those that vLLM's workers load."""

from __future__ import annotations

import subprocess
import sys
from functools import cache
from pathlib import Path
from types import SimpleNamespace

import divided_weights
import pytest
import torch
from released_models import MODELS, released

from vllm_mm_ext import plugin
from vllm_mm_ext.adapters.planning.loading import CannotPlanError, load
from vllm_mm_ext.adapters.planning.model_sizes import _text_facts, model_facts
from vllm_mm_ext.planner.model_facts import ModelFacts, TextFacts
from vllm_mm_ext.testing.checkpoints import checkpoint


def facts_of(folder: Path) -> ModelFacts:
    plugin.register()
    loaded = load(str(folder), context=None, mm_processor_kwargs={}, settings={})
    return model_facts(folder.name, loaded)


@cache
def tiny(family: str) -> ModelFacts:
    return facts_of(checkpoint(family))


@pytest.mark.parametrize("family", ["qwen2_5_omni", "qwen3_omni", "composer"])
def test_one_gpu_has_all_weights_and_each_of_two_more_than_half(family: str) -> None:
    facts = tiny(family)
    assert facts.weights_per_gpu(1) == facts.weight_bytes
    assert facts.weight_bytes / 2 < facts.weights_per_gpu(2) < facts.weight_bytes


def test_an_encoder_of_another_library_is_whole_on_each_gpu() -> None:
    facts = tiny("qwen2_5_omni")
    assert facts.audio is not None
    assert facts.audio.divided_bytes == 0
    assert facts.whole_bytes >= facts.audio.parameters * facts.dtype_bytes


def test_experts_are_counted_by_themselves() -> None:
    facts = tiny("qwen3_omni")
    assert facts.audio is not None
    assert facts.audio.divided_bytes > 0
    assert 0 < facts.expert_bytes < facts.text.parameters * facts.dtype_bytes
    assert facts.weights_per_gpu(1, 2) == facts.weight_bytes - facts.expert_bytes // 2
    assert tiny("qwen2_5_omni").expert_bytes == 0


def mixture(**of_experts: int) -> TextFacts:
    """The sizes of a text model with 8 experts of 16 parameters, as a configuration counts them."""
    config = SimpleNamespace(
        vocab_size=10,
        hidden_size=4,
        intermediate_size=4,
        num_attention_heads=1,
        num_experts_per_tok=2,
        tie_word_embeddings=True,
        **of_experts,
    )
    model = torch.nn.Module()
    model.mlp = torch.nn.Module()
    model.mlp.experts = torch.nn.Linear(16, 8, bias=False)
    return _text_facts(config, model, SimpleNamespace(num_kv_heads=1, head_size=4), 1, 1000)


@pytest.mark.parametrize("name", ["num_experts", "num_local_experts", "n_routed_experts"])
def test_a_mixture_is_known_by_every_name_of_its_number_of_experts(name: str) -> None:
    facts = mixture(**{name: 8})
    assert (facts.experts, facts.experts_per_token) == (8, 2)
    assert facts.active_parameters == 1000 - 128 + 128 * 2 // 8


def test_a_mixture_that_does_not_say_its_number_of_experts_is_not_planned() -> None:
    with pytest.raises(CannotPlanError, match="the model has experts, of which"):
        mixture()


@pytest.mark.parametrize(
    ("family", "vision", "audio"),
    [
        ("qwen2_5_vl", True, None),
        ("qwen3_vl", True, None),
        ("llava_onevision", True, None),
        ("internvl", False, None),
        ("qwen2_5_omni", True, False),
        ("qwen3_omni", True, False),
        ("composer", True, True),
    ],
)
def test_gpus_must_divide_the_heads_of_encoders_whose_attention_vllm_divides(
    family: str, vision: bool, audio: bool | None
) -> None:
    facts = tiny(family)
    assert facts.vision is not None
    assert facts.vision.divides_heads is vision
    assert (None if facts.audio is None else facts.audio.divides_heads) is audio


@pytest.mark.slow
@pytest.mark.parametrize("tp", [1, 2])
@pytest.mark.parametrize("name", MODELS)
def test_each_of_two_gpus_loads_what_the_plan_counts(name: str, tp: int, tmp_path: Path) -> None:
    folder = released(name, tmp_path)
    address = (tmp_path / "group").as_uri()
    ranks = [
        subprocess.Popen(
            [sys.executable, divided_weights.__file__, str(rank), str(tp), address, str(folder)],
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank in (0, 1)
    ]
    loaded = [int(rank.communicate(timeout=300)[0].split()[-1]) for rank in ranks]
    planned = facts_of(folder).weights_per_gpu(tp, 2 // tp)
    assert loaded == pytest.approx([planned, planned], rel=1e-3)
