"""Downloads share a bound on bytes, and slow ones do not hold up the rest."""

from __future__ import annotations

import asyncio
import gzip
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from vllm_mm_ext.media.cache import ByteBudgetCache
from vllm_mm_ext.media.fetch.blob import Blob
from vllm_mm_ext.media.fetch.byte_gate import ByteGate
from vllm_mm_ext.media.fetch.fetcher import BusyError, MediaFetcher, MediaRef
from vllm_mm_ext.testing.origin import Origin, Resource

MIB = 1 << 20
MakeFetcher = Callable[..., MediaFetcher]


@pytest.fixture
def make_fetcher(tmp_path: Path) -> Iterator[MakeFetcher]:
    made: list[MediaFetcher] = []

    def make(max_in_flight_bytes: int, max_retries: int = 1) -> MediaFetcher:
        cache: ByteBudgetCache[str, Blob] = ByteBudgetCache(MIB, len)
        fetcher = MediaFetcher(
            allowed_local_media_path=tmp_path,
            allowed_media_domains=[],
            allow_redirects=False,
            user_agent="test/1",
            encoded_cache=cache,
            download_limit_bytes=256 * MIB,
            max_retries=max_retries,
            retry_pause_s=0.01,
            max_in_flight_bytes=max_in_flight_bytes,
        )
        made.append(fetcher)
        return fetcher

    yield make
    for fetcher in made:
        fetcher.close()


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
    while gate_of(fetcher).used < arrived:
        await asyncio.sleep(0.01)
    return task


def gate_of(fetcher: MediaFetcher) -> ByteGate:
    return fetcher._http._gate


async def test_waiting_for_room_does_not_count_towards_the_timeout(
    make_fetcher: MakeFetcher, origin: Origin, hold: threading.Event
) -> None:
    fetcher = make_fetcher(2 * MIB)
    first = origin.serve("/first", Resource(b"1" * 2 * MIB, hold=hold))
    second = origin.serve("/second", Resource(b"2" * 2 * MIB, delay_s=0.6))
    running = await start(fetcher, first)
    waiting = asyncio.create_task(fetcher.resolve(second, timeout_s=1))
    # With its origin's delay, more than a second in all.
    done, _ = await asyncio.wait([waiting], timeout=1.2)
    assert not done
    hold.set()
    assert [(await task).size for task in (running, waiting)] == [2 * MIB, 2 * MIB]


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


async def test_small_bodies_never_wait_for_others(
    make_fetcher: MakeFetcher, origin: Origin, hold: threading.Event
) -> None:
    fetcher = make_fetcher(2 * MIB)
    first = await start(fetcher, origin.serve("/1", Resource(b"1" * 2 * MIB, hold=hold)))
    url = origin.serve("/2", Resource(b"2" * 2 * MIB))
    queued = asyncio.create_task(fetcher.resolve(url, timeout_s=30))
    for size in (0, 10, MIB):
        url = origin.serve(f"/{size}", Resource(b"3" * size))
        assert (await fetcher.resolve(url, timeout_s=30)).size == size
    assert not queued.done()
    hold.set()
    assert [(await task).size for task in (first, queued)] == [2 * MIB, 2 * MIB]


@pytest.mark.parametrize(
    "resource",
    [
        Resource(b"2" * 2 * MIB),
        Resource(b"2" * 10, chunked=True),
        Resource(gzip.compress(b"2" * 2 * MIB), headers={"Content-Encoding": "gzip"}),
    ],
    ids=["known length", "unknown length", "length before decompression"],
)
async def test_no_room_within_the_timeout_is_an_error_that_says_so(
    make_fetcher: MakeFetcher, origin: Origin, hold: threading.Event, resource: Resource
) -> None:
    fetcher = make_fetcher(2 * MIB, max_retries=3)
    first = await start(fetcher, origin.serve("/first", Resource(b"1" * 2 * MIB, hold=hold)))
    with pytest.raises(BusyError, match=rf"busy .* within 0\.2 s \(at most {2 * MIB} bytes"):
        await fetcher.resolve(origin.serve("/second", resource), timeout_s=0.2)
    assert origin.requests["/second"] == 1
    hold.set()
    assert (await first).size == 2 * MIB


@pytest.mark.parametrize("retries", [1, 3])
async def test_a_body_that_outgrows_what_is_left_gives_up_its_room(
    make_fetcher: MakeFetcher, origin: Origin, hold: threading.Event, retries: int
) -> None:
    fetcher = make_fetcher(24 * MIB, retries)
    # Held at 10 MiB, for which it has taken 16.
    first = origin.serve("/first", Resource(bytes(20 * MIB), chunked=True, hold=hold))
    running = await start(fetcher, first, arrived=16 * MIB)
    second = origin.serve("/second", Resource(bytes(12 * MIB), chunked=True))
    task = asyncio.create_task(fetcher.resolve(second, timeout_s=30))
    while origin.requests["/second"] < retries:
        await asyncio.sleep(0.01)
    with pytest.raises(BusyError, match="no room for the rest"):
        await task
    assert gate_of(fetcher).used == 16 * MIB
    hold.set()
    assert (await running).size == 20 * MIB
    assert (await fetcher.resolve(second, timeout_s=30)).size == 12 * MIB
    assert gate_of(fetcher).used == 0


async def test_the_oldest_body_of_unknown_length_may_outgrow_the_bound(
    make_fetcher: MakeFetcher, origin: Origin
) -> None:
    url = origin.serve("/long", Resource(bytes(20 * MIB), chunked=True))
    assert (await make_fetcher(4 * MIB).resolve(url, timeout_s=30)).size == 20 * MIB
