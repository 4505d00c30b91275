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
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from front import Front, Rendered, opened
from omni_reference import make_processor, new_cache, pixels, render, sound, video
from starlette.requests import Request
from vllm.entrypoints.serve.utils.api_utils import with_cancellation
from vllm.exceptions import VLLMError

from vllm_mm_ext.adapters.models.composer import MMExtComposerForConditionalGeneration as Composer
from vllm_mm_ext.adapters.models.internvl import InternVLForConditionalGeneration as InternVL
from vllm_mm_ext.adapters.models.llava_onevision import (
    LlavaOnevisionForConditionalGeneration as Llava,
)
from vllm_mm_ext.adapters.models.qwen2_5_omni import (
    Qwen2_5OmniForConditionalGeneration as Qwen25Omni,
)
from vllm_mm_ext.adapters.models.qwen2_5_vl import Qwen2_5_VLForConditionalGeneration as Qwen25
from vllm_mm_ext.adapters.models.qwen3_omni import Qwen3OmniMoeForConditionalGeneration as Qwen3Omni
from vllm_mm_ext.adapters.models.qwen3_vl import Qwen3VLForConditionalGeneration as Qwen3
from vllm_mm_ext.adapters.runtime import current_runtime
from vllm_mm_ext.config.options import Reduction
from vllm_mm_ext.media.decode import shared_array
from vllm_mm_ext.media.payload import SampledFrames
from vllm_mm_ext.testing.checkpoints import checkpoint
from vllm_mm_ext.testing.media import Tone, make_clip
from vllm_mm_ext.testing.usage import mapped_media
from vllm_mm_ext.tools.bench.bench_clips import variant

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
    seen, again = (one.trace.videos[0][1] for one in made)
    return seen.frames * seen.height * seen.width * 3, [seen.cached, again.cached]


@pytest.fixture(scope="module")
def front(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Front]:
    """A front-end with a cache for a dozen clips."""
    cache = {"decoded_mb": CACHE_MB, "encoded_mb": 0}
    media = {"resize": "native", "sampling": {"fps": 2.0, "max_frames": 8}, "cache": cache}
    with opened(
        tmp_path_factory.mktemp("freed"),
        model=str(checkpoint("qwen2_5_omni")),
        max_model_len=8192,
        mm_processor_cache_gb=0.05,
        additional_config={"mm_ext": {"media": media}},
    ) as made:
        yield made


def make(path: Path, number: int) -> Path:
    """A clip whose bytes differ from every other's."""
    tone = [Tone(440.0, 0.0, 4.0)]
    return make_clip(path, width=224, height=224, fps=4, duration=4.0, audio=tone, seed=number).path


