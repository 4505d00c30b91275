import asyncio
import gc
import os
import threading
from contextvars import ContextVar

import pytest
from digests import digest_of
from hypothesis import given, settings
from hypothesis import strategies as st

from vllm_mm_ext.errors import MediaTooLargeError
from vllm_mm_ext.media.cache import ByteBudgetCache, SingleFlight
from vllm_mm_ext.media.fetch.blob import Blob, BlobWriter


class TestBlob:
    def test_holds_the_bytes_and_their_digest(self) -> None:
        data = os.urandom(3_000_000)
        blob = Blob.from_bytes(data)
        assert (blob.size, blob.digest) == (len(data), digest_of(data))
        assert blob.read() == data
        assert bytes(blob.view()) == data
        assert b"".join(blob.chunks(7_919)) == data

    def test_chunking_does_not_change_the_digest(self) -> None:
        data = os.urandom(10_000)
        with BlobWriter() as writer:
            for start in range(0, len(data), 777):
                writer.append(data[start : start + 777])
            assert writer.finish().digest == Blob.from_bytes(data).digest

    def test_empty_is_a_blob_too(self) -> None:
        blob = Blob.from_bytes(b"")
        assert (blob.size, blob.read(), bytes(blob.view())) == (0, b"", b"")

    def test_cannot_be_written_through_its_descriptor(self) -> None:
        blob = Blob.from_bytes(b"media")
        with pytest.raises(PermissionError):
            os.pwrite(blob.fd, b"x", 0)
        with pytest.raises(PermissionError):
            os.ftruncate(blob.fd, 0)

    def test_closes_its_descriptor_when_collected_while_views_live_on(self) -> None:
        blob = Blob.from_bytes(b"media")
        fd, view = blob.fd, blob.view()
        del blob
        gc.collect()
        with pytest.raises(OSError, match="Bad file descriptor"):
            os.fstat(fd)
        assert bytes(view) == b"media"

    def test_writer_refuses_bytes_past_its_limit_and_names_it(self) -> None:
        with BlobWriter(max_bytes=10) as writer:
            writer.append(b"0123456789")
            with pytest.raises(MediaTooLargeError, match="10 bytes"):
                writer.append(b"x")

    def test_unfinished_writer_closes_its_descriptor(self) -> None:
        before = len(os.listdir("/proc/self/fd"))
        with BlobWriter() as writer:
            writer.append(b"half")
        assert len(os.listdir("/proc/self/fd")) == before


