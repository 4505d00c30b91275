"""Requests share a bound on bytes: the bound holds, in order, and nobody waits for ever."""

from __future__ import annotations

import asyncio
import gc
import threading
import weakref
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from vllm_mm_ext.base.tasks import all_or_none
from vllm_mm_ext.errors import BusyError, MediaTooLargeError
from vllm_mm_ext.media.cache import ByteBudgetCache, SingleFlight
from vllm_mm_ext.media.fetch.byte_gate import Claim, MediaBudget
from vllm_mm_ext.media.fetch.byte_lease import Lease

BOUND = 100
WORKERS = 2
# An item, and the request whose own it is.
Key = tuple[int, object]


class Media:
    """An encoded or decoded item: its bytes are held until it is freed."""

    def __init__(self, lease: Lease) -> None:
        self.lease = lease
        weakref.finalize(self, lease.release)


@dataclass(frozen=True)
class Item:
    """Bytes of a media item, encoded and decoded."""

    encoded: int
    decoded: int


@dataclass(frozen=True)
class Request:
    """Which items a request has; the turn in which it comes; after how many turns it gives up."""

    items: tuple[int, ...]
    comes: int
    gives_up: int | None


ITEMS = st.lists(st.builds(Item, st.integers(1, 130), st.integers(1, 130)), min_size=6, max_size=6)
REQUESTS = st.lists(
    st.builds(
        Request,
        items=st.lists(st.integers(0, 5), min_size=1, max_size=4, unique=True).map(tuple),
        comes=st.integers(0, 20),
        gives_up=st.none() | st.integers(0, 20),
    ),
    min_size=1,
    max_size=12,
)


