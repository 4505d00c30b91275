"""The front-end's private event loop."""

from __future__ import annotations

import asyncio
import socket
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from vllm_mm_ext.errors import BusyError
from vllm_mm_ext.media import loop_thread
from vllm_mm_ext.media.loop_thread import LoopThread


async def test_names_whose_servers_do_not_answer_hold_up_no_other_blocking_call(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    begun, answer = threading.Semaphore(0), threading.Event()

    def look_up(*_: object, **__: object) -> list[Any]:
        begun.release()
        answer.wait()
        return []

    monkeypatch.setattr(socket, "getaddrinfo", look_up)
    thread = LoopThread("test", workers=1)

    async def nothing() -> None:
        """Nothing is to be closed."""

    async def ask() -> list[Any]:
        return await asyncio.get_running_loop().getaddrinfo("dead.test", 80, type=0)

    try:
        lookups = [thread.submit(ask()) for _ in range(40)]
        await asyncio.to_thread(begun.acquire)
        assert await thread.run(asyncio.to_thread(lambda: "done")) == "done"
        answer.set()
        assert [await asyncio.wrap_future(one) for one in lookups] == [[]] * 40
    finally:
        answer.set()
        thread.stop(nothing())


async def test_a_name_that_finds_only_dead_name_servers_in_the_way_is_busy_and_not_at_fault(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    begun, answer = threading.Semaphore(0), threading.Event()

    def look_up(host: str, *_: object, **__: object) -> list[Any]:
        if host == "dead.test":
            begun.release()
            answer.wait()
        return [host]

    monkeypatch.setattr(socket, "getaddrinfo", look_up)
    monkeypatch.setattr(loop_thread, "_LOOKUPS", 2)
    monkeypatch.setattr(loop_thread, "_LOOKUP_WAIT_S", 0.05)
    thread = LoopThread("test")

    async def nothing() -> None:
        """Nothing is to be closed."""

    async def ask(host: str) -> list[Any]:
        return await asyncio.get_running_loop().getaddrinfo(host, 80, type=0)

    try:
        for one in [thread.submit(ask("dead.test")) for _ in range(2)]:
            await asyncio.to_thread(begun.acquire)
            one.cancel()
        with pytest.raises(BusyError):
            await thread.run(ask("good.test"))
        answer.set()
        monkeypatch.setattr(loop_thread, "_LOOKUP_WAIT_S", 30.0)
        assert await thread.run(ask("good.test")) == ["good.test"]
    finally:
        answer.set()
        thread.stop(nothing())


async def test_names_that_find_no_thread_take_no_place_of_later_ones(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(socket, "getaddrinfo", lambda host, *_, **__: [host])
    monkeypatch.setattr(loop_thread, "_LOOKUPS", 2)
    monkeypatch.setattr(loop_thread, "_LOOKUP_WAIT_S", 0.05)
    thread = LoopThread("test")

    async def nothing() -> None:
        """Nothing is to be closed."""

    async def ask() -> list[Any]:
        return await asyncio.get_running_loop().getaddrinfo("good.test", 80, type=0)

    def fail(*_: object) -> None:
        raise RuntimeError("can't start new thread")

    try:
        with monkeypatch.context() as patch:
            patch.setattr(ThreadPoolExecutor, "submit", fail)
            for _ in range(2):
                with pytest.raises(BusyError, match="no thread can start"):
                    await thread.run(ask())
        assert await thread.run(ask()) == ["good.test"]
    finally:
        thread.stop(nothing())
