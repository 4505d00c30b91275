"""A file that is forgotten has to be fetched and decoded again, and no worker has seen it."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path

import pytest

from vllm_mm_ext.media.cache import ByteBudgetCache
from vllm_mm_ext.media.decode.pool import DecodePool
from vllm_mm_ext.media.fetch.byte_gate import MediaBudget
from vllm_mm_ext.media.fetch.download_cache import DownloadCacheSettings
from vllm_mm_ext.media.fetch.fetcher import MediaFetcher
from vllm_mm_ext.media.loop_thread import LoopThread
from vllm_mm_ext.media.types import DecodeRequest, SamplingSpec
from vllm_mm_ext.testing.media import make_clip
from vllm_mm_ext.testing.origin import Origin, Resource

FOREVER = {"Cache-Control": "max-age=100000"}


async def _nothing() -> None:
    return


@pytest.mark.parametrize("by_url", [True, False])
async def test_a_forgotten_file_is_in_no_cache_and_others_are(tmp_path: Path, by_url: bool) -> None:
    loop = LoopThread("test")
    fetcher = MediaFetcher(
        allowed_local_media_path=tmp_path,
        allowed_media_domains=(),
        allow_redirects=True,
        user_agent="test",
        encoded_cache=ByteBudgetCache(1 << 20, lambda blob: blob.size),
        download_limit_bytes=None,
        local_limit_bytes=None,
        loop=loop,
        budget=MediaBudget(1 << 20, 10.0),
        download_cache=DownloadCacheSettings(tmp_path / "cache", 1 << 20, 1e6),
    )
    with Origin() as origin:
        urls = [
            origin.serve(f"/{name}", Resource(name.encode() * 99, headers=FOREVER)) for name in "ab"
        ]
        digests = [(await fetcher.resolve(url, timeout_s=5)).digest for url in urls]
        assert len(os.listdir(tmp_path / "cache")) == 2
        await fetcher.forget(() if by_url else digests[:1], urls[:1] if by_url else ())
        assert len(os.listdir(tmp_path / "cache")) == 1
        for url in urls:
            await fetcher.resolve(url, timeout_s=5)
        assert [origin.requests[f"/{name}"] for name in "ab"] == [2, 1]
        if not by_url:
            await fetcher.forget(digests, ())
            assert not len(fetcher.encoded_cache)
    loop.stop(_nothing())


async def test_workers_are_replaced_and_jobs_under_way_are_done_all_the_same(
    tmp_path: Path,
) -> None:
    clip = tmp_path / "a.mp4"
    make_clip(clip, width=640, height=360, duration=8, gop=10)
    pool = DecodePool(workers=2, threads=1)
    fd = os.open(clip, os.O_RDONLY)
    try:
        request = DecodeRequest(sampling=SamplingSpec("uniform", fps=8.0, max_frames=64))
        first = await pool.run(fd, request)
        before = set(pool.worker_pids())
        job = asyncio.create_task(pool.run(fd, request))
        while not pool.stats()["busy"]:
            await asyncio.sleep(0)
        await asyncio.to_thread(pool.renew)
        again = await job
        assert first.frames is not None
        assert again.frames is not None
        assert (first.frames == again.frames).all()
        assert not before & set(pool.worker_pids())
        assert not any(Path(f"/proc/{pid}").exists() for pid in before)
        assert not pool.stats()["died"]
    finally:
        os.close(fd)
        pool.close()