def test_live_frames_stay_within_the_cache_and_what_is_in_flight(front: Front) -> None:
    # A quarter have pictures of their own, the others bytes.
    clips = [make(front.files / f"clip-{number}.mp4", number) for number in range(CLIPS // 4)]

    async def at_once(names: list[str]) -> list[tuple[int, list[bool]]]:
        return await asyncio.gather(*(ask_twice(front, name) for name in names))

    before, most, decoded = mapped_media(os.getpid()), 0, 0
    jobs = current_runtime().frontend.pool.stats()["jobs"]
    for number in range(0, CLIPS, AT_ONCE):
        names = [f"{number + i}.mp4" for i in range(AT_ONCE)]
        for i, name in enumerate(names):
            variant(clips[(number + i) // 4], front.files / name, number + i)
        for size, cached in asyncio.run(at_once(names)):
            assert cached == [False, True]
            decoded += size
        most = max(most, mapped_media(os.getpid()) - before)
    # A probe and a decode each.
    assert current_runtime().frontend.pool.stats()["jobs"] - jobs == 2 * CLIPS
    in_flight = AT_ONCE * decoded / CLIPS
    assert decoded > 10 * (CACHE_MB * MIB + in_flight)
    assert 0 < most <= CACHE_MB * MIB + in_flight
    assert asyncio.run(all_let_go())


async def all_let_go() -> bool:
    """Whether nothing counts in the media budget, soon: threads may have to drop theirs first."""
    for _ in range(1000):
        if not current_runtime().budget.used:
            return True
        await asyncio.sleep(0.01)
    return False


def frame_bytes(made: Rendered) -> int:
    """Bytes of the frames of a request."""
    return sum(seen.frames * seen.height * seen.width * 3 for _, seen in made.trace.videos)


@contextmanager
def without_decoded_cache() -> Iterator[None]:
    """Keep no frames, so that all count in the media budget."""
    cache = current_runtime().frontend.cache
    cache.clear()
    cache.max_bytes, kept = 0, cache.max_bytes
    try:
        yield
    finally:
        cache.max_bytes = kept


def test_requests_with_several_videos_take_turns_within_the_budget(front: Front) -> None:
    names = [f"turn-{number}.mp4" for number in range(12)]
    for number, name in enumerate(names):
        make(front.files / name, CLIPS + 20 + number)
    # What earlier requests hold, until their last thread has let go, would count as well.
    assert asyncio.run(all_let_go())
    budget = current_runtime().budget
    budget.max_bytes, kept = 5 * MIB, budget.max_bytes
    budget.max_wait_s, patience = 3600, budget.max_wait_s
    budget._peak = 0

    async def ask() -> list[Rendered]:
        pairs = zip(names[::2], names[1::2], strict=True)
        return await asyncio.gather(*(front.rendered(front.messages(*pair)) for pair in pairs))

    try:
        with without_decoded_cache():
            made = asyncio.run(ask())
        # With its sound, one request takes nearly the budget.
        (size,) = {frame_bytes(one) for one in made}
        assert size < budget.stats()["peak_bytes"] <= 2 * budget.max_bytes < 6 * size
        assert asyncio.run(all_let_go())
    finally:
        budget.max_bytes, budget.max_wait_s = kept, patience


def test_frames_count_while_they_wait_for_preprocessing(front: Front) -> None:
    make(front.files / "counted.mp4", CLIPS + 10)
    used: list[int] = []

    def preprocess(*args: Any, **kwargs: Any) -> Any:
        used.append(current_runtime().budget.used)
        return original(*args, **kwargs)

    async def ask() -> int:
        made = await front.rendered(front.messages("counted.mp4"))
        return frame_bytes(made)

    original = front.renderer._process_multimodal_async
    front.renderer._process_multimodal_async = preprocess
    try:
        with without_decoded_cache():
            size = asyncio.run(ask())
    finally:
        front.renderer._process_multimodal_async = original
    assert used
    assert size <= used[0] <= size + MIB
    assert asyncio.run(all_let_go())


Held = tuple[int, int, int]


def held_media() -> Held:
    """What this process holds of media.

    Returns:
        Bytes mapped, encoded files open, bytes that count in the media budget.
    """
    encoded = 0
    for name in os.listdir("/proc/self/fd"):
        with suppress(FileNotFoundError):  # Closed since.
            encoded += os.readlink(f"/proc/self/fd/{name}").startswith("/memfd:mm_ext_media")
    return mapped_media(os.getpid()), encoded, current_runtime().budget.used


async def falls_to(held: Held) -> bool:
    """Whether no more media are held than before, soon: threads may have to drop theirs first."""
    for _ in range(200):
        if all(now <= before for now, before in zip(held_media(), held, strict=True)):
            return True
        await asyncio.sleep(0.01)
    return False


@with_cancellation
async def route(front: Front, _: Request, messages: list[Any]) -> None:
    """A request as vLLM's routes take it."""
    await front.rendered(messages)


async def stays() -> Any:
    """What a client that does not hang up sends after its request."""
    await asyncio.Event().wait()


async def refused(front: Front, messages: list[Any]) -> None:
    """A request that cannot be answered; as in a server, the error goes no further."""
    with pytest.raises((VLLMError, ValueError)):
        await route(front, Request({"type": "http"}, stays), messages)


async def hang_up(front: Front, name: str, jobs: int) -> None:
    """Ask about a clip, and leave when the decode pool has begun so many more jobs."""
    pool = current_runtime().frontend.pool
    jobs += pool.stats()["jobs"]
    leaves = asyncio.Event()

    async def receive() -> Any:
        await leaves.wait()
        return {"type": "http.disconnect"}

    asked = asyncio.create_task(
        route(front, Request({"type": "http"}, receive), front.messages(name))
    )
    while pool.stats()["jobs"] < jobs and not asked.done():
        await asyncio.sleep(0.001)
    leaves.set()
    await asked
    while pool.stats()["busy"]:
        await asyncio.sleep(0.001)


def test_a_refused_request_leaves_nothing_behind(front: Front) -> None:
    # The first one's probe sees a video, and then there is no frame in it.
    data = make(front.files / "whole.mp4", CLIPS).read_bytes()
    start = data.index(b"mdat") + 4
    size = int.from_bytes(data[start - 8 : start - 4], "big") - 8
    (front.files / "empty.mp4").write_bytes(data[:start] + bytes(size) + data[start + size :])
    (front.files / "no.mp4").write_bytes(b"not a video" * 1000)
    picture = front.files / "no.png"
    picture.write_bytes(b"not a picture")
    beside = front.messages("whole.mp4")
    beside[0]["content"].append({"type": "image_url", "image_url": {"url": picture.as_uri()}})

    async def ask() -> None:
        held = held_media()
        for messages in (front.messages("empty.mp4"), front.messages("no.mp4")):
            await asyncio.create_task(refused(front, messages))
            assert await falls_to(held)
        await asyncio.create_task(refused(front, beside))
        # The video was right, and its frames are cached.
        cached = current_runtime().frontend.stats()["decoded_cache"]["num_bytes"]
        assert await falls_to((cached, *held[1:]))

    asyncio.run(ask())


def test_a_client_that_hangs_up_leaves_nothing_behind(front: Front) -> None:
    clip = make(front.files / "left.mp4", CLIPS + 1)

    async def ask() -> None:
        held = held_media()
        cache = CACHE_MB * MIB
        # While the clip is probed, and while it is decoded.
        for number, jobs in enumerate((1, 2, 1, 2)):
            variant(clip, front.files / "left-now.mp4", CLIPS + 2 + number)
            await asyncio.create_task(hang_up(front, "left-now.mp4", jobs))
            assert await falls_to((cache, *held[1:]))

    asyncio.run(ask())


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
    ask = partial(render, processor, prompt, cache=new_cache(family))
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
