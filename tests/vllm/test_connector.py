"""The connector delivers what stock vLLM's would, or better, in the same shape."""

from __future__ import annotations

import asyncio
import base64
import contextvars
import dataclasses
import gc
import json
import os
import shutil
import sys
import time
import weakref
from collections.abc import Iterator
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import vllm.models
from blake3 import blake3
from vllm.config import ModelConfig
from vllm.exceptions import VLLMUnprocessableEntityError, VLLMValidationError
from vllm.multimodal import MULTIMODAL_REGISTRY
from vllm.multimodal.hasher import MultiModalHasher
from vllm.multimodal.media import MediaConnector

from vllm_mm_ext.adapters.media.media_connector import (
    MMExtMediaConnector,
    server_plan,
)
from vllm_mm_ext.adapters.media.video_kwargs import (
    VideoOptionError,
    read_video_kwargs,
    sampling_for,
)
from vllm_mm_ext.adapters.processors.model_traits import read_traits
from vllm_mm_ext.adapters.runtime import attach_runtime, current_runtime, detach_runtime
from vllm_mm_ext.config.media_settings import SamplingConfig
from vllm_mm_ext.config.options import Reduction
from vllm_mm_ext.config.root import MMExtConfig
from vllm_mm_ext.media.fetch.fetcher import MediaRef
from vllm_mm_ext.media.traits import ModelTraits
from vllm_mm_ext.media.types import SamplingSpec, SizeRule
from vllm_mm_ext.media.video_plan import VideoPlan
from vllm_mm_ext.plugin import register
from vllm_mm_ext.request.context import RequestContext, enter_request
from vllm_mm_ext.request.media_items import MediaItem
from vllm_mm_ext.testing.checkpoints import checkpoint
from vllm_mm_ext.testing.media import make_audio, make_clip
from vllm_mm_ext.testing.origin import Origin, Resource

PROCESSORS = (None, "Qwen2VLVideoProcessor", "Qwen3VLVideoProcessor")


