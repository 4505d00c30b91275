"""What is remembered of a split: worked out once, a few of the last, and never with pixels."""

from __future__ import annotations

from typing import Any

import numpy as np
from omni_reference import make_processor, pixels, render, video

from vllm_mm_ext.adapters.models.qwen2_5_vl import Qwen2_5_VLForConditionalGeneration as Model
from vllm_mm_ext.config.options import Reduction
from vllm_mm_ext.video.splits import remembered

VIDEO = "<|vision_start|><|video_pad|><|vision_end|>"


def test_a_recipe_is_made_once_and_the_last_few_asked_for_are_kept() -> None:
    frames = video(pixels(2)).media[0]
    made: list[int] = []

    def ask(key: int) -> None:
        remembered(frames, key, lambda: made.append(key))

    for key in (0, 1, 0, 2, 3, 4, 5, 6, 7, 0, 8, 9):
        ask(key)
    assert made == [0, 1, 2, 3, 4, 5, 6, 7, 8, 9]
    ask(0)
    assert len(made) == 10
    ask(1)  # Eight others were asked for since.
    assert made[10:] == [1]
    assert len(frames.memo["splits"]) == 8


def test_a_later_turn_finds_the_split_of_the_first_and_gets_views_of_its_own_frames() -> None:
    processor: Any = make_processor("qwen2_5_vl", Model)
    clip = video(
        pixels(12, 112, 112), np.arange(12.0), reduction=Reduction(static="prune", keep=0.5)
    )
    frames = clip.media[0]
    render(processor, VIDEO, {"video": [clip]})
    (recipe,) = frames.memo["splits"].values()
    render(processor, VIDEO, {"video": [clip]})
    (found,) = frames.memo["splits"].values()
    assert found is recipe
    for one, segment in zip(recipe.segments, recipe.applied(frames, None).segments, strict=True):
        assert segment.digest == one.digest
        assert segment.part is one.part
        assert np.shares_memory(segment, frames)
