"""API servers of a service ask each other."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from typing import Any

import pytest
import uvloop

from vllm_mm_ext.base.peers import Answer, PeerError, Peers


@asynccontextmanager
async def service(*answers: Answer) -> AsyncIterator[list[Peers]]:
    name = uuid.uuid4().hex
    peers = [Peers(name, i, len(answers), answer) for i, answer in enumerate(answers)]
    for peer in peers:
        await peer.start()
    try:
        yield peers
    finally:
        for peer in peers:
            if peer._server is not None:
                peer._server.close()


def telling(index: int) -> Answer:
    async def answer(question: Mapping[str, Any]) -> Any:
        return {"index": index, "heard": question}

    return answer


def test_servers_answer_on_the_event_loop_that_vllm_uses() -> None:
    async def ask() -> list[Any]:
        async with service(telling(0), telling(1)) as (peer, _):
            return await peer.ask_all({"do": "x" * 300_000}, 5.0)

    assert [one["index"] for one in uvloop.run(ask())] == [0, 1]


async def test_all_servers_answer_in_their_order_whichever_is_asked() -> None:
    async with service(*(telling(i) for i in range(3))) as peers:
        for peer in peers:
            answers = await peer.ask_all({"do": "x", "long": "y" * 200_000}, 5.0)
            assert [one["index"] for one in answers] == [0, 1, 2]
            assert all(len(one["heard"]["long"]) == 200_000 for one in answers)


async def test_a_single_server_asks_itself_without_a_socket() -> None:
    async with service(telling(0)) as (peer,):
        assert await peer.ask_all({}, 1.0) == [{"index": 0, "heard": {}}]
        other = Peers(peer._service, 1, 2, telling(1))
        with pytest.raises(PeerError, match="API server 0 does not answer"):
            await other.ask_all({}, 1.0)


async def test_a_server_that_fails_or_hangs_is_named() -> None:
    async def failing(_: Any) -> Any:
        raise RuntimeError("no such thing")

    async def hanging(_: Any) -> Any:
        await asyncio.Event().wait()

    async with service(telling(0), failing) as (peer, _):
        with pytest.raises(PeerError, match="API server 1 failed: RuntimeError: no such thing"):
            await peer.ask_all({}, 5.0)
    async with service(telling(0), hanging) as (peer, _):
        with pytest.raises(PeerError, match="API server 1 does not answer"):
            await peer.ask_all({}, 0.05)


async def test_a_name_that_is_taken_is_told() -> None:
    async with service(telling(0), telling(1)) as (peer, _):
        with pytest.raises(OSError, match="in use"):
            await Peers(peer._service, 1, 2, telling(1)).start()


async def test_nothing_is_asked_of_a_process_of_another_user(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async with service(telling(0), telling(1)) as (peer, _):
        monkeypatch.setattr("vllm_mm_ext.base.peers._is_ours", lambda _: False)
        with pytest.raises(PeerError, match="another user"):
            await peer.ask_all({}, 5.0)