class Server:
    """What a server does with requests, each step a turn of the event loop."""

    def __init__(self, items: list[Item], shared: bool, streamed: bool, announced: bool) -> None:
        self.budget = MediaBudget(BOUND, max_wait_s=3600)
        self.items = items
        self.shared = shared
        # Files arrive bit by bit, and their length may be known before.
        self.streamed = streamed
        self.announced = announced
        self.files: SingleFlight[Key, Media] = SingleFlight()
        self.decodes: SingleFlight[Key, Media] = SingleFlight()
        self.workers = asyncio.Semaphore(WORKERS)
        self.preprocessing = asyncio.Lock()

    async def serve(self, request: Request) -> str:
        """A request from its coming to its end."""
        claim = self.budget.claim()
        own = object()
        keys = [(i, None if self.shared else own) for i in request.items]
        try:
            files = await all_or_none(self.fetched(key, claim) for key in keys)
            frames = await all_or_none(
                self.decoded(key, file, claim) for key, file in zip(keys, files, strict=True)
            )
            del files
            async with self.preprocessing:
                await turns(2)
            assert all(one.lease.num_bytes for one in frames)
            return "served"
        except MediaTooLargeError:
            return "too large"
        finally:
            claim.end()

    async def fetched(self, key: Key, claim: Claim) -> Media:
        async def fetch() -> Media:
            lease = await claim.acquire(self.items[key[0]].encoded)
            try:
                await turns(3)
                return Media(lease)
            except asyncio.CancelledError:
                lease.release()
                raise

        async def stream() -> Media:
            size = self.items[key[0]].encoded
            lease = claim.lease()
            try:
                while arrived := await self.arriving(size, claim, lease):
                    lease.release()
                    guess = size if self.announced else 2 * arrived
                    sure = size if self.announced else arrived
                    lease = await claim.acquire(guess, sure=sure)
                    lease.resize(arrived)
                return Media(lease)
            except BaseException:
                lease.release()
                raise

        return await self.files.run(key, stream if self.streamed else fetch, claim)

    async def arriving(self, size: int, claim: Claim, lease: Lease) -> int:
        """Bytes of a file that had arrived when there was no room for them; 0 once it is whole."""
        arrived = 0
        while arrived < size:
            await turns(1)
            arrived = min(arrived + 7, size)
            missing = arrived - lease.num_bytes
            if missing > 0 and not claim.grow(lease, missing):
                return arrived
        return 0

    async def decoded(self, key: Key, file: Media, claim: Claim) -> Media:
        async def decode() -> Media:
            size = self.items[key[0]]
            lease = await claim.acquire(size.decoded, beside=size.encoded)
            try:
                async with self.workers:
                    await turns(3)
                    assert file.lease.num_bytes
                lease.resize((size.decoded + 1) // 2)
                return Media(lease)
            except asyncio.CancelledError:
                lease.release()
                raise

        return await self.decodes.run(key, decode, claim)


async def turns(count: int) -> None:
    for _ in range(count):
        await asyncio.sleep(0)


@example(
    items=[Item(118, 1), Item(49, 1), Item(1, 1), Item(13, 16), Item(83, 15), Item(80, 17)],
    requests=[
        Request((0, 2, 5, 3), 6, None),
        Request((5, 0, 1), 18, None),
        Request((4, 1, 0), 6, None),
        Request((0,), 14, None),
        Request((0,), 9, None),
        Request((0, 2, 1, 5), 9, None),
        Request((0, 1, 5), 6, None),
    ],
    shared=True,
    streamed=False,
    announced=False,
)
@example(
    items=[Item(101, 1)],
    requests=[Request((0,), 0, 11), Request((0,), 0, None)],
    shared=False,
    streamed=False,
    announced=False,
)
@settings(max_examples=25)
@given(
    items=ITEMS,
    requests=REQUESTS,
    shared=st.booleans(),
    streamed=st.booleans(),
    announced=st.booleans(),
)
def test_everybody_is_served_or_refused_and_the_bound_holds(
    items: list[Item], requests: list[Request], shared: bool, streamed: bool, announced: bool
) -> None:
    async def main() -> tuple[MediaBudget, list[asyncio.Task[str]]]:
        server = Server(items, shared, streamed, announced)
        tasks: dict[int, asyncio.Task[str]] = {}
        sizes = [item.encoded + item.decoded for item in items]
        most = max(sum(sizes[i] for i in r.items) for r in requests)
        if shared:
            # What a request that is done shared with others stays while the next one is the oldest.
            uses = Counter(i for r in requests for i in r.items)
            most += sum(sizes[i] for i, count in uses.items() if count > 1)
        # What a request held that gave up counts until its last turn.
        most += sum(sum(sizes[i] for i in r.items) for r in requests if r.gives_up is not None)
        for turn in range(10_000):
            for number, request in enumerate(requests):
                if request.comes == turn:
                    tasks[number] = asyncio.create_task(server.serve(request))
                if request.gives_up is not None and request.comes + request.gives_up == turn:
                    tasks[number].cancel()
            await asyncio.sleep(0)
            assert server.budget.used <= BOUND + most
            if len(tasks) == len(requests) and all(task.done() for task in tasks.values()):
                break
        else:
            raise AssertionError(f"they wait for each other: {server.budget.stats()}")
        return server.budget, [tasks[number] for number in range(len(requests))]

    budget, tasks = asyncio.run(main())
    for request, task in zip(requests, tasks, strict=True):
        if task.cancelled():
            assert request.gives_up is not None
        elif len(request.items) == 1:
            assert task.result() == "served"
        else:
            sizes = [items[i] for i in request.items]
            fits = sum(size.encoded + size.decoded for size in sizes) <= BOUND
            assert task.result() == "served" or not fits
    del task, tasks
    gc.collect()
    assert budget.used == 0
    assert budget.stats()["waiting"] == 0


async def test_a_later_request_does_not_pass_one_that_waits() -> None:
    budget = MediaBudget(BOUND)
    first = await budget.claim().acquire(60)
    order: list[str] = []

    async def ask(name: str, num_bytes: int) -> Lease:
        lease = await budget.claim().acquire(num_bytes)
        order.append(name)
        return lease

    oldest = budget.claim()
    await oldest.acquire(0)
    large = asyncio.create_task(ask("large", 80))
    await turns(2)
    small = asyncio.create_task(ask("small", 10))
    late = budget.claim()
    await turns(5)
    assert order == []
    assert not late.grow(late.lease(), 1)
    first.release()
    await asyncio.gather(large, small)
    assert order == ["large", "small"]


async def test_waiting_ends_with_a_refusal_and_leaves_nothing_behind() -> None:
    budget = MediaBudget(BOUND, max_wait_s=0.01)
    oldest = budget.claim()
    lease = await oldest.acquire(BOUND)
    for _ in range(2):
        with pytest.raises(BusyError, match=r"within 0\.01 s.*at most 100 bytes") as refused:
            await budget.claim().acquire(1)
        assert refused.value.status == 503
        assert refused.value.retry_after_s
    assert budget.used == BOUND
    lease.release()
    lease.release()
    assert (await budget.claim().acquire(BOUND)).num_bytes == BOUND
    assert (budget.stats()["refused"], budget.stats()["waiting"]) == (2, 0)


async def test_bytes_granted_at_the_moment_of_a_cancellation_are_given_back() -> None:
    budget = MediaBudget(BOUND)
    oldest = budget.claim()
    lease = await oldest.acquire(BOUND)
    waiting = asyncio.create_task(budget.claim().acquire(BOUND))
    await turns(2)
    lease.release()
    assert budget.used == BOUND  # The waiter's, which has not run yet.
    waiting.cancel()
    with suppress(asyncio.CancelledError):
        await waiting
    assert budget.used == 0


async def test_a_request_that_ends_makes_the_next_the_oldest() -> None:
    budget = MediaBudget(BOUND)
    ended: list[Callable[[Claim], None]] = [Claim.end, lambda _: None]
    for end in ended:
        first, second = budget.claim(), budget.claim()
        await first.acquire(BOUND)
        waiting = asyncio.create_task(second.acquire(10))
        await turns(3)
        assert not waiting.done()
        end(first)
        del first  # Without an end too: nobody can ask with it any more.
        assert (await waiting).num_bytes == 10
        second.end()
        del second, waiting
        budget = MediaBudget(BOUND)


async def test_a_request_that_cannot_fit_is_refused_but_a_single_item_passes() -> None:
    budget = MediaBudget(BOUND)
    claim = budget.claim()
    large = await claim.acquire(3 * BOUND)
    frames = await claim.acquire(BOUND, beside=3 * BOUND)
    with pytest.raises(MediaTooLargeError, match="past the limit of 100"):
        await claim.acquire(1)
    large.release()
    frames.release()
    assert (await claim.acquire(1)).num_bytes == 1


async def test_shared_work_waits_with_the_number_of_the_oldest_that_waits_for_it() -> None:
    budget = MediaBudget(BOUND)
    flights: SingleFlight[str, Lease] = SingleFlight()
    oldest, younger = budget.claim(), budget.claim()
    held = await oldest.acquire(BOUND)
    begun = asyncio.create_task(flights.run("k", lambda: younger.acquire(50), younger))
    await turns(5)
    assert not begun.done()
    # It waits for what can go on only once the oldest request, which waits for it, is done.
    assert (await flights.run("k", lambda: oldest.acquire(50), oldest)).num_bytes == 50
    assert await begun
    assert held.num_bytes == BOUND


async def test_a_request_is_as_old_as_those_it_works_for_only_while_it_works_for_them() -> None:
    budget = MediaBudget(BOUND)
    flights: SingleFlight[str, None] = SingleFlight()
    oldest, middle, younger = budget.claim(), budget.claim(), budget.claim()
    held = await oldest.acquire(BOUND)
    later = asyncio.create_task(middle.acquire(60))
    await turns(2)
    works = {name: asyncio.Event() for name in "ab"}

    async def work(name: str) -> None:
        await works[name].wait()

    runs = {
        name: [
            asyncio.create_task(flights.run(name, lambda n=name: work(n), claim))
            for claim in (younger, oldest)
        ]
        for name in works
    }
    await turns(2)
    works["a"].set()
    await asyncio.gather(*runs["a"])
    # It still works for the oldest request, which never waits.
    assert younger.grow(younger.lease(), 1)
    runs["b"][1].cancel()
    await asyncio.wait([runs["b"][1]])
    assert not younger.grow(younger.lease(), 1)
    waiting = asyncio.create_task(younger.acquire(50))
    held.release()
    assert (await later).num_bytes == 60
    await turns(2)
    assert not waiting.done()
    waiting.cancel()
    works["b"].set()
    await runs["b"][0]


async def test_what_is_only_guessed_makes_no_request_too_large() -> None:
    budget = MediaBudget(BOUND)
    claim = budget.claim()
    await claim.acquire(60)
    assert (await claim.acquire(80, sure=30)).num_bytes == 40
    with pytest.raises(MediaTooLargeError, match="at least 130 bytes"):
        await claim.acquire(80, sure=30)


def test_a_lease_grows_by_spare_bytes_as_far_as_there_is_room() -> None:
    budget = MediaBudget(BOUND)
    oldest, claim = budget.claim(), budget.claim()
    assert oldest.grow(oldest.lease(), 60)
    lease = claim.lease()
    assert claim.grow(lease, 10, spare=20)
    assert lease.num_bytes == 30
    assert claim.grow(lease, 5, spare=20)
    assert lease.num_bytes == 40
    assert not claim.grow(lease, 1)


def test_arrays_count_until_their_last_view_is_gone() -> None:
    budget = MediaBudget(BOUND)
    claim = budget.claim()
    lease = claim.lease()
    assert claim.grow(lease, 90)
    frames, sound = np.zeros(40, np.uint8), np.zeros(5, np.float32)
    lease.follow(frames, sound)
    assert budget.used == 60
    view = frames[10:].reshape(5, 6)
    del frames
    assert budget.used == 60
    del view
    assert budget.used == 20
    del sound
    assert budget.used == 0


def test_what_a_cache_keeps_counts_in_the_cache_alone() -> None:
    budget = MediaBudget(BOUND)
    claim = budget.claim()
    cache: ByteBudgetCache[int, Media] = ByteBudgetCache(
        50, lambda media: media.lease.num_bytes, lease_of=lambda media: media.lease
    )

    def made(num_bytes: int) -> Media:
        lease = claim.lease()
        assert claim.grow(lease, num_bytes)
        return Media(lease)

    first = made(30)
    cache.put(1, first)
    cache.put(1, first)
    assert (budget.used, cache.stats().num_bytes) == (0, 30)
    cache.put(2, made(40))  # Evicts the first, which is still in use.
    assert (budget.used, cache.stats().num_bytes) == (30, 40)
    del first
    assert (budget.used, cache.stats().num_bytes) == (0, 40)
    large = made(60)
    assert not cache.put(3, large)
    assert budget.used == 60
    cache.put(2, made(5))
    cache.discard(2)
    del large
    assert budget.used == 0


def test_threads_and_event_loops_share_a_budget() -> None:
    budget = MediaBudget(BOUND)
    most: list[int] = []

    async def ask(number: int) -> None:
        for step in range(50):
            claim = budget.claim()
            media = Media(await claim.acquire(20 + (number * step) % 30))
            most.append(budget.used)
            await asyncio.sleep(0)
            del media
            claim.end()

    threads = [threading.Thread(target=lambda n=n: asyncio.run(ask(n))) for n in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert budget.used == 0
    assert max(most) <= BOUND + 50
