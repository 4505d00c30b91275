"""What a window shows is known by its content, whatever the file around it, and is kept in mind."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from vllm_mm_ext.adapters.runtime import Runtime
from vllm_mm_ext.config.options import Reduction
from vllm_mm_ext.config.root import MMExtConfig
from vllm_mm_ext.media.fetch.fetcher import MediaFetcher, MediaRef
from vllm_mm_ext.media.fetch.file_source import _RACY_NS
from vllm_mm_ext.media.traits import ModelTraits
from vllm_mm_ext.media.types import SamplingSpec, SizeRule
from vllm_mm_ext.media.video_plan import VideoPlan
from vllm_mm_ext.testing.media import Tone, make_clip
from vllm_mm_ext.testing.remux import keep_first

SECONDS, SHORTER_S = 14.0, 10.5
SWEEP = [Tone(200.0 + 60 * k, 0.4 * k, 0.4 * k + 0.3) for k in range(35)]
FORMATS = ("mp4", "mkv", "ts")


@pytest.fixture(scope="module")
def clips(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("clips")
    for name in FORMATS:
        grown = folder / f"grown.{name}"
        make_clip(grown, fps=25, duration=SECONDS, gop=60, bframes=2, audio=SWEEP)
        keep_first(grown, folder / f"before.{name}", seconds=SHORTER_S)
    time.sleep(_RACY_NS / 1e9 + 0.1)
    return folder


@pytest.fixture
def runtime() -> Iterator[Runtime]:
    config = MMExtConfig.from_additional_config({"mm_ext": {"media": {"decode": {"workers": 1}}}})
    made = Runtime(config, ModelTraits(hears_video=True, audio_rate=16_000))
    yield made
    made.close()


async def resolve(runtime: Runtime, path: Path) -> MediaRef:
    fetcher: MediaFetcher = runtime.fetcher(path.parent, ())
    return await fetcher.resolve(path.as_uri(), timeout_s=5)


def plan(start: float, policy: str = "uniform", seconds: float = 4.0) -> VideoPlan:
    spec = SamplingSpec(policy, fps=4.0, max_frames=64, span=(start, start + seconds))  # type: ignore[arg-type]
    return VideoPlan(spec, SizeRule(kind="fixed", height=56, width=84), audio=True)


def decodes(runtime: Runtime) -> int:
    count: int = runtime.stats()["decode"]["jobs"]
    return count


@pytest.mark.parametrize("policy", ["uniform", "adaptive"])
@pytest.mark.parametrize("name", FORMATS)
async def test_a_recording_that_has_grown_has_the_same_windows_before(
    runtime: Runtime, clips: Path, name: str, policy: str
) -> None:
    before = await resolve(runtime, clips / f"before.{name}")
    grown = await resolve(runtime, clips / f"grown.{name}")
    assert before.digest != grown.digest
    for start in (0.0, 3.0, 6.0):
        one = await runtime.frontend.video(before, plan(start, policy))
        other = await runtime.frontend.video(grown, plan(start, policy))
        np.testing.assert_array_equal(one.frames, other.frames)
        assert one.frames.times == other.frames.times
        assert one.frames.audio is not None
        assert other.frames.audio is not None
        np.testing.assert_array_equal(one.frames.audio, other.frames.audio)
        assert one.frames.digest == other.frames.digest
        assert one.frames.audio.digest == other.frames.audio.digest


async def test_windows_that_show_other_things_have_other_keys(
    runtime: Runtime, clips: Path
) -> None:
    ref = await resolve(runtime, clips / "grown.mp4")
    first = plan(0.0)
    others = [
        plan(4.0),
        plan(0.04),
        plan(0.0, seconds=4.5),
        replace(first, audio=False),
        replace(first, sampling=replace(first.sampling, fps=2.0)),
        replace(first, reduction=Reduction(pool=2)),
    ]
    keys = [await runtime.frontend.window_key(ref, one) for one in (first, *others)]
    assert len(set(keys)) == len(keys)


async def test_a_key_is_known_without_decoding_after_the_frames_have_gone(
    runtime: Runtime, clips: Path
) -> None:
    ref = await resolve(runtime, clips / "grown.ts")
    wanted = replace(plan(3.0), reduction=Reduction(pool=2))
    shown = await runtime.frontend.video(ref, wanted)
    runtime.frontend.cache.clear()
    done = decodes(runtime)
    assert await runtime.frontend.window_key(ref, wanted) == shown.frames.digest
    assert decodes(runtime) == done


async def test_the_probe_of_a_file_stays_that_of_the_whole_file(
    runtime: Runtime, clips: Path
) -> None:
    ref = await resolve(runtime, clips / "grown.mkv")
    part = await runtime.frontend.video(ref, plan(3.0))
    whole = await runtime.frontend.probe(ref)
    assert part.info.duration == pytest.approx(4.0)
    assert whole.duration == pytest.approx(SECONDS, abs=0.1)
