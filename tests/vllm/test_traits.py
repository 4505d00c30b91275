"""Frames leave the decoder at the size the model's own processor would resize them to."""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from transformers.video_processing_utils import BaseVideoProcessor
from vllm.config import ModelConfig
from vllm.multimodal import MULTIMODAL_REGISTRY
from vllm.transformers_utils.processors.cosmos3_edge import Cosmos3EdgeVideoProcessor
from vllm.transformers_utils.processors.internvl import InternVLVideoProcessor as InternVL
from vllm.transformers_utils.processors.minimax_m3 import MiniMaxM3VLVideoProcessor
from vllm.transformers_utils.processors.muse_glimmer import MuseGlimmerVideoProcessor

from vllm_mm_ext.adapters.processors.model_traits import read_traits, size_rule_for, size_rule_of
from vllm_mm_ext.composer.hf_processor import ComposerVideoProcessor
from vllm_mm_ext.media.sizing import target_size
from vllm_mm_ext.plugin import register
from vllm_mm_ext.testing.checkpoints import checkpoint
from vllm_mm_ext.video.segments import VideoShape

QWEN = ("qwen2_5_omni", "qwen3_omni", "qwen2_5_vl", "qwen3_vl")
VIDEO_FAMILIES = (*QWEN, "llava_onevision")
SETTINGS: tuple[dict[str, Any], ...] = (
    {},
    {"size": {"shortest_edge": 3136, "longest_edge": 50176}},
    {"max_pixels": 100352},
    {"videos_kwargs": {"size": {"shortest_edge": 3136, "longest_edge": 50176}}},
    {"videos_kwargs": {"max_pixels": 150_000}},
    {"size": {"shortest_edge": 3136, "longest_edge": 100352}, "videos_kwargs": {"fps": 1}},
    {"videos_kwargs": {"min_pixels": 40000}},
    {"videos_kwargs": {"do_resize": False}},
    {"do_resize": False},
)
# vLLM passes these to Qwen3-VL's video processor, which fails at every video.
STOCK_FAILS = [("qwen3_vl", 4), ("qwen3_vl", 6)]
SMALL_SIZE = {"shortest_edge": 3136, "longest_edge": 50176}
SOURCES = ((6, 720, 1280), (4, 360, 640), (8, 1080, 608), (4, 64, 64))


@cache
def processor_of(family: str, settings: int) -> Any:
    register()
    config = ModelConfig(str(checkpoint(family)), mm_processor_kwargs=SETTINGS[settings])
    return MULTIMODAL_REGISTRY.create_processor(config)


def processed_pixels(mm_processor: Any, frames: np.ndarray[Any, Any]) -> tuple[int, ...]:
    """Shape of what the HF processor makes of frames, by way of vLLM's processor."""
    metadata = {
        "total_num_frames": len(frames),
        "fps": 2.0,
        "duration": len(frames) / 2,
        "video_backend": "test",
        "frames_indices": list(range(len(frames))),
        "do_sample_frames": False,
    }
    items = mm_processor.info.parse_mm_data({"video": [(frames, metadata)]})
    made = mm_processor._apply_hf_processor_main(items, {})
    if "video_grid_thw" in made:
        return tuple(np.asarray(made["video_grid_thw"]).ravel().tolist())
    return tuple(made["pixel_values_videos"][0].shape)


@pytest.mark.parametrize(
    ("family", "settings"),
    [
        (f, s)
        for f in VIDEO_FAMILIES
        for s in range(7)
        if (f in QWEN or s == 0) and (f, s) not in STOCK_FAILS
    ],
)
def test_the_processor_makes_the_same_of_resized_and_native_frames(
    family: str, settings: int
) -> None:
    mm_processor = processor_of(family, settings)
    rule = read_traits(mm_processor).size_rule
    assert rule.kind != "native", "the family's resizing rule is not known"
    for num_frames, height, width in SOURCES:
        native = np.zeros((num_frames, height, width, 3), np.uint8)
        size = target_size(rule, width=width, height=height, num_frames=num_frames)
        resized = np.zeros((num_frames, *size, 3), np.uint8)
        grid = processed_pixels(mm_processor, resized)
        assert grid == processed_pixels(mm_processor, native)
        if len(grid) == 3:
            patch = mm_processor.info.get_hf_processor().video_processor.patch_size
            assert (grid[1] * patch, grid[2] * patch) == size, "resized once more"


