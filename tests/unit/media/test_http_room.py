"""Media of all sources share the media budget, from before it is read until it is let go."""

from __future__ import annotations

import asyncio
import base64
import gc
import gzip
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from vllm_mm_ext.errors import MediaTooLargeError
from vllm_mm_ext.media.cache import ByteBudgetCache
from vllm_mm_ext.media.fetch.blob import Blob
from vllm_mm_ext.media.fetch.byte_gate import Claim, MediaBudget
from vllm_mm_ext.media.fetch.byte_lease import Lease
from vllm_mm_ext.media.fetch.download_cache import DownloadCacheSettings
from vllm_mm_ext.media.fetch.fetcher import BusyError, MediaFetcher, MediaRef
from vllm_mm_ext.media.loop_thread import LoopThread
from vllm_mm_ext.testing.origin import Origin, Resource

MIB = 1 << 20
MakeFetcher = Callable[..., MediaFetcher]


@pytest.fixture(autouse=True)
def _without_garbage_collection() -> Iterator[None]:
    gc.disable()
    yield
    gc.enable()


@pytest.fixture
def make_fetcher(tmp_path: Path) -> Iterator[MakeFetcher]:
    made: list[MediaFetcher] = []

    def make(
        max_bytes: int,
        max_retries: int = 1,
        max_wait_s: float = 60,
        download_cache: DownloadCacheSettings | None = None,
    ) -> MediaFetcher:
        cache: ByteBudgetCache[str, Blob] = ByteBudgetCache(0, len)
        fetcher = MediaFetcher(
            allowed_local_media_path=tmp_path,
            allowed_media_domains=[],
            allow_redirects=False,
            user_agent="test/1",
            encoded_cache=cache,
            download_limit_bytes=256 * MIB,
            local_limit_bytes=None,
            max_retries=max_retries,
            retry_pause_s=0.01,
            loop=LoopThread("fetch"),
            budget=MediaBudget(max_bytes, max_wait_s),
            download_cache=download_cache,
        )
        made.append(fetcher)
        return fetcher

    yield make
    for fetcher in made:
        fetcher._thread.stop(fetcher.disconnect())


@pytest.fixture
def settled(monkeypatch: pytest.MonkeyPatch) -> None:
    """Files count as last changed long ago."""
    monkeypatch.setattr("vllm_mm_ext.media.fetch.file_source._RACY_NS", -1)


@pytest.fixture
def origin() -> Iterator[Origin]:
    with Origin() as server:
        yield server


@pytest.fixture
def hold() -> Iterator[threading.Event]:
    event = threading.Event()
    yield event
    event.set()


Download = asyncio.Task[MediaRef]


async def start(fetcher: MediaFetcher, url: str, arrived: int = 1) -> Download:
    """Start a download that its origin holds, and wait until so much of it has arrived."""
    task = asyncio.create_task(fetcher.resolve(url, timeout_s=60))
    await until(lambda: fetcher.budget.used >= arrived)
    return task


async def fill(fetcher: MediaFetcher, origin: Origin, hold: threading.Event) -> Download:
    """Start a download of 4 MiB, and wait until the 2 MiB that its origin sends first are here."""
    url = origin.serve("/first", Resource(b"1" * 4 * MIB, hold=hold))
    return await start(fetcher, url, arrived=2 * MIB)


async def until(condition: Callable[[], bool]) -> None:
    """Wait until something is so."""
    while not condition():
        await asyncio.sleep(0.01)


def waiting(fetcher: MediaFetcher) -> int:
    """Items that wait for room."""
    return fetcher.budget.stats()["waiting"]


async def test_an_item_waits_for_room_without_a_connection_and_is_then_read(
    make_fetcher: MakeFetcher, origin: Origin, hold: threading.Event
) -> None:
    fetcher = make_fetcher(2 * MIB)
    first = await fill(fetcher, origin, hold)
    url = origin.serve("/second", Resource(b"2" * 2 * MIB))
    second = asyncio.create_task(fetcher.resolve(url, timeout_s=1))
    await until(lambda: waiting(fetcher) == 1)
    session = fetcher._http._session
    assert session is not None
    connections = session.connector
    assert connections is not None
    await until(lambda: len(connections._acquired) == 1)
    hold.set()
    await until(first.done)
    # What was read counts until it is let go.
    assert not second.done()
    del first
    assert (await second).size == 2 * MIB
    assert origin.requests["/second"] == 2
    assert fetcher.budget.used == 2 * MIB
    del second
    await until(lambda: fetcher.budget.used == 0)


def in_file(folder: Path, size: int) -> str:
    (folder / f"{size}").write_bytes(b"2" * size)
    return (folder / f"{size}").as_uri()


def in_url(_: Path, size: int) -> str:
    return f"data:video/mp4;base64,{base64.b64encode(b'2' * size).decode()}"