@pytest.fixture(scope="module")
def clips(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("connector")
    make_clip(folder / "h264.mp4", duration=5, bframes=2, gop=30, seed=1)
    make_clip(folder / "mpeg4.avi", duration=5, codec="mpeg4", fps=25, seed=2)
    make_clip(folder / "vfr.mp4", duration=5, vfr=True, seed=3)
    make_audio(folder / "tone.wav", duration=1.5, sample_rate=22_050)
    return {path.stem: path for path in folder.iterdir()}


def attach(media: dict[str, Any], traits: ModelTraits | None = None) -> None:
    config = MMExtConfig.from_additional_config(
        {"mm_ext": {"media": {"decode": {"workers": 1}, **media}}}
    )
    attach_runtime(config, traits or ModelTraits())


@pytest.fixture(autouse=True)
def detached() -> Iterator[None]:
    yield
    detach_runtime()


def connectors(folder: Path, **kwargs: Any) -> tuple[MediaConnector, MMExtMediaConnector]:
    options = {"allowed_local_media_path": str(folder), **kwargs}
    return MediaConnector(**options), MMExtMediaConnector(**options)


@pytest.mark.parametrize("processor", PROCESSORS)
@pytest.mark.parametrize("name", ["h264", "mpeg4"])
def test_policy_stock_at_native_size_delivers_stocks_pixels_and_metadata(
    clips: dict[str, Path], name: str, processor: str | None
) -> None:
    attach({"sampling": {"policy": "stock"}, "resize": "native"})
    stock, ours = connectors(clips[name].parent)
    expected, described = stock.fetch_video(clips[name].as_uri(), video_processor=processor).media
    frames, metadata = ours.fetch_video(clips[name].as_uri(), video_processor=processor).media
    assert np.array_equal(frames, expected)
    assert metadata == described


def test_policy_stock_takes_more_frames_than_the_plugins_own_policies_may(
    clips: dict[str, Path],
) -> None:
    attach({"sampling": {"policy": "stock", "max_frames": 4}, "resize": "native"})
    stock, ours = connectors(clips["h264"].parent)
    options = {"video_processor": "Qwen2VLVideoProcessor"}
    expected, _ = stock.fetch_video(clips["h264"].as_uri(), **options).media
    frames, _ = ours.fetch_video(clips["h264"].as_uri(), **options).media
    assert len(expected) > 4
    assert np.array_equal(frames, expected)


async def test_asynchronous_and_synchronous_fetches_are_the_same_media(
    clips: dict[str, Path],
) -> None:
    attach({})
    _, ours = connectors(clips["h264"].parent)
    url = clips["h264"].as_uri()
    first = await ours.fetch_video_async(url)
    second = await ours.fetch_video_async(url, video_processor="Qwen2VLVideoProcessor")
    assert first.original_bytes == second.original_bytes
    assert first.media[0] is second.media[0]


def test_metadata_has_exactly_the_keys_models_accept(clips: dict[str, Path]) -> None:
    attach({"sampling": {"policy": "adaptive"}})
    stock, ours = connectors(clips["h264"].parent)
    expected = stock.fetch_video(clips["h264"].as_uri()).media[1]
    assert ours.fetch_video(clips["h264"].as_uri()).media[1].keys() == expected.keys()


def test_index_over_fps_is_the_exact_time_for_a_variable_frame_rate(
    clips: dict[str, Path],
) -> None:
    attach({})
    _, ours = connectors(clips["vfr"].parent)
    frames, metadata = ours.fetch_video(clips["vfr"].as_uri()).media
    times = np.asarray(metadata["frames_indices"]) / metadata["fps"]
    assert np.allclose(times, frames.times, atol=1e-3)
    assert metadata["frames_indices"][-1] < metadata["total_num_frames"]


def test_frames_arrive_at_the_size_the_model_asks_for(clips: dict[str, Path]) -> None:
    attach({}, ModelTraits(size_rule=SizeRule(kind="fixed", height=84, width=112)))
    _, ours = connectors(clips["h264"].parent)
    assert ours.fetch_video(clips["h264"].as_uri()).media[0].shape[1:] == (84, 112, 3)


@pytest.fixture
def dots3_note(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Dots3Note's processor, on the tokenizer of another family."""
    # The package itself imports the model, which needs a GPU.
    package = ModuleType("vllm.models.dots3_note")
    package.__path__ = [str(Path(vllm.models.__path__[0]) / "dots3_note")]
    monkeypatch.setitem(sys.modules, package.__name__, package)
    note = import_module(f"{package.__name__}.common.processor")
    folder = tmp_path / "note"
    shutil.copytree(checkpoint("qwen2_5_vl"), folder)
    vision = {"min_pixels": 784, "max_pixels": 78400, "patch_size": 14, "temporal_patch_size": 1}
    vision |= {"merge_size": 2, "image_mean": [0.5] * 3, "image_std": [0.5] * 3}
    config = ModelConfig(str(folder))
    (folder / "preprocessor_config.json").write_text(json.dumps({"vision_config": vision}))
    info = note.Dots3NoteProcessingInfo(MULTIMODAL_REGISTRY._create_processing_ctx(config))
    return note.Dots3NoteMultiModalProcessor(info, note.Dots3NoteDummyInputsBuilder(info))


def test_a_processor_that_decodes_videos_itself_gets_the_file(
    clips: dict[str, Path], dots3_note: Any
) -> None:
    attach({}, read_traits(dots3_note))
    _, ours = connectors(clips["h264"].parent)
    video = ours.fetch_video(clips["h264"].as_uri())
    items = dots3_note.info.parse_mm_data({"video": [video]})
    given = dots3_note._get_hf_mm_inputs(items, {}).hf_data["videos"]
    assert given == [clips["h264"].read_bytes()]


def test_vllms_hasher_reads_no_frames_and_tells_plans_apart(clips: dict[str, Path]) -> None:
    attach({})
    _, ours = connectors(clips["h264"].parent)
    _, fewer = connectors(
        clips["h264"].parent, media_io_kwargs={"video": {"num_frames": 2, "min_frames": 1}}
    )
    url = clips["h264"].as_uri()
    hashes = set()
    for connector in (ours, fewer):
        item = connector.fetch_video(url)
        fed = b"".join(bytes(part) for part in MultiModalHasher.serialize_item(item.original_bytes))
        assert len(fed) < 200
        hashes.add(MultiModalHasher.hash_kwargs("blake3", video=item.original_bytes))
    assert len(hashes) == 2


def test_a_waveform_is_hashed_by_its_digest(clips: dict[str, Path]) -> None:
    register()
    attach({})
    _, ours = connectors(clips["tone"].parent)
    waveform, rate = ours.fetch_audio(clips["tone"].as_uri())
    assert (rate, len(waveform)) == (16_000, 24_000)
    by_digest = MultiModalHasher.hash_kwargs("blake3", audio=waveform)
    by_samples = MultiModalHasher.hash_kwargs("blake3", audio=np.array(waveform))
    again, _ = ours.fetch_audio(clips["tone"].as_uri())
    assert by_digest != by_samples
    assert by_digest == MultiModalHasher.hash_kwargs("blake3", audio=again)


def test_a_loader_the_operator_chose_stays_in_charge(clips: dict[str, Path]) -> None:
    attach({})
    options = {"media_io_kwargs": {"video": {"video_backend": "opencv", "num_frames": 3}}}
    stock, ours = connectors(clips["h264"].parent, **options)
    expected, described = stock.fetch_video(clips["h264"].as_uri()).media
    frames, metadata = ours.fetch_video(clips["h264"].as_uri()).media
    assert np.array_equal(frames, expected)
    assert metadata == described


def test_switched_off_it_is_stock(clips: dict[str, Path]) -> None:
    attach({"enabled": False})
    stock, ours = connectors(clips["h264"].parent)
    url = clips["h264"].as_uri()
    assert ours.fetch_video(url).media[1] == stock.fetch_video(url).media[1]
    assert ours.fetch_audio(clips["tone"].as_uri())[1] == 22_050


@pytest.mark.parametrize("by", ["file", "data", "http"])
async def test_a_sound_that_vllm_reads_by_itself_is_known_by_its_digest(
    clips: dict[str, Path], by: str
) -> None:
    attach({"enabled": False})
    _, ours = connectors(clips["tone"].parent)
    encoded = clips["tone"].read_bytes()
    context = enter_request(RequestContext())
    context.trace.watched = True
    with Origin() as origin:
        url = {
            "file": clips["tone"].as_uri(),
            "data": "data:audio/wav;base64," + base64.b64encode(encoded).decode(),
            "http": origin.serve("/tone.wav", Resource(encoded)),
        }[by]
        _, rate = await ours.fetch_audio_async(url)
        assert rate == 22_050
        await asyncio.to_thread(ours.fetch_audio, url)
    digests = [item.known_digest for item in context.items]
    assert digests == [blake3(encoded).hexdigest()] * 2


async def test_a_sound_file_that_is_too_large_for_vllm_is_refused_before_it_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VLLM_MAX_AUDIO_CLIP_FILESIZE_MB", "1")
    attach({"enabled": False})
    _, ours = connectors(tmp_path)
    path = tmp_path / "large.wav"
    path.write_bytes(bytes((1 << 20) + 1))
    context = enter_request(RequestContext())
    context.trace.watched = True
    with pytest.raises(VLLMValidationError, match="Maximum file size exceeded"):
        await ours.fetch_audio_async(path.as_uri())
    assert [item.known_digest for item in context.items] == [""]


async def test_a_sound_file_that_is_cut_short_while_it_is_read_ends_no_server(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    attach({"enabled": False})
    _, ours = connectors(tmp_path)
    path = tmp_path / "cut.wav"
    path.write_bytes(bytes(8 << 20))
    read, ends = os.read, []

    def read_and_cut(fd: int, size: int) -> bytes:
        chunk = read(fd, size)
        if os.readlink(f"/proc/self/fd/{fd}") == str(path):
            os.truncate(path, 1 << 10)
            ends.append(len(chunk))
        return chunk

    monkeypatch.setattr(os, "read", read_and_cut)
    context = enter_request(RequestContext())
    context.trace.watched = True
    # What is left is no sound.
    with pytest.raises(ValueError, match="audio"):
        await ours.fetch_audio_async(path.as_uri())
    assert ends == [1 << 20, 0]


def test_stock_vllm_can_select_the_plugins_sampling_as_a_video_loader(
    clips: dict[str, Path],
) -> None:
    register()
    attach({"sampling": {"policy": "adaptive"}})
    stock, ours = connectors(
        clips["h264"].parent, media_io_kwargs={"video": {"video_backend": "mm_ext"}}
    )
    by_loader, described = stock.fetch_video(clips["h264"].as_uri()).media
    by_connector, metadata = ours.fetch_video(clips["h264"].as_uri()).media
    assert np.array_equal(by_loader, by_connector)
    assert described["frames_indices"] == metadata["frames_indices"]


@pytest.mark.parametrize(
    ("kwargs", "word"),
    [
        ({"fps": 1e9}, "fps"),
        ({"fps": 0}, "fps"),
        ({"fps": "fast"}, "fps"),
        ({"fps": True}, "fps"),
        ({"max_frames": 0.5}, "max_frames"),
        ({"min_frames": 2.5}, "min_frames"),
        ({"num_frames": 0.1}, "num_frames"),
        ({"num_frames": True}, "num_frames"),
        ({"num_frames": -1.5}, "num_frames"),
        ({"max_frames": float("inf")}, "max_frames"),
        ({"num_frames": 1 << 40}, "num_frames"),
        ({"max_frames": -3}, "max_frames"),
        ({"min_frames": float("nan")}, "min_frames"),
    ],
)
def test_absurd_video_options_are_refused_by_name(kwargs: dict[str, Any], word: str) -> None:
    with pytest.raises(VideoOptionError, match=word):
        read_video_kwargs(kwargs)


def test_video_options_override_the_configuration() -> None:
    changed = sampling_for(SamplingConfig(), read_video_kwargs({"fps": 2, "num_frames": 3}))
    assert (changed.fps, changed.max_frames, changed.min_frames) == (2.0, 3, 3)
    assert sampling_for(SamplingConfig(), read_video_kwargs({"fps": -1})) == SamplingConfig()
    every = sampling_for(SamplingConfig(), read_video_kwargs({"fps": -1, "num_frames": -1}))
    assert every.min_frames == every.max_frames == 4096


PLAN = VideoPlan(
    SamplingSpec(fps=2.0, max_frames=6, min_frames=1), SizeRule(), reduction=Reduction(pool=2)
)


def planned(*plans: tuple[str, VideoPlan], content: MediaRef | None = None) -> RequestContext:
    """A request with these videos, in the order of its messages, as the current one."""
    context = enter_request(RequestContext())
    context.add([MediaItem("video", url, plan, content) for url, plan in plans])
    return context


async def test_a_request_gets_what_it_planned_and_another_the_servers_defaults(
    clips: dict[str, Path],
) -> None:
    attach({"sampling": {"max_frames": 4}})
    _, ours = connectors(clips["h264"].parent)
    url = clips["h264"].as_uri()

    async def request(*plans: tuple[str, VideoPlan]) -> Any:
        planned(*plans)
        # As vLLM does it: one task for each item.
        item = await asyncio.gather(ours.fetch_video_async(url))
        return item[0].media[0]

    with_plan, default = await asyncio.gather(request((url, PLAN)), request())
    assert (len(with_plan), with_plan.reduction) == (6, Reduction(pool=2))
    assert (len(default), default.reduction) == (4, Reduction())


def test_a_plan_replaces_stocks_choice_and_a_plan_with_it_keeps_stocks_metadata(
    clips: dict[str, Path],
) -> None:
    attach({"sampling": {"policy": "stock"}, "resize": "native"})
    stock, ours = connectors(clips["h264"].parent)
    url = clips["h264"].as_uri()
    described = stock.fetch_video(url).media[1]

    def fetch(plan: VideoPlan) -> Any:
        planned((url, plan))
        return ours.fetch_video(url).media

    frames, metadata = contextvars.copy_context().run(fetch, PLAN)
    assert (len(frames), metadata["video_backend"][:7]) == (6, "mm_ext:")
    plan = server_plan(current_runtime(), {}, url, None)
    assert plan is not None
    frames, metadata = contextvars.copy_context().run(
        fetch, dataclasses.replace(plan, reduction=Reduction(pool=2))
    )
    assert metadata == described
    assert frames.reduction == Reduction(pool=2)


def test_the_servers_resolution_holds_for_a_request_with_a_size_of_its_own(
    clips: dict[str, Path],
) -> None:
    attach({"sampling": {"resolution": 112}})
    asked = SizeRule("qwen_vl", factor=28, min_pixels=28**2, max_pixels=448**2)
    plan = server_plan(current_runtime(), {}, clips["h264"].as_uri(), None, asked)
    assert plan is not None
    assert plan.size == dataclasses.replace(asked, max_frame_pixels=112**2)


def test_what_planning_resolved_is_not_fetched_again(clips: dict[str, Path]) -> None:
    attach({})
    with Origin() as origin:
        url = origin.serve_file(clips["h264"], cache_control="no-store")
        _, ours = connectors(clips["h264"].parent)
        runtime = current_runtime()
        fetcher = ours.fetcher(runtime)

        def plan_and_fetch() -> int:
            ref = runtime.run_blocking(fetcher.resolve(url, timeout_s=5))
            info = runtime.run_blocking(runtime.frontend.probe(ref))
            assert info.video is not None
            planned((url, PLAN), content=ref)
            return len(ours.fetch_video(url).media[0])

        assert contextvars.copy_context().run(plan_and_fetch) == 6
        assert origin.requests.total() == 1


class Planned:
    """A clip that planning resolved, from an origin whose content no cache may keep.

    Args:
        folder: What the connector may read.
        url: Of the clip.
        uses: How often the request shows it.
    """

    def __init__(self, folder: Path, url: str, uses: int = 1) -> None:
        _, self.connector = connectors(folder)
        runtime = current_runtime()
        fetcher = self.connector.fetcher(runtime)
        self.ref = runtime.run_blocking(fetcher.resolve(url, timeout_s=5))
        assert self.ref._blob is not None
        self.blob = weakref.ref(self.ref._blob)
        planned(*[(url, PLAN)] * uses, content=self.ref)

    async def bytes_are_held(self) -> bool:
        # Event loops may still be returning from the calls that used them.
        deadline = time.monotonic() + 5
        while self.blob() is not None and time.monotonic() < deadline:
            await asyncio.sleep(0.01)
            gc.collect()
        return self.blob() is not None


async def test_encoded_bytes_are_let_go_after_the_last_use_of_a_url(clips: dict[str, Path]) -> None:
    attach({})
    with Origin() as origin:
        url = origin.serve_file(clips["h264"], cache_control="no-store")
        clip = Planned(clips["h264"].parent, url, uses=3)
        items = await asyncio.gather(*(clip.connector.fetch_video_async(url) for _ in range(3)))
        assert [len(item.media[0]) for item in items] == [6, 6, 6]
        assert not await clip.bytes_are_held()
        assert origin.requests.total() == 1
        # Whoever asks after that gets them again.
        planned((url, PLAN), content=clip.ref)
        assert len((await clip.connector.fetch_video_async(url)).media[0]) == 6
        assert not await clip.bytes_are_held()
        assert origin.requests.total() == 2


def test_encoded_bytes_are_let_go_without_an_event_loop_too(clips: dict[str, Path]) -> None:
    attach({})
    with Origin() as origin:
        url = origin.serve_file(clips["h264"], cache_control="no-store")

        def request() -> bool:
            clip = Planned(clips["h264"].parent, url)
            clip.connector.fetch_video(url)
            return asyncio.run(clip.bytes_are_held())

        assert not contextvars.copy_context().run(request)


async def test_encoded_bytes_are_let_go_when_a_video_fails_or_its_client_leaves(
    clips: dict[str, Path],
) -> None:
    attach({})
    with Origin() as origin:
        headers = {"Cache-Control": "no-store"}
        url = origin.serve("/junk", Resource(b"no video at all" * 1000, headers=headers))
        clip = Planned(clips["h264"].parent, url)
        with pytest.raises(VLLMUnprocessableEntityError):
            await clip.connector.fetch_video_async(url)
        assert not await clip.bytes_are_held()

        url = origin.serve_file(clips["h264"], cache_control="no-store")
        clip = Planned(clips["h264"].parent, url)
        task = asyncio.create_task(clip.connector.fetch_video_async(url))
        await asyncio.sleep(0)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        assert clip.ref._blob is None


def test_the_servers_default_reduction_comes_with_frames_that_are_cut(
    clips: dict[str, Path],
) -> None:
    config = {"mm_ext": {"compression": {"reduction": {"pool": 2}}}}
    for cut, reduction in ((True, Reduction(pool=2)), (False, Reduction())):
        traits = ModelTraits(cuts_videos=cut)
        attach_runtime(MMExtConfig.from_additional_config(config), traits)
        _, ours = connectors(clips["h264"].parent)
        assert ours.fetch_video(clips["h264"].as_uri()).media[0].reduction == reduction


async def test_a_video_without_sound_is_answered_where_vllm_looks_for_its_sound(
    clips: dict[str, Path],
) -> None:
    attach({})
    _, ours = connectors(clips["h264"].parent)
    context = enter_request(RequestContext())
    asking: Any = SimpleNamespace(_connector=ours)
    # Where vLLM 0.32 has it, and where 0.33 does.
    places = ("generate.structured_decisions", "openai.decisions")
    modules = (f"vllm.entrypoints.{place}.strategies" for place in places)
    strategies = import_module(next(name for name in modules if find_spec(name)))
    sound = await strategies.JointSchemaStrategy._soundtrack(asking, clips["h264"].as_uri())
    assert sound is None
    assert context.items[0].known_digest
    with pytest.raises(VLLMUnprocessableEntityError, match="no audio"):
        await ours.fetch_audio_async(clips["h264"].as_uri())
    missing = (clips["h264"].parent / "missing.mp4").as_uri()
    with pytest.raises(VLLMUnprocessableEntityError, match="does not exist"):
        await strategies.JointSchemaStrategy._soundtrack(asking, missing)
