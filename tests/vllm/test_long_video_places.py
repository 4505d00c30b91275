"""How many requests about long videos a server answers at once."""

from __future__ import annotations

import pytest

from vllm_mm_ext.adapters.long_video.state import LongVideoState
from vllm_mm_ext.config.long_video_settings import LongVideoSettings
from vllm_mm_ext.errors import BusyError


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