@pytest.mark.parametrize("place", [in_file, in_url])
async def test_local_files_and_data_urls_wait_like_downloads(
    make_fetcher: MakeFetcher,
    origin: Origin,
    hold: threading.Event,
    tmp_path: Path,
    place: Callable[[Path, int], str],
) -> None:
    fetcher = make_fetcher(2 * MIB)
    first = await fill(fetcher, origin, hold)
    second = asyncio.create_task(fetcher.resolve(place(tmp_path, MIB), timeout_s=1))
    await until(lambda: waiting(fetcher) == 1)
    gone = asyncio.create_task(fetcher.resolve(place(tmp_path, MIB + 1), timeout_s=1))
    await until(lambda: waiting(fetcher) == 2)
    gone.cancel()
    await until(lambda: waiting(fetcher) == 1)
    hold.set()
    await until(first.done)
    assert not second.done()
    del first
    assert (await second).size == MIB
    del second, gone
    await until(lambda: fetcher.budget.used == 0)


async def test_slow_bodies_of_unknown_length_do_not_hold_up_others(
    make_fetcher: MakeFetcher, origin: Origin, hold: threading.Event
) -> None:
    fetcher = make_fetcher(64 * MIB)
    slow = [
        await start(
            fetcher,
            origin.serve(f"/slow/{k}", Resource(b"s" * 100, chunked=True, hold=hold)),
            arrived=k + 1,
        )
        for k in range(6)
    ]
    url = origin.serve("/large", Resource(b"1" * 4 * MIB))
    assert (await fetcher.resolve(url, timeout_s=30)).size == 4 * MIB
    assert not any(task.done() for task in slow)
    hold.set()
    assert [(await task).size for task in slow] == [100] * 6


async def test_what_slow_origins_announce_does_not_hold_up_others(
    make_fetcher: MakeFetcher, origin: Origin, hold: threading.Event
) -> None:
    fetcher = make_fetcher(64 * MIB)
    slow = [
        await start(
            fetcher,
            origin.serve(f"/slow/{k}", Resource(b"s" * 100, content_length=200 * MIB, hold=hold)),
            arrived=k + 1,
        )
        for k in range(8)
    ]
    assert waiting(fetcher) == 0
    url = origin.serve("/large", Resource(b"1" * 40 * MIB))
    assert (await fetcher.resolve(url, timeout_s=30)).size == 40 * MIB
    assert not any(task.done() for task in slow)
    hold.set()
    await asyncio.wait(slow)


async def test_an_origin_that_was_waited_for_holds_no_more_than_it_has_earned(
    make_fetcher: MakeFetcher, origin: Origin, hold: threading.Event
) -> None:
    fetcher = make_fetcher(32 * MIB)
    oldest = fetcher.budget.claim()
    held = await oldest.acquire(32 * MIB)
    url = origin.serve("/slow", Resource(b"s" * 100, content_length=30 * MIB, hold=hold))
    slow = asyncio.create_task(fetcher.resolve(url, timeout_s=30))
    await until(lambda: waiting(fetcher) == 1)
    held.release()
    await until(lambda: origin.requests["/slow"] == 2)
    assert fetcher.budget.used <= 2 * MIB
    hold.set()
    await asyncio.wait([slow])


