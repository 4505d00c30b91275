"""What vLLM sizes its encoder cache for: segments, or whole videos where these stay whole."""

from __future__ import annotations

from typing import Any

import pytest
from vllm.config import ModelConfig
from vllm.multimodal import MULTIMODAL_REGISTRY

from vllm_mm_ext.config.root import MMExtConfig
from vllm_mm_ext.plugin import register
from vllm_mm_ext.testing.checkpoints import checkpoint

LENGTH = 16_384


def infos(family: str, **config: Any) -> tuple[Any, Any]:
    """The plugin's processing info and stock vLLM's."""
    register()
    model_config: Any = ModelConfig(str(checkpoint(family)), max_model_len=LENGTH, **config)
    model_config.mm_ext_settings = MMExtConfig.from_additional_config(
        {"mm_ext": {"segments": {"tokens": 64}}}
    )
    ours = MULTIMODAL_REGISTRY.create_processor(model_config).info
    stock = next(kind for kind in type(ours).__mro__ if kind.__module__.startswith("vllm."))
    return ours, stock(ours.ctx)


def largest(info: Any) -> tuple[Any, int]:
    counts = {"video": 1}
    frames = info.get_num_frames_with_most_features(LENGTH, counts)
    return info.get_mm_max_tokens_per_item(LENGTH, counts), frames


@pytest.mark.parametrize(
    "family", ["qwen2_5_vl", "qwen2_5_omni", "qwen3_omni", "llava_onevision", "internvl"]
)
def test_whole_videos_are_planned_for_only_where_videos_stay_whole(family: str) -> None:
    ours, stock = infos(family)
    assert largest(ours)[1] < largest(stock)[1]
    for whole in (
        {"video_pruning_rate": 0.5},
        {"enable_mm_embeds": True, "limit_mm_per_prompt": {"video": 0}},
    ):
        ours, stock = infos(family, **whole)
        assert largest(ours) == largest(stock)
