"""Output sizes: equal to transformers' processors, and stable."""

from __future__ import annotations

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from vllm_mm_ext.errors import MediaError
from vllm_mm_ext.media.sizing import target_size
from vllm_mm_ext.media.types import SizeRule

SIDES = st.integers(16, 4096)
FRAMES = st.integers(2, 768)


def qwen_vl_resize(width: int, height: int, frames: int, *, cap: bool, size: dict[str, int]):
    """What ``Qwen2VLVideoProcessor.resize`` does to a video of that shape."""
    import torch
    from transformers.image_utils import SizeDict
    from transformers.models.qwen2_vl.video_processing_qwen2_vl import Qwen2VLVideoProcessor

    processor = Qwen2VLVideoProcessor()
    video = torch.empty(1, frames, 3, height, width, device="meta")  # shapes only
    out = processor.resize(
        video,
        size=SizeDict(**size),
        resample=processor.resample,
        factor=28,
        temporal_factor=2,
        cap_pixels_per_frame=cap,
    )
    return tuple(out.shape[-2:])


@settings(max_examples=40)
@given(width=SIDES, height=SIDES, frames=FRAMES, cap=st.booleans())
def test_qwen_vl_is_the_size_transformers_resizes_to(width, height, frames, cap):
    size = {"shortest_edge": 128 * 28 * 28, "longest_edge": 768 * 28 * 28}
    rule = SizeRule(
        "qwen_vl",
        factor=28,
        min_pixels=size["shortest_edge"],
        max_pixels=size["longest_edge"],
        total_pixels=int(128000 * 28 * 28 * 0.9) if cap else 0,
    )
    if max(width, height) / min(width, height) > 200:
        with pytest.raises(MediaError, match="aspect ratio"):
            target_size(rule, width=width, height=height, num_frames=frames)
        return
    ours = target_size(rule, width=width, height=height, num_frames=frames)
    assert ours == qwen_vl_resize(width, height, frames, cap=cap, size=size)


@settings(max_examples=300)
@given(
    width=SIDES,
    height=SIDES,
    frames=FRAMES,
    low=st.integers(1, 512),
    high=st.integers(512, 30000),
)
def test_qwen3_vl_is_the_size_of_transformers_smart_resize(width, height, frames, low, high):
    from transformers.models.qwen3_vl.video_processing_qwen3_vl import smart_resize

    rule = SizeRule("qwen3_vl", factor=32, min_pixels=low * 1024, max_pixels=high * 1024)
    try:
        expected = smart_resize(frames, height, width, 2, 32, rule.min_pixels, rule.max_pixels)
    except ValueError:
        with pytest.raises(MediaError):
            target_size(rule, width=width, height=height, num_frames=frames)
        return
    assert target_size(rule, width=width, height=height, num_frames=frames) == expected


@settings(max_examples=300)
@given(
    height=st.integers(64, 2160),
    aspect=st.floats(0.3, 3.4),
    frames=FRAMES,
    kind=st.sampled_from(["qwen_vl", "qwen3_vl", "max_edge", "native"]),
)
@example(height=1353, aspect=0.375, frames=3, kind="qwen3_vl")
def test_the_target_of_the_target_is_the_target_for_whole_temporal_patches(
    height, aspect, frames, kind
):
    width = round(height * aspect)
    per_frame = kind == "qwen_vl"
    if kind == "qwen3_vl":
        # Of an odd number of frames, transformers checks the budget for one more or one less than
        # it scales for. Frames from the decoder are pinned, so nothing resizes them twice.
        frames += frames % 2
    rule = SizeRule(
        kind,
        max_edge=320,
        factor=28,
        min_pixels=16 * 784 * (1 if per_frame else frames),
        max_pixels=600 * 784 * (1 if per_frame else frames),
    )
    once = target_size(rule, width=width, height=height, num_frames=frames)
    assert target_size(rule, width=once[1], height=once[0], num_frames=frames) == once


@given(width=SIDES, height=SIDES, edge=st.integers(8, 1000))
def test_max_edge_shrinks_to_the_edge_and_never_enlarges(width, height, edge):
    rule = SizeRule("max_edge", max_edge=edge)
    out_height, out_width = target_size(rule, width=width, height=height, num_frames=1)
    assert max(out_height, out_width) == min(edge, max(width, height))
    assert min(out_height, out_width) >= 1


def test_native_and_fixed_say_what_they_mean():
    assert target_size(SizeRule(), width=64, height=48, num_frames=1) == (48, 64)
    fixed = SizeRule("fixed", height=30, width=20)
    assert target_size(fixed, width=64, height=48, num_frames=1) == (30, 20)


@settings(max_examples=300)
@given(
    width=SIDES,
    height=SIDES,
    frames=FRAMES,
    cap=st.integers(1024, 1 << 22),
    kind=st.sampled_from(["qwen_vl", "qwen3_vl", "max_edge", "native"]),
)
def test_a_frame_has_at_most_the_capped_pixels_in_whole_factors(width, height, frames, cap, kind):
    if max(width, height) / min(width, height) > 200:
        return
    options = {"max_edge": 3000, "factor": 32, "min_pixels": 65536, "max_pixels": 1 << 26}
    free = target_size(SizeRule(kind, **options), width=width, height=height, num_frames=frames)
    rule = SizeRule(kind, **options, max_frame_pixels=cap)
    capped = target_size(rule, width=width, height=height, num_frames=frames)
    if free[0] * free[1] <= cap:
        assert capped == free
        return
    assert capped[0] * capped[1] <= cap
    unit = 32 if kind.startswith("qwen") else 1
    assert capped[0] % unit == capped[1] % unit == 0
    assert min(capped) >= unit
    # A rounded-down side costs at most one unit of itself.
    if max(capped) < 3 * min(capped) and min(capped) >= 4 * unit:
        assert capped[0] * capped[1] > 0.5 * cap


def test_a_cap_leaves_fixed_frames_alone():
    fixed = SizeRule("fixed", height=384, width=384, max_frame_pixels=1000)
    assert target_size(fixed, width=64, height=48, num_frames=1) == (384, 384)
