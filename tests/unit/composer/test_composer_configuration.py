"""A composer's configuration: checked, and the same after being saved."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

from vllm_mm_ext.composer.configuration import ComposerConfig
from vllm_mm_ext.composer.reference import ComposerForConditionalGeneration
from vllm_mm_ext.testing.checkpoints import checkpoint


@cache
def right() -> ComposerConfig:
    config: ComposerConfig = ComposerConfig.from_pretrained(checkpoint("composer"))
    return config


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"text_config": None}, ["text_config", "missing"]),
        ({"text_config": {"model_type": "zz"}}, ["text_config.model_type", "'zz'", "qwen3"]),
        ({"vision_config": {"model_type": "clip"}}, ["vision_config.model_type", "'clip'"]),
        ({"vision_config": {"image_size": 9}}, ["vision_config.image_size", "9", "at least", "16"]),
        ({"reductions": [{"pool": 9}]}, ["reductions[0].pool", "9", "1 to 8"]),
        ({"reductions": [{"pool": 5}]}, ["reductions[0].pool", "5", "4 x 4", "1 to 4"]),
        ({"reductions": [{"pul": 2}]}, ["reductions[0].pul", "pool, temporal, method"]),
        ({"reductions": [{"pool": 2, "method": "x"}]}, ["method", "'x'", "learned, average"]),
        ({"reductions": [{"pool": 2}, {"pool": 2}]}, ["reductions[1]", "once"]),
        ({"reductions": [{"pool": 1}]}, ["reductions[0]", "nothing"]),
        ({"default_reduction": {"pool": 3}}, ["default_reduction", "pool 3", "pool 2, temporal 4"]),
        ({"fps": 0}, ["fps", "0", "above 0"]),
        ({"audio_stack": 0}, ["audio_stack", "0", "at least 1"]),
        ({"audio_window_s": 0.03}, ["audio_window_s", "0.03", "0.02 s"]),
        ({"audio_window_s": 30.0}, ["audio_window_s", "30.0", "at most 2.0 s"]),
        ({"audio_pad_windows": True, "audio_window_s": 1.0}, ["exactly 2.0 s"]),
        ({"hidden": 30, "heads": 4}, ["hidden", "30", "heads (4)"]),
        ({"turn_end_token_id": 10**6}, ["turn_end_token_id", "1000000", "from 0 to"]),
        ({"frame_token_id": None}, ["frame_token_id", "<frame>"]),
    ],
)
def test_a_wrong_configuration_is_refused_by_key_value_and_what_is_valid(
    changes: dict[str, Any], words: Sequence[str]
) -> None:
    with pytest.raises(ValueError) as caught:  # noqa: PT011
        ComposerConfig(**(right().to_dict() | changes))
    assert all(word in str(caught.value) for word in words), caught.value


def test_a_frame_has_as_many_whole_patches_as_fit() -> None:
    """As SigLIP SO400M at 384 pixels, which transformers and vLLM see as 27 x 27 patches."""
    vision = right().vision_config.to_dict() | {"image_size": 50, "patch_size": 14}
    config = ComposerConfig(**(right().to_dict() | {"vision_config": vision}))
    assert config.side == 3
    model = ComposerForConditionalGeneration(config)
    frames = torch.zeros(2, 3, 50, 50)
    for pool, tokens in ((1, 9), (2, 4)):
        embeddings = model.video_embeddings(frames, torch.arange(2), [2], pool)
        assert len(embeddings) == 2 * tokens == 2 * config.frame_tokens(pool)


def test_a_configuration_survives_being_saved(tmp_path: Path) -> None:
    config = right()
    config.save_pretrained(tmp_path)
    again = ComposerConfig.from_pretrained(tmp_path)
    assert again.declared == config.declared
    assert again.default_reduction == config.default_reduction
    assert again.audio_states(70_000) == config.audio_states(70_000)
    assert again.text_config.to_dict() == config.text_config.to_dict()
