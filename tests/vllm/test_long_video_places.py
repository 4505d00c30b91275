"""How many requests about long videos a server answers at once."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import pytest

from vllm_mm_ext.adapters.long_video.chat_chunks import Head
from vllm_mm_ext.adapters.long_video.long_chat import _LongChat
from vllm_mm_ext.adapters.long_video.state import LongVideoState, Place
from vllm_mm_ext.config.long_video_settings import LongVideoSettings
from vllm_mm_ext.errors import BusyError
from vllm_mm_ext.long_video.looking import Progress


def test_a_place_is_free_again_once_it_is_left_and_no_more_than_that() -> None:
    state = LongVideoState(LongVideoSettings(max_requests=2))
    first, _second = state.enter(), state.enter()
    with pytest.raises(BusyError, match="max_requests"):
        state.enter()
    first.leave()
    first.leave()
    third = state.enter()
    assert state.stats()["requests"] == 2
    third.leave()


def test_a_place_that_nobody_holds_any_more_is_free() -> None:
    state = LongVideoState(LongVideoSettings(max_requests=1))
    place = state.enter()
    del place
    assert state.stats()["requests"] == 0


class _SlowToEnd(_LongChat):
    """A chat whose looks take a while to end after they are cancelled."""

    def __init__(self, place: Place) -> None:
        self._place, self._context = place, None

    def _head(self) -> Head:
        return Head("chatcmpl-1", "model")

    async def _looked(self, progress: Callable[[Progress], None]) -> Any:
        del progress
        try:
            await asyncio.sleep(60)
        finally:
            await asyncio.sleep(0.05)


async def test_a_stream_that_is_cancelled_more_than_once_gives_its_place_up() -> None:
    state = LongVideoState(LongVideoSettings())
    place = state.enter()
    events = _SlowToEnd(place).stream()

    async def first() -> str:
        return await anext(events)

    sending = asyncio.create_task(first())
    for _ in range(2):
        await asyncio.sleep(0.01)
        sending.cancel()
    with pytest.raises(asyncio.CancelledError):
        await sending
    assert state.stats()["requests"] == 0
