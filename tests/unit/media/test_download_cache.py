"""Downloads kept on disk by several servers."""

from __future__ import annotations

import asyncio
import errno
import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from vllm_mm_ext.errors import BusyError
from vllm_mm_ext.media.bounded_threads import BoundedThreads
from vllm_mm_ext.media.fetch.blob import Blob
from vllm_mm_ext.media.fetch.byte_gate import Claim, MediaBudget
from vllm_mm_ext.media.fetch.download_cache import CachedDownloads, DownloadCacheSettings
from vllm_mm_ext.media.fetch.source import Fetched

BODY = bytes(range(256))
URL = "http://a.test/clip.mp4"


class OneFile:
    """An origin whose URLs all lead to one file."""

    async def locate(self, url: str, _: Claim) -> str:
        return url

    async def fetch(self, *_: object, **__: object) -> Fetched:
        return Fetched.of(Blob.from_bytes(BODY))


def server(directory: Path, ttl_s: float = 3600.0) -> CachedDownloads:
    settings = DownloadCacheSettings(directory, 1 << 20, ttl_s)
    threads = BoundedThreads(2, "test", "the disk")
    return CachedDownloads(OneFile(), settings, threads=threads, max_bytes=None)


async def fetched(downloads: CachedDownloads) -> Fetched:
    claim: Claim = MediaBudget(1 << 20).claim()
    return await downloads.fetch(URL, timeout_s=5, max_bytes=None, load=False, claim=claim)


async def test_servers_that_share_a_directory_read_a_file_once_each(tmp_path: Path) -> None:
    servers = [server(tmp_path) for _ in range(2)]
    await fetched(servers[0])
    # The one that has downloaded the file reads it once too.
    for one in servers:
        assert (await fetched(one)).blob is not None
    for _ in range(3):
        for one in servers:
            assert (await fetched(one)).blob is None


@pytest.mark.parametrize(("ttl_s", "unused_s"), [(3600.0, 100.0), (100.0, 20.0)])
async def test_a_file_that_is_used_keeps_its_place_and_does_not_expire(
    tmp_path: Path, ttl_s: float, unused_s: float
) -> None:
    downloads = server(tmp_path, ttl_s)
    await fetched(downloads)
    (file,) = tmp_path.iterdir()
    os.utime(file, (time.time() - unused_s,) * 2)
    await fetched(downloads)
    assert time.time() - file.stat().st_mtime < unused_s - 1


async def test_a_directory_that_cannot_be_listed_is_no_reason_to_fail(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def short(_: object) -> None:
        raise OSError("too many open files")

    monkeypatch.setattr(os, "scandir", short)
    found = await fetched(server(tmp_path))
    assert found.blob is not None
    assert found.blob.read() == BODY


async def test_a_disk_that_is_full_below_the_bound_loses_old_downloads_once_a_minute(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    downloads = server(tmp_path)
    now = time.time()
    for number in range(20):
        (tmp_path / f"{number}.mp4").write_bytes(BODY)
        # The first two have expired.
        os.utime(tmp_path / f"{number}.mp4", (now - (5000 if number < 2 else 1000 - number),) * 2)

    def full(_: Blob) -> Iterator[bytes]:
        yield BODY[:100]
        raise OSError(errno.ENOSPC, "No space left on device")

    def left() -> set[str]:
        return {file.name for file in tmp_path.iterdir()}

    with monkeypatch.context() as patch:
        patch.setattr(Blob, "chunks", full)
        for _ in range(3):
            assert (await fetched(downloads)).blob is not None
            assert left() == {f"{number}.mp4" for number in range(4, 20)}
    await fetched(downloads)
    assert len(left()) == 17


async def test_a_disk_that_stops_to_answer_fails_no_request_that_has_its_download(
    tmp_path: Path,
) -> None:
    threads, answer, hanging = BoundedThreads(1, "test", "the disk"), threading.Event(), []

    class Origin(OneFile):
        async def fetch(self, *_: object, **__: object) -> Fetched:
            hanging.append(asyncio.create_task(threads.run(answer.wait, 1)))
            await asyncio.sleep(0)
            return Fetched.of(Blob.from_bytes(BODY))

    settings = DownloadCacheSettings(tmp_path, 1 << 20, 3600.0)
    downloads = CachedDownloads(Origin(), settings, threads=threads, max_bytes=None)
    claim = MediaBudget(1 << 20, max_wait_s=0.05).claim()
    try:
        found = await downloads.fetch(URL, timeout_s=5, max_bytes=None, load=False, claim=claim)
        assert found.blob is not None
        assert not list(tmp_path.iterdir())
        with pytest.raises(BusyError, match="the disk"):
            await downloads.fetch(URL, timeout_s=5, max_bytes=None, load=False, claim=claim)
    finally:
        answer.set()
    await asyncio.gather(*hanging)
