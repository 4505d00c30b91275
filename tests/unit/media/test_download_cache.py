"""Downloads kept on disk by several servers."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from vllm_mm_ext.media.fetch.blob import Blob
from vllm_mm_ext.media.fetch.byte_gate import Claim, MediaBudget
from vllm_mm_ext.media.fetch.download_cache import CachedDownloads, DownloadCacheSettings
from vllm_mm_ext.media.fetch.source import Fetched

BODY = bytes(range(256))
URL = "http://a.test/clip.mp4"


class OneFile:
    """An origin whose URLs all lead to one file."""

    async def locate(self, url: str) -> str:
        return url

    async def fetch(self, *_: object, **__: object) -> Fetched:
        return Fetched.of(Blob.from_bytes(BODY))


def server(directory: Path, ttl_s: float = 3600.0) -> CachedDownloads:
    settings = DownloadCacheSettings(directory, 1 << 20, ttl_s)
    return CachedDownloads(OneFile(), settings, max_bytes=None)


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