class TestByteBudgetCache:
    @settings(max_examples=60)
    @given(
        budget=st.integers(0, 50),
        operations=st.lists(
            st.tuples(
                st.sampled_from(["put", "get", "discard"]), st.integers(0, 6), st.integers(0, 30)
            ),
            max_size=60,
        ),
    )
    def test_never_holds_more_than_its_budget(
        self, budget: int, operations: list[tuple[str, int, int]]
    ) -> None:
        cache: ByteBudgetCache[int, bytes] = ByteBudgetCache(budget, len)
        for name, key, size in operations:
            if name == "put":
                assert cache.put(key, bytes(size)) == (size <= budget)
                assert (key in cache) == (size <= budget)
            elif name == "get":
                cache.get(key)
            else:
                cache.discard(key)
            cache.check_integrity()
            assert cache.stats().num_bytes <= budget

    def test_evicts_the_least_recently_used(self) -> None:
        cache: ByteBudgetCache[str, bytes] = ByteBudgetCache(20, len)
        cache.put("a", bytes(10))
        cache.put("b", bytes(10))
        assert cache.get("a") is not None
        cache.put("c", bytes(10))
        assert "a" in cache
        assert "b" not in cache
        assert cache.stats().evicted == 1

    def test_keeps_no_more_entries_than_allowed_however_small(self) -> None:
        cache: ByteBudgetCache[int, bytes] = ByteBudgetCache(1000, len, max_entries=3)
        for key in range(10):
            cache.put(key, b"x")
            cache.check_integrity()
        assert len(cache) == 3
        assert all(key in cache for key in (7, 8, 9))

    def test_value_larger_than_the_budget_passes_through_and_evicts_nothing(self) -> None:
        cache: ByteBudgetCache[str, bytes] = ByteBudgetCache(20, len)
        cache.put("a", bytes(10))
        assert not cache.put("big", bytes(21))
        assert "a" in cache
        assert "big" not in cache
        assert (cache.stats().uncacheable, cache.stats().evicted) == (1, 0)

    def test_replacing_a_value_by_a_too_large_one_does_not_leave_the_old_one(self) -> None:
        cache: ByteBudgetCache[str, bytes] = ByteBudgetCache(20, len)
        cache.put("a", bytes(10))
        cache.put("a", bytes(21))
        assert cache.get("a") is None

    def test_counts_hits_and_misses(self) -> None:
        cache: ByteBudgetCache[str, bytes] = ByteBudgetCache(20, len)
        cache.put("a", b"x")
        cache.get("a")
        cache.get("b")
        stats = cache.stats()
        assert (stats.hits, stats.misses, stats.entries, stats.num_bytes) == (1, 1, 1, 1)

    def test_stays_consistent_under_threads(self) -> None:
        cache: ByteBudgetCache[int, bytes] = ByteBudgetCache(500, len)

        def work(seed: int) -> None:
            for step in range(400):
                cache.put((seed * step) % 37, bytes(step % 90))
                cache.get(step % 37)

        threads = [threading.Thread(target=work, args=(seed,)) for seed in range(1, 5)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        cache.check_integrity()


class TestSingleFlight:
    async def test_concurrent_callers_share_one_run(self) -> None:
        flights: SingleFlight[str, object] = SingleFlight()
        runs = 0

        async def work() -> object:
            nonlocal runs
            runs += 1
            await asyncio.sleep(0.01)
            return object()

        results = await asyncio.gather(*(flights.run("k", work) for _ in range(64)))
        assert runs == 1
        assert len({id(result) for result in results}) == 1
        assert len(flights) == 0

    async def test_shared_work_sees_no_context_variable_of_the_first_caller(self) -> None:
        options: ContextVar[str] = ContextVar("options", default="nobody's")
        flights: SingleFlight[str, str] = SingleFlight()

        async def work() -> str:
            await asyncio.sleep(0)
            return options.get()

        async def ask(name: str) -> str:
            options.set(name)
            return await flights.run("k", work)

        assert await asyncio.gather(ask("first"), ask("second")) == ["nobody's"] * 2

    async def test_keys_do_not_share(self) -> None:
        flights: SingleFlight[int, int] = SingleFlight()

        async def work(key: int) -> int:
            await asyncio.sleep(0)
            return key

        results = await asyncio.gather(*(flights.run(k, lambda k=k: work(k)) for k in range(5)))
        assert results == list(range(5))

    async def test_error_reaches_all_waiters_and_is_not_remembered(self) -> None:
        flights: SingleFlight[str, int] = SingleFlight()
        fail = True

        async def work() -> int:
            await asyncio.sleep(0.01)
            if fail:
                raise ValueError("no")
            return 1

        results = await asyncio.gather(
            *(flights.run("k", work) for _ in range(3)), return_exceptions=True
        )
        assert [type(result) for result in results] == [ValueError] * 3
        fail = False
        assert await flights.run("k", work) == 1

    async def test_cancelling_one_caller_leaves_the_work_to_the_others(self) -> None:
        flights: SingleFlight[str, int] = SingleFlight()
        go = asyncio.Event()

        async def work() -> int:
            await go.wait()
            return 7

        first = asyncio.create_task(flights.run("k", work))
        second = asyncio.create_task(flights.run("k", work))
        await asyncio.sleep(0)
        first.cancel()
        with pytest.raises(asyncio.CancelledError):
            await first
        go.set()
        assert await second == 7

    async def test_work_is_cancelled_when_every_caller_is_gone(self) -> None:
        flights: SingleFlight[str, None] = SingleFlight()
        cancelled = asyncio.Event()

        async def work() -> None:
            try:
                await asyncio.Event().wait()
            finally:
                cancelled.set()

        callers = [asyncio.create_task(flights.run("k", work)) for _ in range(3)]
        await asyncio.sleep(0.01)
        for caller in callers:
            caller.cancel()
        await asyncio.gather(*callers, return_exceptions=True)
        assert len(flights) == 0
        await asyncio.wait_for(cancelled.wait(), 5)

    async def test_caller_after_abandoned_work_starts_afresh(self) -> None:
        flights: SingleFlight[str, int] = SingleFlight()

        async def endless() -> int:
            await asyncio.Event().wait()
            return 0

        async def quick() -> int:
            return 1

        caller = asyncio.create_task(flights.run("k", endless))
        await asyncio.sleep(0)
        caller.cancel()
        await asyncio.gather(caller, return_exceptions=True)
        assert await flights.run("k", quick) == 1

    def test_serves_one_event_loop_after_another(self) -> None:
        flights: SingleFlight[str, int] = SingleFlight()

        async def work() -> int:
            await asyncio.sleep(0)
            return 3

        assert [asyncio.run(flights.run("k", work)) for _ in range(3)] == [3, 3, 3]

    def test_loops_in_different_threads_share_one_run(self) -> None:
        flights: SingleFlight[str, int] = SingleFlight()
        runs: list[int] = []
        release = threading.Event()
        results: list[int] = []

        async def work() -> int:
            runs.append(1)
            await asyncio.to_thread(release.wait)
            return 5

        def caller() -> None:
            results.append(asyncio.run(flights.run("k", work)))

        threads = [threading.Thread(target=caller) for _ in range(4)]
        for thread in threads:
            thread.start()
        # All have joined once the one flight counts four waiters.
        while not (flights._flights and next(iter(flights._flights.values())).waiters == 4):
            pass
        release.set()
        for thread in threads:
            thread.join()
        assert (len(runs), results) == (1, [5] * 4)

    def test_waiter_restarts_the_work_when_the_loop_that_did_it_closes(self) -> None:
        flights: SingleFlight[str, str] = SingleFlight()
        started, joined = threading.Event(), threading.Event()
        outcome: list[str] = []

        async def never() -> str:
            started.set()
            await asyncio.Event().wait()
            return "never"

        async def again() -> str:
            return "again"

        async def first() -> None:
            caller = asyncio.create_task(flights.run("k", never))
            await asyncio.to_thread(joined.wait)
            # Leaving ends asyncio.run, which cancels every task of this loop.
            del caller

        async def second() -> str:
            task = asyncio.create_task(flights.run("k", again))
            await asyncio.sleep(0)
            joined.set()
            return await task

        def other_thread() -> None:
            started.wait()
            outcome.append(asyncio.run(second()))

        thread = threading.Thread(target=other_thread)
        thread.start()
        asyncio.run(first())
        thread.join()
        assert outcome == ["again"]
