"""LLaVA-OneVision and InternVL in segments: the prompt and the pixels of the whole video."""

from __future__ import annotations

import itertools
import math
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from omni_reference import features, make_processor, new_cache, pixels, render, video
from vllm.model_executor.models.interns1 import InternS1ForConditionalGeneration as StockInternVL
from vllm.model_executor.models.llava_onevision import (
    LlavaOnevisionForConditionalGeneration as StockLlava,
)

from vllm_mm_ext.adapters.models.internvl import InternVLForConditionalGeneration as InternVL
from vllm_mm_ext.adapters.models.llava_onevision import (
    LlavaOnevisionForConditionalGeneration as Llava,
)
from vllm_mm_ext.config.options import NO_REDUCTION, Reduction
from vllm_mm_ext.media.payload import SampledFrames

FAMILIES = {"llava_onevision": (Llava, StockLlava), "internvl": (InternVL, StockInternVL)}
IMAGES = {"llava_onevision": "<image>", "internvl": "<IMG_CONTEXT>"}
FRAME_TOKENS = 16
SIDE = 112


@pytest.fixture(params=list(FAMILIES))
def family(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    return name


@cache
def ours(family: str, segment_tokens: int = 4 * FRAME_TOKENS) -> Any:
    processor = make_processor(family, FAMILIES[family][0])
    processor.segment_tokens = segment_tokens
    return processor


@cache
def stock(family: str) -> Any:
    return make_processor(family, FAMILIES[family][1])


def clip(num_frames: int, seed: int = 0, side: int = SIDE) -> np.ndarray[Any, Any]:
    return pixels(num_frames, side, side, seed)


def reduced(frames: np.ndarray[Any, Any], reduction: Reduction) -> SampledFrames:
    digest = f"{reduction.key()}-{frames.shape}-{frames.sum()}"
    return SampledFrames(frames, digest=digest, reduction=reduction)


def embeds(result: dict[str, Any]) -> list[int]:
    """Positions in the prompt that take a visual token of a video, in order."""
    found: list[int] = []
    for place in result["mm_placeholders"]["video"]:
        mask = place.is_embed if place.is_embed is not None else torch.ones(place.length)
        found += (torch.nonzero(mask).flatten() + place.offset).tolist()
    return found


def frames_seen(result: dict[str, Any]) -> torch.Tensor:
    items = result["mm_kwargs"]["video"]
    return torch.cat([item["pixel_values_videos"].data for item in items])


@pytest.mark.parametrize("num_frames", [1, 3, 4, 5, 11, 12])
@pytest.mark.parametrize("per_segment", [1, 3, 4, 100])
def test_segments_are_the_prompt_and_the_pixels_of_the_whole_video(
    family: str, num_frames: int, per_segment: int
) -> None:
    data = {"video": [video(clip(num_frames))]}
    whole = render(stock(family), "see <video> what", data)
    split = render(ours(family, per_segment * FRAME_TOKENS), "see <video> what", data)
    assert split["prompt_token_ids"] == whole["prompt_token_ids"]
    assert embeds(split) == embeds(whole)
    assert len(split["mm_kwargs"]["video"]) == math.ceil(num_frames / per_segment)
    assert torch.equal(frames_seen(split), frames_seen(whole))


def test_placeholders_of_segments_follow_each_other_without_a_gap(family: str) -> None:
    places = render(ours(family), "see <video> what", {"video": [video(clip(11))]})[
        "mm_placeholders"
    ]["video"]
    for before, after in itertools.pairwise(places):
        assert after.offset == before.offset + before.length


def test_several_videos_and_images_keep_their_places(family: str) -> None:
    image = clip(1, seed=5)[0]
    data = {"video": [video(clip(9)), video(clip(2, seed=1))], "image": [image]}
    prompt = f"<video> and <video> or {IMAGES[family]}."
    whole, split = (render(p, prompt, data) for p in (stock(family), ours(family)))
    assert split["prompt_token_ids"] == whole["prompt_token_ids"]
    assert embeds(split) == embeds(whole)
    assert torch.equal(frames_seen(split), frames_seen(whole))
    assert split["mm_placeholders"]["image"] == whole["mm_placeholders"]["image"]


def test_frames_of_another_size_are_resized_as_in_the_whole_video(family: str) -> None:
    data = {"video": [video(pixels(6, 90, 150))]}
    whole, split = (render(p, "<video>", data) for p in (stock(family), ours(family)))
    assert torch.equal(frames_seen(split), frames_seen(whole))


def test_processor_options_reach_the_segments(family: str) -> None:
    data = {"video": [video(clip(6))]}
    whole, split = (
        render(p, "<video>", data, do_normalize=False) for p in (stock(family), ours(family))
    )
    assert torch.equal(frames_seen(split), frames_seen(whole))
    plain = render(ours(family), "<video>", data)
    assert not torch.equal(frames_seen(split), frames_seen(plain))
    assert not set(split["mm_hashes"]["video"]) & set(plain["mm_hashes"]["video"])


def test_a_longer_clip_keeps_its_full_segments(family: str) -> None:
    frames = clip(15)
    short, longer = (
        render(ours(family), "<video>", {"video": [video(frames[:n])]})["mm_hashes"]["video"]
        for n in (10, 15)
    )
    assert short[:2] == longer[:2]
    assert not set(short[2:]) & set(longer)


def test_only_the_last_segment_of_llava_onevision_ends_the_video() -> None:
    for num_frames in (4, 8, 9):
        items = render(ours("llava_onevision"), "<video>", {"video": [video(clip(num_frames))]})
        ends = [bool(item["video_ends"].data) for item in items["mm_kwargs"]["video"]]
        assert ends == [False] * (len(ends) - 1) + [True]
        lengths = [place.length for place in items["mm_placeholders"]["video"]]
        assert sum(lengths) == num_frames * FRAME_TOKENS + 1


def test_a_segment_that_ends_a_video_is_another_item_than_one_that_does_not() -> None:
    frames = clip(8)
    whole, longer = (
        render(ours("llava_onevision"), "<video>", {"video": [video(f)]})["mm_hashes"]["video"]
        for f in (frames, np.concatenate([frames, frames]))
    )
    assert whole[0] == longer[0]
    assert whole[1] != longer[1]


def test_frame_numbers_go_on_where_equal_frames_come_again_from_the_cache() -> None:
    looped = np.tile(clip(4), (6, 1, 1, 1))
    processor, cached = ours("internvl"), new_cache("internvl")
    for data in ({"video": [video(looped[:8])]}, {"video": [video(looped)]}):
        expected = render(stock("internvl"), "<video>", data)
        assert (
            render(processor, "<video>", data, cache=cached)["prompt_token_ids"]
            == (expected["prompt_token_ids"])
        )


def test_a_segment_seen_before_is_not_preprocessed_again(
    family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    processor, cached = ours(family), new_cache(family)
    sizes: list[int] = []
    original = type(processor).encode_inputs

    def counted(self: Any, segments: Any, hf_kwargs: Any) -> Any:
        sizes.append(sum(map(len, segments)))
        return original(self, segments, hf_kwargs)

    monkeypatch.setattr(type(processor), "encode_inputs", counted)
    for num_frames in (10, 10, 14):
        render(processor, "<video>", {"video": [video(clip(14)[:num_frames])]}, cache=cached)
    # Two full segments are known, the last one of the short clip is not.
    assert sizes == [10, 6]


def test_frames_that_are_no_bytes_are_left_to_stock(family: str) -> None:
    frames = clip(9).astype(np.float32)
    whole, split = (
        render(p, "<video>", {"video": [frames]}) for p in (stock(family), ours(family))
    )
    assert split["prompt_token_ids"] == whole["prompt_token_ids"]
    assert split["mm_hashes"] == whole["mm_hashes"]
    assert torch.equal(frames_seen(split), frames_seen(whole))


def test_without_a_segment_size_a_video_is_one_item(family: str) -> None:
    data = {"video": [video(clip(40))]}
    split = render(ours(family, 0), "<video>", data)
    assert len(split["mm_kwargs"]["video"]) == 1
    assert split["prompt_token_ids"] == render(stock(family), "<video>", data)["prompt_token_ids"]


reductions = st.builds(
    lambda pool, temporal, static: Reduction(
        pool=pool,
        temporal=temporal,
        static=static[0],
        keep=static[1],
    ),
    st.integers(1, 5),
    st.integers(1, 8),
    st.sampled_from([("none", 1.0), ("merge", 0.5), ("prune", 0.3), ("prune", 0.01)]),
)


@pytest.mark.parametrize("family", list(FAMILIES))
@settings(max_examples=25)
@given(st.integers(1, 24), reductions, st.sampled_from([0, 1, 40, 64, 150]))
def test_counted_tokens_are_the_tokens_of_the_prompt(
    family: str, num_frames: int, reduction: Reduction, segment_tokens: int
) -> None:
    processor = ours(family, segment_tokens)
    made = render(processor, "<video>", {"video": [reduced(clip(num_frames), reduction)]})
    counted = processor.video_tokens(
        num_frames, SIDE, SIDE, times=None, audio_samples=0, reduction=reduction
    )
    empty = len(processor.info.get_tokenizer().encode(""))
    assert counted.total == len(made["prompt_token_ids"]) - empty
    assert counted.visual == len(embeds(made))
    assert sum(f.mm_position.get_num_embeds() for f in features(made)) == counted.visual


def test_frames_that_merge_bear_the_number_of_the_first() -> None:
    merged = Reduction(temporal=2)
    made = render(ours("internvl"), "<video>", {"video": [reduced(clip(6), merged)]})
    text = ours("internvl").info.get_tokenizer().decode(made["prompt_token_ids"])
    assert [part.split("<img>")[0] for part in text.split("Frame")[1:]] == ["1: ", "3: ", "5: "]
    assert text.count("<video>") == 3 * FRAME_TOKENS


def test_different_reductions_share_no_cache_key(family: str) -> None:
    choices = [
        NO_REDUCTION,
        Reduction(pool=2),
        Reduction(temporal=2),
        Reduction(static="merge", keep=0.5),
        Reduction(static="prune", keep=0.5),
        Reduction(static="prune", keep=0.4),
    ]
    hashes = [
        key
        for choice in choices
        for key in render(ours(family), "<video>", {"video": [reduced(clip(8), choice)]})[
            "mm_hashes"
        ]["video"]
    ]
    assert len(set(hashes)) == len(hashes)


def test_the_largest_video_item_vllm_plans_for_is_a_segment(family: str) -> None:
    info = ours(family).info
    assert info.get_num_frames_with_most_features(16_384, {"video": 1}) == (
        min(
            1024 // FRAME_TOKENS,
            stock(family).info.get_num_frames_with_most_features(16_384, {"video": 1}),
        )
    )
