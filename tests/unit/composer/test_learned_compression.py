"""Attention of variable lengths, poolers, compressors and projectors."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vllm_mm_ext.composer.attention import varlen_cross_attention
from vllm_mm_ext.composer.pooling import (
    SpatialPooler,
    TemporalCompressor,
    TimestampEmbedding,
    average_groups,
)
from vllm_mm_ext.composer.reference import ComposerForConditionalGeneration
from vllm_mm_ext.composer.training.model import fresh_model, tiny_config
from vllm_mm_ext.composer.training.tokenizer import build_tokenizer
from vllm_mm_ext.config.options import Reduction

HIDDEN, HEADS = 16, 2


@pytest.fixture(scope="module")
def model() -> ComposerForConditionalGeneration:
    return fresh_model(tiny_config(build_tokenizer()), 3).eval()


def naive(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, q_lens: list[int], kv_lens: list[int]
) -> torch.Tensor:
    out = []
    for queries, keys, values in zip(
        q.split(q_lens), k.split(kv_lens), v.split(kv_lens), strict=True
    ):
        scores = torch.einsum("qhd,khd->hqk", queries, keys) / math.sqrt(q.shape[-1])
        out.append(torch.einsum("hqk,khd->qhd", scores.softmax(-1), values))
    return torch.cat(out)


@settings(max_examples=40)
@given(st.lists(st.tuples(st.integers(1, 5), st.integers(1, 9)), min_size=1, max_size=6))
def test_variable_lengths_attend_as_one_item_at_a_time(lengths: list[tuple[int, int]]) -> None:
    q_lens, kv_lens = [one[0] for one in lengths], [one[1] for one in lengths]
    generator = torch.Generator().manual_seed(len(lengths))
    q = torch.randn(sum(q_lens), HEADS, 8, generator=generator)
    k, v = (torch.randn(sum(kv_lens), HEADS, 8, generator=generator) for _ in range(2))
    torch.testing.assert_close(
        varlen_cross_attention(q, k, v, q_lens, kv_lens), naive(q, k, v, q_lens, kv_lens)
    )


@pytest.mark.skipif(not torch.cuda.is_available(), reason="xformers computes on CUDA")
def test_xformers_and_sdpa_agree() -> None:
    pytest.importorskip("xformers")
    q, k, v = (torch.randn(n, HEADS, 32) for n in (9, 21, 21))
    q_lens, kv_lens = [4, 4, 1], [12, 8, 1]
    there = varlen_cross_attention(q.cuda(), k.cuda(), v.cuda(), q_lens, kv_lens)
    here = varlen_cross_attention(q, k, v, q_lens, kv_lens)
    torch.testing.assert_close(there.cpu(), here, atol=2e-3, rtol=2e-3)


def test_lengths_that_do_not_add_up_are_refused() -> None:
    q = torch.randn(3, HEADS, 8)
    with pytest.raises(ValueError, match="adding up to"):
        varlen_cross_attention(q, q, q, [2], [3])
    with pytest.raises(ValueError, match="at least one query"):
        varlen_cross_attention(q, q, q, [3, 0], [2, 1])


@settings(max_examples=30)
@given(st.lists(st.integers(1, 9), min_size=1, max_size=4), st.integers(2, 4))
def test_groups_never_cross_items_and_short_ones_are_not_padded(
    frames: list[int], stride: int
) -> None:
    torch.manual_seed(0)
    compressor = TemporalCompressor(HIDDEN, HEADS, 3, stride)
    x = torch.randn(sum(frames), 3, HIDDEN)
    together = compressor(x, frames)
    assert len(together) == sum(math.ceil(n / stride) for n in frames) * 3
    alone = [
        compressor(group, [len(group)]) for item in x.split(frames) for group in item.split(stride)
    ]
    torch.testing.assert_close(together, torch.cat(alone), atol=1e-5, rtol=1e-5)


def test_average_of_a_short_group_is_over_its_members() -> None:
    x = torch.arange(5.0)[:, None, None].expand(5, 2, 4)
    out = average_groups(x, [3, 2], 2).unflatten(0, (-1, 2))[:, 0, 0]
    assert out.tolist() == [0.5, 2.0, 3.5]


def test_a_pooled_frame_does_not_depend_on_its_batch() -> None:
    torch.manual_seed(0)
    pooler = SpatialPooler(HIDDEN, HEADS, 4)
    x = torch.randn(7, 16, HIDDEN)
    torch.testing.assert_close(pooler(x)[3:5], pooler(x[3:5]), atol=1e-6, rtol=1e-5)


def test_timestamps_tell_neighbouring_frames_apart_even_hours_in() -> None:
    torch.manual_seed(0)
    embedding = TimestampEmbedding(HIDDEN)
    seconds = torch.tensor([0.0, 0.05, 7200.0, 7200.05, 14000.0])
    out = embedding(seconds).detach()
    apart = torch.cdist(out, out) + torch.eye(5)
    assert out.shape == (5, HIDDEN)
    assert float(apart.min()) > 1e-2


@pytest.mark.parametrize(("pool", "temporal"), [(1, 1), (2, 1), (1, 4), (2, 4)])
def test_counts_are_those_of_the_options(
    model: ComposerForConditionalGeneration, pool: int, temporal: int
) -> None:
    frames = [5, 8]
    patches = torch.randn(sum(frames), 16, 128)
    out = model.video_projector(patches, torch.arange(13.0), frames, pool, temporal)
    reduction = Reduction(pool=pool, temporal=temporal)
    assert len(out) == sum(reduction.count(n, 4, 4) for n in frames)


@pytest.mark.parametrize(("pool", "temporal"), [(1, 1), (2, 1), (1, 4), (2, 4)])
def test_segments_cut_at_the_stride_give_the_tokens_of_the_whole(
    model: ComposerForConditionalGeneration, pool: int, temporal: int
) -> None:
    patches, seconds = torch.randn(11, 16, 128), torch.rand(11).cumsum(0) * 7
    whole = model.video_projector(patches, seconds, [11], pool, temporal)
    parts = [
        model.video_projector(patches[a:b], seconds[a:b], [b - a], pool, temporal)
        for a, b in ((0, 4), (4, 8), (8, 11))
    ]
    torch.testing.assert_close(torch.cat(parts), whole, atol=1e-5, rtol=1e-5)


def test_an_undeclared_reduction_is_refused(model: ComposerForConditionalGeneration) -> None:
    with pytest.raises(ValueError, match="does not support pool 3"):
        model.video_projector(torch.randn(1, 16, 128), torch.zeros(1), [1], 3, 1)


def test_a_window_of_sound_does_not_depend_on_others(
    model: ComposerForConditionalGeneration,
) -> None:
    windows = [torch.randn(80, n) for n in (100, 333, 100)]
    lengths = [50, 167, 50]
    with torch.no_grad():
        together = model.audio_embeddings(windows, [0.0, 30.0, 60.0], lengths)
        alone = [
            model.audio_embeddings([window], [start], [length])[0]
            for window, start, length in zip(windows, (0.0, 30.0, 60.0), lengths, strict=True)
        ]
    assert [len(one) for one in together] == [3, 9, 3]
    torch.testing.assert_close(torch.cat(together), torch.cat(alone), atol=1e-5, rtol=1e-5)


def test_true_lengths_drop_what_the_padding_of_a_window_became(
    model: ComposerForConditionalGeneration,
) -> None:
    with torch.no_grad():
        (out,) = model.audio_embeddings([torch.randn(80, 400)], [0.0], [55])
    assert len(out) == 3
