"""The front-end makes each sampled video once, and never mistakes one for another."""

import asyncio
import os
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest

from tests.support.transport_streams import copied
from vllm_mm_ext.adapters.runtime import Runtime
from vllm_mm_ext.config.options import Reduction
from vllm_mm_ext.config.root import MMExtConfig
from vllm_mm_ext.errors import MediaTooLongError, NoSuchStreamError, OriginError
from vllm_mm_ext.media.fetch.blob import Blob
from vllm_mm_ext.media.fetch.byte_gate import Claim
from vllm_mm_ext.media.fetch.fetcher import MediaFetcher, MediaRef
from vllm_mm_ext.media.fetch.file_source import _RACY_NS
from vllm_mm_ext.media.fetch.source import Fetched
from vllm_mm_ext.media.frontend import VideoResult
from vllm_mm_ext.media.traits import ModelTraits
from vllm_mm_ext.media.types import SamplingSpec, SizeRule
from vllm_mm_ext.media.use_media import use_media
from vllm_mm_ext.media.video_plan import VideoPlan
from vllm_mm_ext.testing.media import Tone, make_audio, make_clip
from vllm_mm_ext.testing.origin import Origin

PLAN = VideoPlan(SamplingSpec(max_frames=8), SizeRule(kind="fixed", height=56, width=84))


