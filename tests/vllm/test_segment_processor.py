"""What splitting keeps apart, what it leaves alone, and what it survives."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from omni_reference import make_processor, new_cache, pixels, render, video
from PIL import Image
from vllm.multimodal.inputs import MultiModalKwargsItem
from vllm.multimodal.media import MediaWithBytes
from vllm.multimodal.utils import group_and_batch_mm_items
from vllm.v1.serial_utils import MsgpackDecoder, MsgpackEncoder

from vllm_mm_ext.adapters.models.qwen2_5_vl import Qwen2_5_VLForConditionalGeneration as Model
from vllm_mm_ext.config.options import NO_REDUCTION, Reduction
from vllm_mm_ext.media.payload import SampledFrames

FAMILY = "qwen2_5_vl"
VIDEO = "<|vision_start|><|video_pad|><|vision_end|>"


@pytest.fixture
def ours() -> Any:
    processor = make_processor(FAMILY, Model)
    processor.segment_tokens = 24
    return processor


def even(frames: int) -> list[float]:
    return [float(i) for i in range(frames)]


def item_hashes(processor: Any, clip: Any, prompt: str = VIDEO) -> list[str]:
    hashes: list[str] = render(processor, prompt, {"video": [clip]})["mm_hashes"]["video"]
    return hashes


def test_frames_of_equal_bytes_and_other_shape_are_other_items(ours: Any) -> None:
    flat = pixels(4, 75, 80)
    turned = flat.reshape(4, 80, 75, 3)
    assert not set(item_hashes(ours, video(flat))) & set(item_hashes(ours, video(turned)))


def test_equal_videos_share_their_items_wherever_they_come_from(ours: Any) -> None:
    frames = pixels(8, 112, 112)
    one, other = (video(frames.copy(), even(8), digest=name) for name in ("a", "b"))
    assert item_hashes(ours, one) == item_hashes(ours, other)


def test_a_video_token_in_the_text_stays_text_and_the_video_in_segments(ours: Any) -> None:
    clip = video(pixels(8, 112, 112), even(8), reduction=Reduction(pool=2))
    plain = render(ours, f"{VIDEO} what", {"video": [clip]})
    quoted = render(ours, f"{VIDEO} what <|video_pad|>", {"video": [clip]})
    assert quoted["mm_hashes"] == plain["mm_hashes"]
    length = len(plain["prompt_token_ids"])
    assert quoted["prompt_token_ids"][:length] == plain["prompt_token_ids"]


def test_a_video_larger_than_the_processor_cache_is_served_on_every_turn(ours: Any) -> None:
    clip = video(pixels(24, 112, 168), even(24))
    fresh = render(ours, VIDEO, {"video": [clip]})
    config = ours.info.ctx.get_mm_config()
    before = config.mm_processor_cache_gb
    try:
        config.mm_processor_cache_gb = 1e-3
        cache = new_cache(FAMILY)
        for _ in range(3):
            again = render(ours, VIDEO, {"video": [clip]}, cache=cache)
            assert again["prompt_token_ids"] == fresh["prompt_token_ids"]
            assert all(item is not None for item in again["mm_kwargs"]["video"])
    finally:
        config.mm_processor_cache_gb = before


def test_a_size_in_the_request_wins_over_the_size_of_delivered_frames(ours: Any) -> None:
    frames = SampledFrames(pixels(4, 224, 224), digest="large", pinned=True)
    clip = MediaWithBytes((frames, video(pixels(4)).media[1]), b"large")
    shape = ours.shape_of(frames, clip.media[1])
    assert ours.layout(shape, {}).size == (224, 224)
    assert ours.layout(shape, {"max_pixels": 56 * 56}).size == (56, 56)
    assert ours.layout(shape, {"videos_kwargs": {"max_pixels": 56 * 56}}).size == (56, 56)


def test_tokens_are_not_foretold_where_stock_lays_videos_out(ours: Any) -> None:
    config = ours.info.ctx.get_mm_config()
    config.video_pruning_rate = 0.5
    try:
        with pytest.raises(ValueError, match="stock"):
            ours.video_tokens(4, 112, 112, times=even(4), audio_samples=0, reduction=NO_REDUCTION)
    finally:
        config.video_pruning_rate = None


def test_what_is_sent_with_a_segment_does_not_grow_with_the_video(ours: Any) -> None:
    def segments(frames: int) -> list[Any]:
        clip = video(pixels(frames, 112, 112), even(frames))
        return list(render(ours, VIDEO, {"video": [clip]})["mm_kwargs"]["video"])

    def sent(item: Any) -> list[Any]:
        # Reused for the next message.
        return [bytearray(part) for part in MsgpackEncoder().encode(item)]

    few, many = segments(8), segments(64)
    assert len(many) == 8 * len(few)
    assert {len(sent(item)[0]) for item in many} == {len(sent(item)[0]) for item in few}
    decoder = MsgpackDecoder(MultiModalKwargsItem)
    ((count, batch),) = group_and_batch_mm_items([decoder.decode(sent(item)) for item in many])
    assert count == len(many)
    pixel_values = torch.cat([item["pixel_values_videos"].data for item in many])
    assert torch.equal(batch["pixel_values_videos"], pixel_values)


@pytest.mark.parametrize(
    "kind", ["float frames", "integers", "to sample", "sampling asked", "sampling asked of videos"]
)
def test_what_is_no_sampled_frames_is_left_to_stock(ours: Any, kind: str) -> None:
    frames, metadata = video(pixels(8, 112, 112)).media
    data: Any = np.asarray(frames)
    options: dict[str, Any] = {}
    if kind == "float frames":
        data = torch.from_numpy(data.astype(np.float32))
    elif kind == "integers":
        data = data.astype(np.int16)
    elif kind == "to sample":
        metadata = {**metadata, "do_sample_frames": True}
    else:
        options = {"do_sample_frames": True, "fps": 1.0}
        if kind == "sampling asked of videos":
            options = {"videos_kwargs": options}
    result = render(ours, VIDEO, {"video": [(data, metadata)]}, **options)
    assert len(result["mm_placeholders"]["video"]) == 1
    assert "video_continues" not in result["mm_kwargs"]["video"][0]


def test_of_frames_that_the_front_end_has_chosen_nobody_chooses_again(ours: Any) -> None:
    clip = video(pixels(8, 112, 112), even(8))
    plain = render(ours, VIDEO, {"video": [clip]})
    asked = render(ours, VIDEO, {"video": [clip]}, do_sample_frames=True, fps=1.0)
    assert asked["prompt_token_ids"] == plain["prompt_token_ids"]


def test_frames_are_cut_in_whatever_they_come(ours: Any) -> None:
    frames = pixels(8, 112, 112)
    first = np.ascontiguousarray(np.moveaxis(frames, 3, 1))
    kinds = [torch.from_numpy(frames), first, torch.from_numpy(first)]
    kinds += [[Image.fromarray(one) for one in frames]]
    metadata = video(frames).media[1]
    expected = item_hashes(ours, (frames, metadata))
    assert len(expected) > 1
    for kind in kinds:
        assert item_hashes(ours, (kind, metadata)) == expected


def test_an_extended_clip_keeps_the_items_of_the_shorter(ours: Any) -> None:
    long = pixels(24, 112, 112)
    short, longer = (
        SampledFrames(long[:n].copy(), digest=f"clip-{n}", times=tuple(even(n)), step=1.0)
        for n in (16, 24)
    )
    metadata = video(long).media[1]
    first = item_hashes(ours, MediaWithBytes((short, metadata), b"short"))
    then = item_hashes(ours, MediaWithBytes((longer, metadata), b"long"))
    assert len(first) >= 4
    assert then[: len(first)] == first


def test_grids_that_merge_share_a_segment_even_if_that_is_larger(ours: Any) -> None:
    clip = video(pixels(16, 112, 112), even(16), reduction=Reduction(temporal=4))
    ours.segment_tokens = 1
    result = render(ours, VIDEO, {"video": [clip]})
    assert [item["video_grid_thw"].data[0] for item in result["mm_kwargs"]["video"]] == [4, 4]
