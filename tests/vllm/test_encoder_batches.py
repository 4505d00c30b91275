"""Encoder calls of bounded size give each video the same outputs as one call."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from vllm.config import LoRAConfig

from vllm_mm_ext.adapters.models.encoder_batches import (
    cut_batches,
    encode_frames_in_batches,
    encode_in_batches,
)
from vllm_mm_ext.adapters.models.reduced_outputs import ReducedOutputs

grids = st.lists(
    st.tuples(st.integers(1, 9), st.integers(1, 6), st.integers(1, 6)).map(list),
    min_size=1,
    max_size=6,
)


@given(grids=grids, max_patches=st.integers(1, 120))
def test_calls_hold_whole_grids_in_order_and_no_more_than_the_bound(
    grids: list[list[int]], max_patches: int
) -> None:
    batches = cut_batches(grids, max_patches)
    pieces = [piece for batch in batches for piece in batch]
    assert [video for video, _ in pieces] == sorted(video for video, _ in pieces)
    for video, (t, h, w) in enumerate(grids):
        own = [shape for index, shape in pieces if index == video]
        assert sum(shape[0] for shape in own) == t
        assert all(shape[1:] == [h, w] for shape in own)
    for batch in batches:
        patches = sum(math.prod(shape) for _, shape in batch)
        assert patches <= max_patches or (len(batch) == 1 and batch[0][1][0] == 1)


@given(grids=grids, max_patches=st.integers(1, 120))
def test_a_call_ends_only_where_the_next_grid_does_not_fit(
    grids: list[list[int]], max_patches: int
) -> None:
    batches = cut_batches(grids, max_patches)
    for batch, following in pairwise(batches):
        patches = sum(math.prod(shape) for _, shape in batch)
        _, (_, h, w) = following[0]
        assert patches + h * w > max_patches


@given(grids=grids)
def test_without_a_bound_there_is_one_call_with_all_videos(grids: list[list[int]]) -> None:
    assert cut_batches(grids, 0) == [list(enumerate(grids))]


@given(grids=grids, max_patches=st.integers(0, 120), seed=st.integers(0, 99))
def test_each_video_gets_what_one_call_gives_it(
    grids: list[list[int]], max_patches: int, seed: int
) -> None:
    total = sum(map(math.prod, grids))
    pixels = torch.randn(total, 3, generator=torch.Generator().manual_seed(seed))

    def encode(patches: torch.Tensor, shapes: list[list[int]]) -> Sequence[torch.Tensor]:
        """Like a vision tower: every patch sees all of its own temporal grid."""
        outputs = []
        for own, (t, h, w) in zip(
            patches.split([math.prod(shape) for shape in shapes]), shapes, strict=True
        ):
            per_grid = own.view(t, h * w, -1).double()
            outputs.append((per_grid + per_grid.mean(dim=1, keepdim=True)).flatten(0, 1))
        return outputs

    got = encode_in_batches(encode, pixels, grids, max_patches)
    for one, other in zip(got, encode(pixels, grids), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize(("bound", "calls"), [(0, [7]), (3, [3, 3, 1]), (7, [7]), (20, [7])])
def test_frames_go_to_the_encoder_a_bounded_number_at_a_time(bound: int, calls: list[int]) -> None:
    sizes = []

    def encode(frames: torch.Tensor) -> torch.Tensor:
        sizes.append(len(frames))
        return frames.flatten(1).unsqueeze(1) * 2

    frames = torch.arange(7 * 12.0).view(7, 3, 4)
    got = encode_frames_in_batches(encode, frames, bound)
    assert torch.equal(got, (frames * 2).flatten(1).unsqueeze(1))
    assert sizes == calls


@pytest.mark.parametrize("for_towers", [False, True])
def test_a_server_with_lora_on_the_vision_tower_does_not_start(for_towers: bool) -> None:
    class Model:
        def __init__(self, **_: Any) -> None:
            pass

    class Reduced(ReducedOutputs, Model):
        pass

    config: Any = SimpleNamespace(
        lora_config=LoRAConfig(enable_tower_connector_lora=for_towers),
        model_config=None,
    )
    if not for_towers:
        assert Reduced(vllm_config=config).encoder_max_patches > 0
        return
    with pytest.raises(ValueError, match="enable_tower_connector_lora must be false"):
        Reduced(vllm_config=config)
