"""Downloads share a bound on bytes, and none waits for ever."""

from __future__ import annotations

import asyncio
import threading
from pathlib import Path

from hypothesis import given, settings
from hypothesis import strategies as st

from vllm_mm_ext.media.blob import Blob
from vllm_mm_ext.media.byte_gate import ByteGate
from vllm_mm_ext.media.cache import ByteBudgetCache
from vllm_mm_ext.media.fetch import MediaFetcher
from vllm_mm_ext.testing.origin import Origin, Resource

JOBS = st.lists(
    st.tuples(st.integers(0, 150), st.integers(0, 5), st.booleans()), min_size=1, max_size=20
)


@settings(max_examples=150, deadline=None)
@given(jobs=JOBS)
def test_the_bound_holds_and_all_get_through_whoever_gives_up(
    jobs: list[tuple[int, int, bool]],
) -> None:
    gate = ByteGate(100)
    inside: list[int] = []
    done: list[int] = []

    async def work(number: int, size: int, ticks: int) -> None:
        async with gate.room(size):
            inside.append(size)
            try:
                assert sum(inside) <= 100 or len([size for size in inside if size]) == 1
                for _ in range(ticks):
                    await asyncio.sleep(0)
            finally:
                inside.remove(size)
        done.append(number)

    async def main() -> None:
        tasks = [
            asyncio.create_task(work(number, size, ticks))
            for number, (size, ticks, _) in enumerate(jobs)
        ]
        await asyncio.sleep(0)
        for task, (_, _, gives_up) in zip(tasks, jobs, strict=True):
            if gives_up:
                task.cancel()
                await asyncio.sleep(0)
        for task, (_, _, gives_up) in zip(tasks, jobs, strict=True):
            if not gives_up:
                await task
        await asyncio.gather(*tasks, return_exceptions=True)

    asyncio.run(main())
    assert gate.used == 0
    assert {n for n, (_, _, gives_up) in enumerate(jobs) if not gives_up} <= set(done)


async def test_waiting_for_room_does_not_count_towards_the_timeout(tmp_path: Path) -> None:
    cache: ByteBudgetCache[str, Blob] = ByteBudgetCache(1 << 20, len)
    fetcher = MediaFetcher(
        allowed_local_media_path=tmp_path,
        allowed_media_domains=[],
        allow_redirects=False,
        user_agent="test/1",
        encoded_cache=cache,
        download_limit_bytes=None,
        max_retries=1,
        max_in_flight_bytes=1000,
    )
    hold = threading.Event()
    with Origin() as origin:
        first = origin.serve("/first", Resource(b"1" * 900, hold=hold))
        others = [
            origin.serve("/second", Resource(b"2" * 900)),
            origin.serve("/unknown-length", Resource(b"3" * 10, chunked=True)),
        ]
        running = asyncio.create_task(fetcher.resolve(first, timeout_s=60))
        while not origin.body_bytes["/first"]:
            await asyncio.sleep(0.01)
        waiting = [asyncio.create_task(fetcher.resolve(url, timeout_s=1)) for url in others]
        done, _ = await asyncio.wait(waiting, timeout=1.5)
        assert not done
        hold.set()
        refs = [await task for task in (running, *waiting)]
        assert [ref.size for ref in refs] == [900, 900, 10]
    fetcher.close()
