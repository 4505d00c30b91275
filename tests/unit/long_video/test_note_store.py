"""The store of notes: bounded in bytes and time, one ask for one reply."""

from __future__ import annotations

import asyncio

import pytest

from vllm_mm_ext.long_video.asking import AskFailedError, Cost, Reply
from vllm_mm_ext.long_video.note_store import NoteStore

NOTE = Reply("[0] a man enters", cost=Cost(100, 0, 6, 0.5), activity=0.3)


class Asker:
    """Counts asks; each waits until it is told to end."""

    def __init__(self) -> None:
        self.asked = 0
        self.go = asyncio.Event()
        self.fails = 0

    async def ask(self) -> Reply:
        self.asked += 1
        await self.go.wait()
        if self.asked <= self.fails:
            raise AskFailedError("no")
        return NOTE


async def settle() -> None:
    for _ in range(10):
        await asyncio.sleep(0)


async def answer(text: str = "x") -> Reply:
    return Reply(text)


async def test_a_kept_reply_is_given_without_an_ask() -> None:
    store, asker = NoteStore(1 << 20, 60), Asker()
    asker.go.set()
    assert await store.reply("k", asker.ask) == (NOTE, False)
    assert await store.reply("k", asker.ask) == (NOTE, True)
    assert store.kept("k") == NOTE
    assert asker.asked == 1


async def test_concurrent_calls_for_one_reply_ask_once() -> None:
    store, asker = NoteStore(1 << 20, 60), Asker()
    calls = [asyncio.create_task(store.reply("k", asker.ask)) for _ in range(5)]
    await settle()
    asker.go.set()
    replies = await asyncio.gather(*calls)
    assert asker.asked == 1
    assert sorted(was_kept for _, was_kept in replies) == [False, True, True, True, True]


@pytest.mark.parametrize("ending", ["fails", "is cancelled"])
async def test_when_the_one_that_asks_ends_without_a_reply_another_one_asks(ending: str) -> None:
    store, asker = NoteStore(1 << 20, 60), Asker()
    calls = [asyncio.create_task(store.reply("k", asker.ask)) for _ in range(3)]
    await settle()
    if ending == "fails":
        asker.fails = 1
    else:
        calls[0].cancel()
        await settle()
    asker.go.set()
    first, *others = await asyncio.gather(*calls, return_exceptions=True)
    assert isinstance(first, AskFailedError if ending == "fails" else asyncio.CancelledError)
    assert others == [(NOTE, False), (NOTE, True)]
    assert asker.asked == 2


async def test_the_least_recently_used_replies_go_first_and_the_budget_holds() -> None:
    store = NoteStore(20_000, 60)
    for number in range(1000):
        await store.reply(f"k{number}", lambda: answer("x" * 500))
        assert store.kept("k0") is not None  # In use, so it stays.
        assert store.num_bytes <= 20_000
    assert 5 < len(store) < 20
    assert store.kept("k1") is None


async def test_a_reply_larger_than_the_budget_is_given_but_not_kept() -> None:
    store = NoteStore(5_000, 60)
    assert (await store.reply("k", lambda: answer("x" * 10_000)))[0].text == "x" * 10_000
    assert len(store) == 0


async def test_a_reply_is_kept_for_its_time_only() -> None:
    now = 0.0
    store = NoteStore(1 << 20, 60, lambda: now)
    await store.reply("k", answer)
    now = 59.0
    assert store.kept("k") is not None
    now = 61.0
    assert store.kept("k") is None
    assert (len(store), store.num_bytes) == (0, 0)


async def test_a_reply_that_was_asked_for_before_all_were_forgotten_is_not_kept() -> None:
    store, asker = NoteStore(1 << 20, 60), Asker()
    asking = asyncio.create_task(store.reply("k", asker.ask))
    await settle()
    store.clear()
    asker.go.set()
    assert await asking == (NOTE, False)
    assert store.kept("k") is None
    await store.reply("k", asker.ask)
    assert store.kept("k") == NOTE
