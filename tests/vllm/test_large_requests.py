"""Requests with more model inputs than vLLM's processor cache takes, beside those of others."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from omni_reference import even, features, make_processor, pixels, render, sound, video
from vllm.multimodal.cache import LruKeyReplicatedReceiverCache, LruKeyReplicatedSenderCache
from vllm.multimodal.cache.base import MultiModalCache

from vllm_mm_ext.adapters.models.qwen2_5_omni import (
    Qwen2_5OmniForConditionalGeneration as Omni,
)
from vllm_mm_ext.adapters.models.qwen2_5_vl import Qwen2_5_VLForConditionalGeneration as Model

VIDEOS = {
    "qwen2_5_vl": "<|vision_start|><|video_pad|><|vision_end|>",
    "qwen2_5_omni": "<|vision_bos|><|VIDEO|><|vision_eos|>",
}


class Halves:
    """Both halves of vLLM's processor cache: that of the API server and the engine's."""

    def __init__(self, processor: Any, prompt: str, clip: Any, times: int) -> None:
        """Make halves with room for a clip so many times."""
        self.processor, self.prompt = processor, prompt
        items = render(processor, prompt, {"video": [clip]})["mm_kwargs"].values()
        room = times * sum(MultiModalCache.get_item_size(item) for own in items for item in own)
        processor.info.ctx.get_mm_config().mm_processor_cache_gb = room / (1 << 30)
        config = processor.info.ctx.model_config
        self.sender = LruKeyReplicatedSenderCache(config)
        self.receiver = LruKeyReplicatedReceiverCache(config)

    def serve(self, clips: list[Any], uuids: list[str | None] | None = None) -> dict[str, Any]:
        """Process a request and hand it to the engine, which misses no item."""
        given = {} if uuids is None else {"video": uuids}
        prompt = self.prompt * len(clips)
        made = render(self.processor, prompt, {"video": clips}, given, cache=self.sender)
        self.receiver.get_and_update_features(features(made))
        assert list(self.sender._cache) == list(self.receiver._cache)
        return made


@pytest.fixture(params=[("qwen2_5_vl", Model), ("qwen2_5_omni", Omni)], ids=lambda param: param[0])
def halves(request: pytest.FixtureRequest) -> Iterator[Halves]:
    family, model_class = request.param
    processor = make_processor(family, model_class)
    processor.segment_tokens = 24
    config = processor.info.ctx.get_mm_config()
    before = config.mm_processor_cache_gb
    yield Halves(processor, VIDEOS[family], clip(4, 0, heard=True), 5)
    config.mm_processor_cache_gb = before


def clip(frames: int, seed: int, *, heard: bool = False) -> Any:
    times = even(frames, 2.0)
    track = sound(frames / 2) if heard else None
    return video(pixels(frames, 112, 168, seed), times, track, digest=f"clip-{seed}")


def test_what_the_engine_drops_for_a_large_request_is_sent_again(halves: Halves) -> None:
    small, *large = (clip(4, seed, heard=True) for seed in range(8))
    halves.serve([small])
    for _ in range(2):
        made = halves.serve(large)
        assert all(item is not None for item in made["mm_kwargs"]["video"])
    assert all(item is not None for item in halves.serve([small])["mm_kwargs"]["video"])
    assert all(item is None for item in halves.serve([small])["mm_kwargs"]["video"])


def test_a_video_known_by_its_uuid_is_served_beside_a_large_one(halves: Halves) -> None:
    small, large = clip(4, 1), clip(24, 2)
    alone = halves.serve([small], ["known"])["mm_placeholders"]["video"]
    made = halves.serve([None, large], ["known", None])
    assert made["mm_kwargs"]["video"][: len(alone)] == [None] * len(alone)
    assert len(made["mm_placeholders"]["video"]) > len(alone)


def test_a_request_that_fits_is_not_sent_twice(halves: Halves) -> None:
    # Nearly half of the room: pixels that the model normalises itself count as bytes.
    half = clip(8, 3)
    halves.serve([half])
    assert all(item is None for item in halves.serve([half])["mm_kwargs"]["video"])
