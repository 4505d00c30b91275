"""NVDEC through FFmpeg's own GPU code, on a stand-in for the driver."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest

from vllm_mm_ext.adapters.runtime import Runtime
from vllm_mm_ext.config.root import MMExtConfig
from vllm_mm_ext.media.decode import worker_process
from vllm_mm_ext.media.decode.job import run_job
from vllm_mm_ext.media.decode.pool import DecodePool
from vllm_mm_ext.media.traits import ModelTraits
from vllm_mm_ext.media.types import (
    DecodeLimits,
    DecodeRequest,
    DecodeResult,
    SamplingSpec,
    SizeRule,
)
from vllm_mm_ext.media.video_plan import VideoPlan
from vllm_mm_ext.testing.media import make_clip

STUB = Path(__file__).parents[2] / "support" / "nvdec_stub.c"
KINDS = {
    "h264-bframes": {"name": "a.mp4", "codec": "libx264", "bframes": 3},
    "h264-open-gop-mkv": {"name": "a.mkv", "codec": "libx264", "bframes": 3, "open_gop": True},
    "h264-ts": {"name": "a.ts", "codec": "libx264", "bframes": 2},
    "hevc-open-gop": {"name": "a.mp4", "codec": "libx265", "bframes": 3, "open_gop": True},
    "vp9": {"name": "a.webm", "codec": "libvpx-vp9"},
    "av1": {"name": "a.mp4", "codec": "libsvtav1"},
}
# Far less than the address space that the stand-in reserves, as CUDA does.
LIMITS = DecodeLimits(memory_bytes=2 << 30)

pytestmark = pytest.mark.skipif(shutil.which("cc") is None, reason="no C compiler")


@pytest.fixture(scope="module")
def driver(tmp_path_factory) -> str:
    """A folder with the stand-in's libraries."""
    folder = tmp_path_factory.mktemp("driver")
    for name in ("libcuda.so.1", "libnvcuvid.so.1"):
        subprocess.run(
            ["cc", "-w", "-shared", "-fPIC", "-o", str(folder / name), str(STUB)], check=True
        )
    return str(folder)


@contextmanager
def on_the_stand_in(driver: str, failing: str = "") -> Iterator[None]:
    """Workers that start now have the stand-in, which fails at ``failing``."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LD_LIBRARY_PATH", driver)
        patch.setenv("CUDA_VISIBLE_DEVICES", "0")
        patch.setenv("NVDEC_STUB", failing)
        # Workers get nothing of the server's environment but what is listed.
        passed = worker_process._PASSED | {"NVDEC_STUB"}
        patch.setattr(worker_process, "_PASSED", passed)
        yield


@contextmanager
def seated_pool(driver: str, failing: str = "") -> Iterator[DecodePool]:
    """A pool of one worker on the stand-in."""
    with on_the_stand_in(driver, failing):
        pool = DecodePool(workers=1, threads=2, gpu_sessions=1)
        yield pool
        pool.close()


@pytest.fixture(scope="module")
def pool(driver):
    with seated_pool(driver) as pool:
        yield pool


def wanting(rows, decoder="nvdec") -> DecodeRequest:
    spec = SamplingSpec("explicit", indices=tuple(rows), max_frames=100)
    return DecodeRequest(sampling=spec, decoder=decoder, limits=LIMITS)


async def decode(pool: DecodePool, path: Path, rows) -> DecodeResult:
    with open(path, "rb") as file:
        return await pool.run(file.fileno(), wanting(rows))


def clip(tmp_path, kind) -> Path:
    options = {"gop": 15, "duration": 2} | KINDS[kind]
    return make_clip(tmp_path / options.pop("name"), **options).path


@pytest.mark.parametrize("kind", KINDS)
async def test_each_frame_is_the_picture_of_its_own_packet(tmp_path, pool, kind):
    path = clip(tmp_path, kind)
    few = [0, 7, 7, 16, 31, 44, 58]
    sparse = await decode(pool, path, few)
    whole = await decode(pool, path, range(60))
    assert (sparse.decoder, whole.decoder) == ("nvdec", "nvdec")
    assert (sparse.decoder_note, pool.stats()["gpu_fallbacks"]) == ("", 0)
    # In GOPs of their own and in one go, the same pictures come for the same rows.
    np.testing.assert_array_equal(sparse.frames, whole.frames[few])
    shades = whole.frames[:, 0, 0, 0].astype(int)
    assert (whole.frames == whole.frames[:, :1, :1]).all()
    if path.suffix in (".mp4", ".webm", ".mkv") and kind != "av1":
        # The stand-in paints how many bytes it got: those of the packet, but for its framing.
        table = run_job(str(path), DecodeRequest(probe_only=True)).info.packets
        bytes_of = shade_of(table.size[:, None] - np.arange(4))
        near = (abs(bytes_of - shades[:, None]) <= 1).any(axis=1)
        assert near.mean() > 0.9  # The first packets of streams hold more than a picture.


def shade_of(num_bytes):
    """What limited range makes of the stand-in's luma."""
    return np.round((num_bytes % 219) * 255 / 219)


