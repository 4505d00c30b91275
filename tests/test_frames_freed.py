"""Frames go as soon as nobody uses them and the cache has no room: nothing remembered keeps them.

Python's garbage collector is off in these tests. It does not look into NumPy arrays and tensors, so
what only it could free, it mostly cannot; and a server must not wait for it with megabytes each.
"""

from __future__ import annotations

import asyncio
import gc
import os
import pickle
import weakref
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from front import Front, opened
from omni_reference import make_processor, pixels, render, sound, video

from vllm_mm_ext.bench.clips import variant
from vllm_mm_ext.media import shared_array
from vllm_mm_ext.media.payload import SampledFrames
from vllm_mm_ext.models.composer.model import MMExtComposerForConditionalGeneration as Composer
from vllm_mm_ext.models.internvl import InternVLForConditionalGeneration as InternVL
from vllm_mm_ext.models.llava_onevision import LlavaOnevisionForConditionalGeneration as Llava
from vllm_mm_ext.models.qwen2_5_omni import Qwen2_5OmniForConditionalGeneration as Qwen25Omni
from vllm_mm_ext.models.qwen2_5_vl import Qwen2_5_VLForConditionalGeneration as Qwen25
from vllm_mm_ext.models.qwen3_omni import Qwen3OmniMoeForConditionalGeneration as Qwen3Omni
from vllm_mm_ext.models.qwen3_vl import Qwen3VLForConditionalGeneration as Qwen3
from vllm_mm_ext.options import Reduction
from vllm_mm_ext.runtime import current_runtime
from vllm_mm_ext.testing.checkpoints import checkpoint
from vllm_mm_ext.testing.media import Tone, make_clip
from vllm_mm_ext.testing.usage import mapped_media

CLIPS = 200
AT_ONCE = 4
CACHE_MB = 16
MIB = 1 << 20
REDUCTION = Reduction(pool=2)
FAMILIES = {
    "qwen2_5_vl": (Qwen25, "<|vision_start|><|video_pad|><|vision_end|>"),
    "qwen3_vl": (Qwen3, "<|vision_start|><|video_pad|><|vision_end|>"),
    "qwen2_5_omni": (Qwen25Omni, "<|vision_bos|><|VIDEO|><|vision_eos|>"),
    "qwen3_omni": (Qwen3Omni, "<|vision_start|><|video_pad|><|vision_end|>"),
    "llava_onevision": (Llava, "<video>"),
    "internvl": (InternVL, "<video>"),
    "composer": (Composer, "<|video_pad|>"),
}


@pytest.fixture(autouse=True)
def _without_garbage_collection() -> Iterator[None]:
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


async def ask_twice(front: Front, name: str) -> tuple[int, list[bool]]:
    """A first question about a clip, and a second one with fewer tokens.

    Returns:
        Bytes of the clip's frames, and whether either found them decoded.
    """
    messages = front.messages(name)
    made = [
        await front.rendered(messages, options)
        for options in ({}, {"reduction": REDUCTION.model_dump()})
    ]
    (seen,) = made[0].trace.videos
    return seen.frames * seen.height * seen.width * 3, [one.trace.videos[0].cached for one in made]


def test_live_frames_stay_within_the_cache_and_what_is_in_flight(tmp_path: Path) -> None:
    clip = make_clip(
        tmp_path / "clip.mp4",
        width=224,
        height=224,
        fps=4,
        duration=4.0,
        audio=[Tone(440.0, 0.0, 4.0)],
    ).path
    cache = {"decoded_mb": CACHE_MB, "encoded_mb": 1}
    media = {"resize": "native", "sampling": {"fps": 2.0, "max_frames": 8}, "cache": cache}
    arguments = {
        "model": str(checkpoint("qwen2_5_omni")),
        "max_model_len": 8192,
        "mm_processor_cache_gb": 0.05,
        "additional_config": {"mm_ext": {"media": media}},
    }

    async def at_once(front: Front, names: list[str]) -> list[tuple[int, list[bool]]]:
        return await asyncio.gather(*(ask_twice(front, name) for name in names))

    before, most, decoded = mapped_media(os.getpid()), 0, 0
    with opened(tmp_path, **arguments) as front:
        for number in range(0, CLIPS, AT_ONCE):
            names = [f"{number + i}.mp4" for i in range(AT_ONCE)]
            for i, name in enumerate(names):
                variant(clip, tmp_path / name, number + i)
            for size, cached in asyncio.run(at_once(front, names)):
                assert cached == [False, True]
                decoded += size
            most = max(most, mapped_media(os.getpid()) - before)
        jobs = current_runtime().frontend.pool.stats()["jobs"]
    assert jobs == 2 * CLIPS  # A probe and a decode each.
    in_flight = AT_ONCE * decoded / CLIPS
    assert decoded > 10 * (CACHE_MB * MIB + in_flight)
    assert 0 < most <= CACHE_MB * MIB + in_flight


def from_a_worker(frames: np.ndarray[Any, Any]) -> SampledFrames:
    """Frames in shared memory, as a decode worker delivers them."""
    shared, fd = shared_array.create(frames.shape, np.uint8)
    os.close(fd)
    shared[:] = frames
    made: SampledFrames = video(shared, np.arange(len(frames)) * 0.5, sound(4.0)).media[0]
    return made


def unpickled(frames: np.ndarray[Any, Any]) -> SampledFrames:
    """Frames that own their memory."""
    made: SampledFrames = pickle.loads(pickle.dumps(from_a_worker(frames)))
    return made


@pytest.mark.parametrize("origin", [from_a_worker, unpickled])
@pytest.mark.parametrize("family", FAMILIES)
def test_frames_that_were_split_go_with_their_last_user(family: str, origin: Any) -> None:
    model, prompt = FAMILIES[family]
    processor = make_processor(family, model)
    frames = origin(pixels(8, 112, 112))
    metadata = video(np.asarray(frames), np.arange(8) * 0.5).media[1]
    ask = partial(render, processor, prompt)
    first = ask({"video": [(frames, metadata)]})
    again = ask({"video": [(frames, metadata)]})
    assert first["mm_hashes"] == again["mm_hashes"]
    assert "splits" in frames.memo
    gone = weakref.ref(frames)
    reduced = frames.reduced(REDUCTION)
    assert ask({"video": [(reduced, metadata)]})["mm_hashes"] != first["mm_hashes"]
    assert len(frames.memo["splits"]) == 2
    del reduced
    assert gone() is frames
    del frames
    assert gone() is None