@pytest.fixture(scope="module")
def clips(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("clips")
    make_clip(folder / "a.mp4", duration=4, audio=[Tone(440.0, 0.0, 4.0)], seed=1)
    make_clip(folder / "b.mp4", duration=4, seed=2)
    make_audio(folder / "tone.wav", duration=1.0, sample_rate=44_100)
    # A file is known by its identity only once it has been left alone for longer than the
    # granularity of its time stamps.
    time.sleep(_RACY_NS / 1e9 + 0.1)
    return {path.stem: path for path in folder.iterdir()}


@pytest.fixture
def runtime() -> Iterator[Runtime]:
    config = MMExtConfig.from_additional_config({"mm_ext": {"media": {"decode": {"workers": 1}}}})
    made = Runtime(config, ModelTraits(hears_video=True))
    yield made
    made.close()


async def resolve(runtime: Runtime, path: Path) -> MediaRef:
    fetcher: MediaFetcher = runtime.fetcher(path.parent, ())
    return await fetcher.resolve(path.as_uri(), timeout_s=5)


def jobs(runtime: Runtime) -> int:
    count: int = runtime.stats()["decode"]["jobs"]
    return count


async def test_a_follow_up_is_neither_read_nor_decoded(
    runtime: Runtime, clips: dict[str, Path]
) -> None:
    ref = await resolve(runtime, clips["a"])
    first = await runtime.frontend.video(ref, PLAN)
    after = jobs(runtime)
    again = await resolve(runtime, clips["a"])
    assert again._blob is None, "the file was read again"
    second = await runtime.frontend.video(again, PLAN)
    assert jobs(runtime) == after
    assert second.frames is first.frames
    assert (first.cached, second.cached) == (False, True)


async def test_concurrent_requests_for_one_video_decode_once(
    runtime: Runtime, clips: dict[str, Path]
) -> None:
    async def one() -> Any:
        return await runtime.frontend.video(await resolve(runtime, clips["a"]), PLAN)

    results = await asyncio.gather(*(one() for _ in range(64)))
    assert jobs(runtime) == 2  # A probe and a decode.
    assert len({id(result.frames) for result in results}) == 1


async def test_a_changed_file_is_seen(
    runtime: Runtime, clips: dict[str, Path], tmp_path: Path
) -> None:
    path = tmp_path / "clip.mp4"
    path.write_bytes(clips["a"].read_bytes())
    first = await runtime.frontend.video(await resolve(runtime, path), PLAN)
    path.write_bytes(clips["b"].read_bytes())
    os.utime(path)
    second = await runtime.frontend.video(await resolve(runtime, path), PLAN)
    assert first.frames.digest != second.frames.digest
    assert not np.array_equal(first.frames, second.frames)


@pytest.mark.parametrize(
    "other",
    [
        replace(PLAN, sampling=SamplingSpec(max_frames=7)),
        replace(PLAN, sampling=SamplingSpec(max_frames=8, policy="keyframe")),
        replace(PLAN, size=SizeRule(kind="fixed", height=56, width=56)),
        replace(PLAN, size=SizeRule()),
        replace(PLAN, audio=True),
        replace(PLAN, chooser_name="stock"),
        replace(PLAN, reduction=Reduction(pool=2)),
    ],
    ids=["frames", "policy", "size", "native", "sound", "stock choice", "reduction"],
)
async def test_another_plan_never_shares_a_digest(
    runtime: Runtime, clips: dict[str, Path], other: VideoPlan
) -> None:
    ref = await resolve(runtime, clips["a"])
    first = await runtime.frontend.video(ref, PLAN)
    second = await runtime.frontend.video(ref, other)
    assert first.frames.digest != second.frames.digest
    assert PLAN.key() != other.key()


async def test_how_pictures_are_shown_decides_the_digest(clips: dict[str, Path]) -> None:
    digests = set()
    for picture in ({}, {"background": "#00ff00"}, {"pixel_aspect": "keep"}):
        media = {"decode": {"workers": 1}, "picture": picture}
        config = MMExtConfig.from_additional_config({"mm_ext": {"media": media}})
        made = Runtime(config, ModelTraits())
        try:
            result = await made.frontend.video(await resolve(made, clips["b"]), PLAN)
        finally:
            made.close()
        digests.add(result.frames.digest)
    assert len(digests) == 3


async def test_sound_comes_with_the_frames_of_one_fetch(
    runtime: Runtime, clips: dict[str, Path]
) -> None:
    plan = replace(PLAN, audio=True)
    result = await runtime.frontend.video(await resolve(runtime, clips["a"]), plan)
    waveform = result.frames.audio
    assert waveform is not None
    assert waveform.rate == 16_000
    assert abs(len(waveform) / 16_000 - 4.0) < 0.1
    spectrum = np.abs(np.fft.rfft(np.asarray(waveform)))
    assert abs(np.argmax(spectrum) * 16_000 / len(waveform) - 440) < 2
    assert jobs(runtime) == 2  # A probe and a decode.


async def test_a_silent_video_has_no_sound_and_is_no_error(
    runtime: Runtime, clips: dict[str, Path]
) -> None:
    plan = replace(PLAN, audio=True)
    result = await runtime.frontend.video(await resolve(runtime, clips["b"]), plan)
    assert result.frames.audio is None


async def test_sound_past_the_limit_is_cut_and_noted_also_from_the_cache(
    runtime: Runtime, clips: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    frontend = runtime.frontend
    monkeypatch.setattr(frontend, "limits", replace(frontend.limits, max_audio_s=1.5))
    for _ in range(2):
        plan = replace(PLAN, audio=True, audio_stream=0)
        result = await frontend.video(await resolve(runtime, clips["a"]), plan)
        assert result.frames.audio is not None
        assert (len(result.frames.audio), result.audio_note) == (24_000, "cut")
    assert plan.key() != replace(plan, audio_stream=None).key()
    with pytest.raises(NoSuchStreamError, match="no audio stream 1"):
        await frontend.video(await resolve(runtime, clips["a"]), replace(plan, audio_stream=1))


async def test_audio_is_resampled_to_the_models_rate(
    runtime: Runtime, clips: dict[str, Path]
) -> None:
    result = await runtime.frontend.audio(await resolve(runtime, clips["tone"]))
    assert result.waveform.rate == 16_000
    assert len(result.waveform) == 16_000


async def test_media_without_the_stream_asked_for_is_a_client_error(
    runtime: Runtime, clips: dict[str, Path]
) -> None:
    with pytest.raises(NoSuchStreamError):
        await runtime.frontend.video(await resolve(runtime, clips["tone"]), PLAN)
    with pytest.raises(NoSuchStreamError):
        await runtime.frontend.audio(await resolve(runtime, clips["b"]))


async def test_what_an_origin_forbids_to_store_is_not_remembered(
    runtime: Runtime, clips: dict[str, Path]
) -> None:
    with Origin() as origin:
        url = origin.serve_file(clips["a"], cache_control="no-store")
        fetcher = runtime.fetcher(None, ())
        for _ in range(2):
            ref = await fetcher.resolve(url, timeout_s=5)
            result = await runtime.frontend.video(ref, PLAN)
            assert not result.cached
    assert runtime.stats()["decoded_cache"]["entries"] == 0


async def test_reductions_share_one_decode_and_one_memo(
    runtime: Runtime, clips: dict[str, Path]
) -> None:
    ref = await resolve(runtime, clips["a"])
    plans = [PLAN, *(replace(PLAN, reduction=Reduction(pool=n)) for n in (2, 3))]
    first = [await runtime.frontend.video(ref, plan) for plan in plans]
    second = [await runtime.frontend.video(ref, plan) for plan in plans]
    assert jobs(runtime) == 2  # A probe and a decode.
    assert len({result.frames.digest for result in first}) == 3
    for before, after, plan in zip(first, second, plans, strict=True):
        assert after.frames.digest == before.frames.digest
        assert np.shares_memory(after.frames, before.frames)
        assert after.frames.memo is before.frames.memo is first[0].frames.memo
        assert after.frames.reduction == plan.reduction


async def test_frames_say_their_step_and_that_they_have_their_final_size(
    runtime: Runtime, clips: dict[str, Path]
) -> None:
    ref = await resolve(runtime, clips["a"])
    sized = (await runtime.frontend.video(ref, PLAN)).frames
    assert (sized.step, sized.pinned) == (1.0, True)
    assert sized.times == (0.0, 1.0, 2.0, 3.0)
    budget = replace(PLAN, sampling=SamplingSpec(max_frames=3, min_frames=1), size=SizeRule())
    spread = (await runtime.frontend.video(ref, budget)).frames
    assert (spread.step, spread.pinned) == (None, False)


async def test_a_cap_on_pixels_reaches_the_decoder(
    runtime: Runtime, clips: dict[str, Path]
) -> None:
    ref = await resolve(runtime, clips["a"])
    rule = SizeRule("qwen_vl", factor=28, min_pixels=784, max_pixels=10**6)
    for size, pinned in (
        (replace(rule, max_frame_pixels=112 * 112), True),
        (SizeRule(max_frame_pixels=112 * 112), False),
    ):
        frames = (await runtime.frontend.video(ref, replace(PLAN, size=size))).frames
        assert 0 < frames.shape[1] * frames.shape[2] <= 112 * 112
        assert frames.pinned == pinned


async def test_a_probe_reads_the_container_once_and_decodes_nothing(
    runtime: Runtime, clips: dict[str, Path]
) -> None:
    ref = await resolve(runtime, clips["a"])
    infos = await asyncio.gather(*(runtime.frontend.probe(ref) for _ in range(16)))
    assert jobs(runtime) == 1
    assert {info.video.num_frames for info in infos if info.video} == {120}
    assert infos[0].packets is None
    assert len(runtime.frontend.cache) == 0
    result = await runtime.frontend.video(ref, PLAN)
    assert result.info == infos[0]


async def test_streams_of_one_file_are_different_videos(runtime: Runtime, tmp_path: Path) -> None:
    path = tmp_path / "two.mkv"
    sizes = ((64, 48), (96, 48))
    with av.open(str(path), "w") as container:
        streams: list[Any] = [container.add_stream("mpeg4", rate=10) for _ in sizes]
        for stream, (width, height) in zip(streams, sizes, strict=True):
            stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        for stream, (width, height) in zip(streams, sizes, strict=True):
            for _ in range(10):
                picture = np.zeros((height, width, 3), np.uint8)
                container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
            container.mux(stream.encode())
    ref = await resolve(runtime, path)
    digests, plan = set(), replace(PLAN, size=SizeRule())
    for number, width in ((None, 96), (0, 64), (1, 96), (0, 64)):
        assert (await runtime.frontend.probe(ref, number)).video.width == width  # type: ignore[union-attr]
        chosen = replace(plan, sampling=replace(plan.sampling, video_stream=number))
        result = await runtime.frontend.video(ref, chosen)
        assert result.frames.shape[2] == width
        digests.add(result.frames.digest)
    assert len(digests) == 3
    with pytest.raises(NoSuchStreamError, match="no video stream 2"):
        await runtime.frontend.probe(ref, 2)


async def test_sound_is_heard_whatever_the_pictures_beside_it_are(tmp_path: Path) -> None:
    """An empty video track, and a video past the limits."""
    tone = [Tone(440.0, 0.0, 9.0)]
    film = make_clip(tmp_path / "film.webm", codec="libvpx", duration=2, audio=tone).path
    empty = copied(film, tmp_path / "empty.webm", wanted=lambda kind, _: kind == "audio")
    media = {"decode": {"workers": 1, "max_duration_s": 1.0}}
    config = MMExtConfig.from_additional_config({"mm_ext": {"media": media}})
    runtime = Runtime(config, ModelTraits(hears_video=True))
    try:
        for path, error in ((film, MediaTooLongError), (empty, NoSuchStreamError)):
            ref = await resolve(runtime, path)
            result = await runtime.frontend.audio(ref)
            assert result.waveform.rate is not None
            assert len(result.waveform) == pytest.approx(2 * result.waveform.rate, rel=0.05)
            with pytest.raises(error):
                await runtime.frontend.video(ref, PLAN)
    finally:
        runtime.close()


async def test_a_decoded_video_needs_no_probe(runtime: Runtime, clips: dict[str, Path]) -> None:
    ref = await resolve(runtime, clips["b"])
    result = await runtime.frontend.video(ref, PLAN)
    assert await runtime.frontend.probe(ref) is result.info
    assert jobs(runtime) == 2  # A probe and a decode.


async def test_stocks_choice_of_a_file_without_video_is_a_client_error(
    runtime: Runtime, clips: dict[str, Path]
) -> None:
    plan = replace(PLAN, chooser_name="first", chooser=lambda _: [0])
    with pytest.raises(NoSuchStreamError):
        await runtime.frontend.video(await resolve(runtime, clips["tone"]), plan)


async def test_media_that_changes_before_it_is_used_is_used_as_it_is_then(
    runtime: Runtime, clips: dict[str, Path], tmp_path: Path
) -> None:
    path = tmp_path / "changing.mp4"
    path.write_bytes(clips["a"].read_bytes())
    fetcher = runtime.fetcher(tmp_path, ())
    runtime._encoded.max_bytes = 0
    tried = []

    async def use(content: MediaRef) -> VideoResult:
        tried.append(content.digest)
        if len(tried) == 1:
            content._blob = None  # As when the file was known already.
            path.write_bytes(clips["b"].read_bytes())
        return await runtime.frontend.video(content, PLAN)

    claim = runtime.budget.claim()
    used = await use_media(fetcher, path.as_uri(), use, claim=claim, timeout_s=5)
    assert len(tried) == 2
    assert used.content.digest == tried[1] != tried[0]
    expected = await runtime.frontend.video(await resolve(runtime, clips["b"]), PLAN)
    assert used.result.frames.digest == expected.frames.digest


async def test_a_file_that_changes_while_it_waits_to_be_read_is_used_as_it_is_then(
    runtime: Runtime, clips: dict[str, Path], tmp_path: Path
) -> None:
    path = tmp_path / "changing.mp4"
    path.write_bytes(clips["a"].read_bytes())
    waits = path.stat().st_size
    runtime.budget.max_bytes = waits
    older = runtime.budget.claim()
    held = await older.acquire(1)

    async def use(content: MediaRef) -> str:
        return content.digest

    claim = runtime.budget.claim()
    fetcher = runtime.fetcher(tmp_path, ())
    used = asyncio.create_task(use_media(fetcher, path.as_uri(), use, claim=claim, timeout_s=5))
    while not runtime.budget.stats()["waiting"]:
        await asyncio.sleep(0.001)
    path.write_bytes(clips["b"].read_bytes())
    runtime.budget.max_bytes = 1 << 30
    older.end()
    held.release()
    assert (await used).result == (await resolve(runtime, clips["b"])).digest


@pytest.mark.parametrize("asked", ["video", "audio", "probe"])
async def test_one_requests_origin_never_fails_or_stalls_another_with_the_same_content(
    runtime: Runtime, clips: dict[str, Path], asked: str
) -> None:
    blob = Blob.from_bytes(clips["a"].read_bytes())
    asks, gives_up = asyncio.Event(), asyncio.Event()

    async def load(_: Claim) -> Blob:
        asks.set()
        await gives_up.wait()
        raise OriginError("bad.example answered HTTP 500.")

    known = Fetched(blob.digest, blob.size, None)
    bad = MediaRef(known, load, runtime.budget.claim())
    good = MediaRef(Fetched.of(blob), load, runtime.budget.claim())
    args = (PLAN,) if asked == "video" else ()
    first = asyncio.create_task(getattr(runtime.frontend, asked)(bad, *args))
    await asks.wait()
    async with asyncio.timeout(30):
        await getattr(runtime.frontend, asked)(good, *args)
    gives_up.set()
    with pytest.raises(OriginError, match=r"bad\.example"):
        await first


async def test_what_was_decoded_while_a_request_read_its_bytes_is_not_decoded_again(
    runtime: Runtime, clips: dict[str, Path]
) -> None:
    blob = Blob.from_bytes(clips["b"].read_bytes())

    async def load(claim: Claim) -> Blob:
        await runtime.frontend.video(MediaRef(Fetched.of(blob), load, claim), PLAN)
        return blob

    slow = MediaRef(Fetched(blob.digest, blob.size, None), load, runtime.budget.claim())
    assert (await runtime.frontend.video(slow, PLAN)).cached
    assert jobs(runtime) == 2  # A probe and a decode.