@pytest.mark.parametrize(
    ("failing", "why"),
    [("init", "no GPU (cuInit: error 100)"), ("create", "Error"), ("decode", "Error")],
)
async def test_whatever_fails_on_the_gpu_the_cpu_returns_its_frames(tmp_path, driver, failing, why):
    path = clip(tmp_path, "h264-bframes")
    with seated_pool(driver, failing) as pool:
        result = await decode(pool, path, [0, 20, 50])
        assert pool.stats()["gpu_fallbacks"] == 1
    assert result.decoder == "pyav"
    assert why in result.decoder_note
    expected = run_job(str(path), wanting([0, 20, 50], "pyav"))
    np.testing.assert_array_equal(result.frames, expected.frames)


async def test_a_container_without_the_video_libraries_is_told_what_it_lacks(tmp_path, driver):
    shutil.copy(Path(driver) / "libcuda.so.1", tmp_path)
    with seated_pool(str(tmp_path)) as pool:
        result = await decode(pool, clip(tmp_path, "h264-bframes"), [0, 20])
    assert (result.decoder, len(result.frames)) == ("pyav", 2)
    assert "libnvcuvid.so.1" in result.decoder_note
    assert "NVIDIA_DRIVER_CAPABILITIES" in result.decoder_note


async def test_a_crash_in_the_driver_costs_a_worker_and_no_request(tmp_path, driver):
    path = clip(tmp_path, "h264-bframes")
    with seated_pool(driver, "crash") as pool:
        result = await decode(pool, path, [0, 20, 50])
        assert (result.decoder, pool.stats()["died"]) == ("pyav", 1)
    expected = run_job(str(path), wanting([0, 20, 50], "pyav"))
    np.testing.assert_array_equal(result.frames, expected.frames)


async def test_a_file_that_the_gpu_cannot_decode_goes_to_the_cpu_without_a_word(tmp_path, pool):
    path = make_clip(tmp_path / "a.mp4", codec="mpeg4", duration=1).path
    result = await decode(pool, path, [0, 20])
    assert (result.decoder, result.decoder_note) == ("pyav", "")


async def test_a_worker_with_a_gpu_keeps_its_limit_on_memory(tmp_path, pool):
    path = clip(tmp_path, "h264-bframes")
    await decode(pool, path, [0])
    (worker,) = pool.worker_pids()
    soft = Path(f"/proc/{worker}/limits").read_text().split("Max address space")[1].split()[0]
    taken = int(Path(f"/proc/{worker}/statm").read_text().split()[0]) * 4096
    assert 64 << 30 < taken < int(soft) < taken + LIMITS.memory_bytes + (1 << 30)


async def test_auto_sends_to_the_gpu_what_the_configuration_says_was_measured(tmp_path, driver):
    path = clip(tmp_path, "h264-bframes")
    measured = {"h264": 2 * 320 * 180 * 15 / 1e6}  # Two GOPs.
    decode = {"workers": 1, "nvdec": {"from_megapixels": measured}}
    config = MMExtConfig.from_additional_config({"mm_ext": {"media": {"decode": decode}}})
    with on_the_stand_in(driver):
        runtime = Runtime(config, ModelTraits())
        for frames, on_gpu in (2, 0), (60, 1):
            ref = await runtime.fetcher(tmp_path, ()).resolve(path.as_uri(), timeout_s=5)
            plan = VideoPlan(SamplingSpec(fps=30, max_frames=frames, min_frames=1), SizeRule())
            result = await runtime.frontend.video(ref, plan)
            assert len(result.frames) == frames
            assert runtime.stats()["decode"]["on_gpu"] == on_gpu
        runtime.close()


async def test_spans_of_a_file_that_stays_open_show_the_same_pictures(tmp_path, pool):
    path = clip(tmp_path, "h264-bframes")
    whole = await decode(pool, path, range(60))
    for span in (0.0, 1.0), (0.8, 1.8), (1.6, 2.0):
        spec = SamplingSpec(fps=10, max_frames=100, min_frames=1, span=span)
        request = DecodeRequest(sampling=spec, decoder="nvdec", limits=LIMITS, content="a" * 64)
        with open(path, "rb") as file:
            part = await pool.run(file.fileno(), request)
        assert (part.decoder, part.decoder_note) == ("nvdec", "")
        rows = part.selection.indices + round(
            30 * span[0]
        )  # They count from the start of the span.
        np.testing.assert_array_equal(part.frames, whole.frames[rows])