async def test_a_small_body_asks_once_for_no_more_than_its_length(
    make_fetcher: MakeFetcher, origin: Origin, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[int] = []
    grow = Claim.grow

    def seen(claim: Claim, lease: Lease, num_bytes: int, spare: int = 0) -> bool:
        asked.append(num_bytes + spare)
        return grow(claim, lease, num_bytes, spare)

    monkeypatch.setattr(Claim, "grow", seen)
    url = origin.serve("/small", Resource(b"1" * 700_000))
    await make_fetcher(8 * MIB).resolve(url, timeout_s=30)
    assert asked == [700_000]


async def test_a_request_whose_bodies_of_unknown_length_fit_is_not_too_large(
    make_fetcher: MakeFetcher, origin: Origin
) -> None:
    fetcher = make_fetcher(24 * MIB)
    claim = fetcher.budget.claim()
    refs = [
        await fetcher.resolve(
            origin.serve(f"/{k}", Resource(bytes(11 * MIB), chunked=True)),
            timeout_s=30,
            claim=claim,
        )
        for k in range(2)
    ]
    assert [ref.size for ref in refs] == [11 * MIB] * 2
    with pytest.raises(MediaTooLargeError, match="past the limit"):
        await fetcher.resolve(
            origin.serve("/third", Resource(bytes(4 * MIB), chunked=True)),
            timeout_s=30,
            claim=claim,
        )


@pytest.mark.parametrize(
    "resource",
    [
        Resource(b"2" * 2 * MIB),
        Resource(b"2" * 10, chunked=True),
        Resource(gzip.compress(b"2" * 2 * MIB), headers={"Content-Encoding": "gzip"}),
    ],
    ids=["known length", "unknown length", "length before decompression"],
)
async def test_no_room_in_time_is_an_error_that_says_so(
    make_fetcher: MakeFetcher, origin: Origin, resource: Resource
) -> None:
    fetcher = make_fetcher(2 * MIB, max_retries=3, max_wait_s=0.2)
    oldest = fetcher.budget.claim()
    await oldest.acquire(2 * MIB)
    with pytest.raises(BusyError, match=rf"busy .* within 0\.2 s.* at most {2 * MIB} bytes"):
        await fetcher.resolve(origin.serve("/second", resource), timeout_s=30)
    assert origin.requests["/second"] == 1


async def test_a_body_that_outgrows_what_is_left_is_read_again_when_there_is_room(
    make_fetcher: MakeFetcher, origin: Origin, hold: threading.Event
) -> None:
    fetcher = make_fetcher(24 * MIB)
    # Held at 15 MiB.
    first = origin.serve("/first", Resource(bytes(30 * MIB), chunked=True, hold=hold))
    running = await start(fetcher, first, arrived=15 * MIB)
    url = origin.serve("/second", Resource(bytes(12 * MIB), chunked=True))
    second = asyncio.create_task(fetcher.resolve(url, timeout_s=30))
    await until(lambda: waiting(fetcher) == 1)
    assert fetcher.budget.used < 24 * MIB
    hold.set()
    assert (await running).size == 30 * MIB
    del running
    assert (await second).size == 12 * MIB
    del second
    await until(lambda: fetcher.budget.used == 0)


async def test_the_oldest_body_of_unknown_length_may_outgrow_the_bound(
    make_fetcher: MakeFetcher, origin: Origin
) -> None:
    url = origin.serve("/long", Resource(bytes(20 * MIB), chunked=True))
    assert (await make_fetcher(4 * MIB).resolve(url, timeout_s=30)).size == 20 * MIB


@pytest.mark.usefixtures("settled")
async def test_what_another_request_has_resolved_is_read_in_the_turn_of_the_one_that_reads(
    make_fetcher: MakeFetcher, tmp_path: Path
) -> None:
    fetcher = make_fetcher(MIB, max_wait_s=0.2)
    url = in_file(tmp_path, 2 * MIB)
    await fetcher.resolve(url, timeout_s=1)
    await until(lambda: fetcher.budget.used == 0)
    first, second = fetcher.budget.claim(), fetcher.budget.claim()
    known = await fetcher.resolve(url, timeout_s=1, claim=first)
    assert fetcher.stats()["file_unchanged"] == 1, "its digest is known without reading it"
    first.end()
    assert (await known.claimed_by(second).open()).digest == known.digest


async def test_downloads_kept_on_disk_wait_like_those_from_an_origin(
    make_fetcher: MakeFetcher, origin: Origin, hold: threading.Event, tmp_path: Path
) -> None:
    kept = DownloadCacheSettings(tmp_path / "kept", max_bytes=64 * MIB, ttl_s=3600)
    url = origin.serve("/second", Resource(b"2" * MIB))
    await make_fetcher(2 * MIB, download_cache=kept).resolve(url, timeout_s=30)
    fetcher = make_fetcher(2 * MIB, download_cache=kept)
    first = await fill(fetcher, origin, hold)
    second = asyncio.create_task(fetcher.resolve(url, timeout_s=30))
    await until(lambda: waiting(fetcher) == 1)
    hold.set()
    await until(first.done)
    assert not second.done()
    del first
    assert (await second).size == MIB
    assert fetcher.budget.used == MIB
    assert origin.requests["/second"] == 1
    # Its content is known now, and costs nothing.
    again = await fetcher.resolve(url, timeout_s=30)
    assert fetcher.budget.used == MIB
    del second, again
    await until(lambda: fetcher.budget.used == 0)


async def test_a_download_that_went_from_the_disk_while_it_waited_is_asked_for(
    make_fetcher: MakeFetcher, origin: Origin, hold: threading.Event, tmp_path: Path
) -> None:
    kept = DownloadCacheSettings(tmp_path / "kept", max_bytes=64 * MIB, ttl_s=3600)
    url = origin.serve("/second", Resource(b"2" * MIB))
    await make_fetcher(2 * MIB, download_cache=kept).resolve(url, timeout_s=30)
    fetcher = make_fetcher(2 * MIB, download_cache=kept)
    first = await fill(fetcher, origin, hold)
    second = asyncio.create_task(fetcher.resolve(url, timeout_s=30))
    await until(lambda: waiting(fetcher) == 1)
    for file in kept.directory.iterdir():
        file.unlink()
    hold.set()
    await until(first.done)
    del first
    assert (await second).size == MIB
    assert origin.requests["/second"] == 2
    del second
    await until(lambda: fetcher.budget.used == 0)


async def test_images_wait_like_videos(
    make_fetcher: MakeFetcher, origin: Origin, hold: threading.Event
) -> None:
    fetcher = make_fetcher(2 * MIB)
    first = await fill(fetcher, origin, hold)
    url = origin.serve("/second", Resource(b"2" * MIB))
    second = asyncio.create_task(fetcher.download(url, timeout_s=30))
    await until(lambda: waiting(fetcher) == 1)
    hold.set()
    await until(first.done)
    assert not second.done()
    del first
    assert (await second).size == MIB
    assert fetcher.budget.used == MIB
    del second
    await until(lambda: fetcher.budget.used == 0)