def size_made_of(video_processor: Any, frames: int, height: int, width: int) -> tuple[int, int]:
    clip = torch.zeros(frames, 3, height, width, dtype=torch.uint8)
    made = video_processor(videos=[clip], do_sample_frames=False, return_tensors="pt")
    if "video_grid_thw" not in made:
        return tuple(made["pixel_values_videos"].shape[-2:])
    rows, columns = (made["video_grid_thw"][0, 1:] * video_processor.patch_size).tolist()
    return rows, columns


def test_no_class_gets_a_rule_by_which_it_does_not_resize() -> None:
    found = [getattr(transformers, name) for name in dir(transformers) if "VideoProc" in name]
    kinds = {kind for kind in found if BaseVideoProcessor in kind.__mro__[1:]}
    vllms = {Cosmos3EdgeVideoProcessor, MiniMaxM3VLVideoProcessor, MuseGlimmerVideoProcessor}
    made = [kind() for kind in kinds | vllms]
    made += [ComposerVideoProcessor(size={"height": 64, "width": 64}), InternVL(image_size=64)]
    rules = [(one, size_rule_of(one, {})) for one in made]
    known = [(one, rule) for one, rule in rules if rule.kind != "native"]
    assert {rule.kind for _, rule in known} == {"fixed", "qwen_vl", "qwen3_vl"}
    for one, rule in known:
        expected = size_made_of(one, 8, 360, 640)
        assert target_size(rule, width=640, height=360, num_frames=8) == expected, type(one)


@pytest.mark.parametrize(("family", "settings"), STOCK_FAILS)
def test_sizes_for_videos_alone_are_obeyed_where_vllm_fails_at_them(
    family: str, settings: int
) -> None:
    rule = read_traits(processor_of(family, settings)).size_rule
    given = SETTINGS[settings]["videos_kwargs"]
    assert {"min_pixels": rule.min_pixels, "max_pixels": rule.max_pixels}.items() >= given.items()


@pytest.mark.parametrize("server", [{"max_pixels": 200_704}, {"size": SMALL_SIZE}], ids=str)
@pytest.mark.parametrize("asked", [{"max_pixels": 100_352}, {"size": SMALL_SIZE}, {}], ids=str)
def test_a_size_in_the_request_outranks_the_servers_as_in_vllm(
    server: dict[str, Any], asked: dict[str, Any]
) -> None:
    register()
    config = ModelConfig(str(checkpoint("qwen3_vl")), mm_processor_kwargs=server)
    info = MULTIMODAL_REGISTRY.create_processor(config).info
    merged = info._merge_and_resolve_mm_processor_kwargs(asked)["videos_kwargs"]
    size = info._get_vision_size(merged, default_size=info.get_video_processor().size)
    rule = size_rule_for(info, asked, info.get_hf_processor())
    assert (rule.min_pixels, rule.max_pixels) == (size["shortest_edge"], size["longest_edge"])


@pytest.mark.parametrize("settings", [7, 8])
@pytest.mark.parametrize("family", QWEN)
def test_without_resizing_frames_keep_their_size(family: str, settings: int) -> None:
    mm_processor = processor_of(family, settings)
    assert read_traits(mm_processor).size_rule.kind == "native"
    grid = processed_pixels(mm_processor, np.zeros((4, 224, 448, 3), np.uint8))
    patch = mm_processor.info.get_hf_processor().video_processor.patch_size
    assert (grid[1] * patch, grid[2] * patch) == (224, 448)
    layout = mm_processor.layout(
        VideoShape(4, 224, 448, times=(0.0, 0.5, 1.0, 1.5), final=True), {}
    )
    assert layout.size == (224, 448)


@pytest.mark.parametrize(
    ("family", "hears", "rate", "multiple"),
    [
        ("qwen2_5_omni", True, 16_000, 2),
        ("qwen3_omni", True, 16_000, 2),
        ("qwen2_5_vl", False, None, 2),
        ("qwen3_vl", False, None, 2),
        ("llava_onevision", False, None, 1),
        ("qwen2_audio", False, 16_000, 1),
    ],
)
def test_traits_follow_from_the_model(
    family: str, hears: bool, rate: int | None, multiple: int
) -> None:
    traits = read_traits(processor_of(family, 0))
    assert (traits.hears_video, traits.audio_rate) == (hears, rate)
    assert traits.frame_multiple == multiple


def test_a_text_model_has_no_traits() -> None:
    assert not read_traits(None).hears_video
