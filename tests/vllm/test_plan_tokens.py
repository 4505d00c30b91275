"""What a plan counts is what the processor that serves puts into the prompt."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from omni_reference import sound
from PIL import Image as PilImage
from vllm.multimodal.media import MediaWithBytes

from vllm_mm_ext import plugin
from vllm_mm_ext.adapters.planning.counting import RequestCounter
from vllm_mm_ext.adapters.planning.loading import load
from vllm_mm_ext.adapters.planning.model_sizes import model_facts
from vllm_mm_ext.config.options import Reduction
from vllm_mm_ext.media.payload import SampledFrames
from vllm_mm_ext.planner.delivery import Delivery, frame_times
from vllm_mm_ext.planner.workload import Image, Video, Workload
from vllm_mm_ext.testing.checkpoints import checkpoint

FAMILIES = (
    *("qwen2_5_vl", "qwen3_vl", "qwen2_5_omni", "qwen3_omni"),
    *("llava_onevision", "internvl", "composer"),
)
RATE = 16_000


@cache
def counter(family: str) -> tuple[Any, RequestCounter]:
    plugin.register()
    loaded = load(str(checkpoint(family)), context=None, mm_processor_kwargs={}, settings={})
    return loaded, RequestCounter(loaded, model_facts(family, loaded), max_audio_s=600.0)


videos = st.builds(
    Video,
    seconds=st.sampled_from([0.7, 3.0, 9.5]),
    fps=st.just(2.0),
    width=st.integers(8, 50).map(lambda n: 16 * n),
    height=st.integers(8, 50).map(lambda n: 16 * n),
    source_fps=st.sampled_from([1.5, 10.0, 30.0]),
    sound=st.booleans(),
)
images = st.builds(Image, width=st.integers(60, 700), height=st.integers(60, 700))
reductions = st.sampled_from(
    [Reduction(), Reduction(pool=2), Reduction(temporal=2), Reduction(static="merge", keep=0.5)]
)


@pytest.mark.parametrize("family", FAMILIES)
@settings(max_examples=7, suppress_health_check=list(HealthCheck))
@given(
    shown=st.lists(videos, max_size=2),
    heard=st.lists(st.sampled_from([0.4, 5.0, 31.0]), max_size=2),
    seen=st.lists(images, max_size=2),
    reduction=reductions,
    max_frames=st.integers(2, 12),
)
def test_planned_tokens_and_items_are_those_of_the_prompt(
    family, shown, heard, seen, reduction, max_frames
):
    loaded, counts = counter(family)
    processor = loaded.processor
    limits = processor.info.get_supported_mm_limits()
    if (trained := loaded.traits.trained) is not None and not trained.allow(reduction):
        reduction = Reduction()
    work = Workload(
        videos=tuple(shown),
        audios=tuple(heard) if "audio" in limits else (),
        images=tuple(seen) if "image" in limits else (),
    )
    delivery = Delivery(max_frames, min_frames=2, reduction=reduction)
    planned = counts.request(work, delivery)

    data = {
        "video": [clip(loaded, counts, video, delivery) for video in work.videos],
        "audio": [(sound(seconds), RATE) for seconds in work.audios],
        "image": [PilImage.new("RGB", (one.width, one.height)) for one in work.images],
    }
    given_media = {kind: media for kind, media in data.items() if media}
    prompt = loaded.conversation([medium.kind for medium in planned.media], "")
    if not given_media:
        assert planned.prompt - work.text == len(loaded.tokenizer.encode(prompt))
        return
    made = processor(prompt, processor.info.parse_mm_data(given_media), {}, {}, cache=None)
    places = made["mm_placeholders"]
    assert planned.prompt - work.text == len(made["prompt_token_ids"])
    assert planned.by_modality() == {
        kind: sum(place.get_num_embeds() for place in ranges) for kind, ranges in places.items()
    }
    assert sorted(item.embeddings for item in planned.items) == sorted(
        place.get_num_embeds() for ranges in places.values() for place in ranges
    )


@pytest.mark.parametrize("family", ["qwen3_vl", "composer"])
@settings(max_examples=25, suppress_health_check=list(HealthCheck))
@given(at=st.lists(st.floats(0, 119.9), min_size=4, max_size=40, unique=True))
@example(at=[0.0, 20.0, 81.0, 119.0])
def test_written_times_take_no_more_than_planned_wherever_the_frames_are(family, at):
    loaded, counts = counter(family)
    times = sorted(at[: len(at) // 2 * 2])
    video = Video(120.0, fps=len(times) / 120, width=320, height=240)
    planned = counts.video(video, Delivery(len(times), min_frames=len(times)))
    assert planned.stages.sampled == len(times)
    width, height = planned.size
    served = loaded.processor.video_tokens(
        len(times), height, width, times=times, audio_samples=0, reduction=Reduction()
    )
    silent = counts.video(replace(video, sound=False), Delivery(len(times), min_frames=len(times)))
    assert served.visual == silent.stages.temporal
    assert served.text <= silent.stages.text + silent.later_text


def clip(loaded: Any, counts: RequestCounter, video: Video, delivery: Delivery) -> MediaWithBytes:
    """A video as the front-end delivers it."""
    width, height = counts.video(video, delivery).size
    times = frame_times(video, delivery, loaded.traits.frame_multiple)
    pixels = np.random.default_rng(len(times)).integers(
        0, 255, (len(times), height, width, 3), dtype=np.uint8
    )
    track = sound(video.seconds) if video.sound and loaded.processor.hears_video else None
    frames = SampledFrames(
        pixels,
        digest=repr((video, delivery)),
        times=times,
        audio=track,
        step=1 / video.fps,
        reduction=delivery.reduction,
        pinned=loaded.traits.size_rule.kind != "native",
    )
    metadata = {
        "total_num_frames": len(times),
        "fps": video.fps,
        "duration": video.seconds,
        "video_backend": "mm_ext",
        "frames_indices": list(range(len(times))),
        "do_sample_frames": False,
    }
    return MediaWithBytes((frames, metadata), frames.digest.encode())
