"""Scheduler, block pool and encoder cache change no greedy answer, whatever is preempted.

On CPUs vLLM schedules synchronously; ``test_scheduler_steps`` drives the asynchronous class.
"""

from __future__ import annotations

from typing import Any

import pytest
from engine_script import run_script
from scheduler_engine import SESSIONS

pytestmark = pytest.mark.engine

MODES = {"stock": "Scheduler", "plugin": "MMExtScheduler"}


@pytest.fixture(scope="module")
def outcomes() -> dict[str, Any]:
    """What each mode says."""
    return {mode: run_script("scheduler_engine.py", mode, timeout_s=400) for mode in MODES}


@pytest.mark.timeout(1200)
def test_200_mixed_requests_get_the_answers_of_stock(outcomes: dict[str, Any]) -> None:
    assert outcomes["plugin"]["tokens"] == outcomes["stock"]["tokens"]


@pytest.mark.timeout(1200)
@pytest.mark.parametrize(("mode", "name"), MODES.items())
def test_requests_were_preempted_and_none_is_left(
    outcomes: dict[str, Any], mode: str, name: str
) -> None:
    """Otherwise equal answers would prove little."""
    found = outcomes[mode]
    assert found["scheduler"] == name
    assert found["preempted"] > 5
    assert found["items"] >= 12
    assert found["left"] == 0


@pytest.mark.timeout(1200)
def test_encoder_outputs_were_evicted(outcomes: dict[str, Any]) -> None:
    """Otherwise equal answers would say nothing about the caches.

    How many are loaded again depends on how fast the machine is: KV may be there instead.
    """
    found = outcomes["plugin"]
    assert found["caches"] == ["MMExtEncoderCacheManager", "MMExtECConnector", "MMExtBlockPool"]
    assert found["evicted"] > 12
    assert found["sessions"] == SESSIONS


@pytest.mark.timeout(1200)
def test_a_video_found_in_kv_is_encoded_again_when_its_kv_is_gone(outcomes: dict[str, Any]) -> None:
    stock, plugin = (outcomes[mode] for mode in MODES)
    assert plugin["cut_short"] == stock["cut_short"]
    assert plugin["items_again"] > plugin["items"]


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_lora_speculative_decoding_and_an_emptied_prefix_cache_change_no_answer() -> None:
    stock, plugin = (
        run_script("scheduler_combinations_engine.py", mode, timeout_s=400) for mode in MODES
    )
    assert plugin["scheduler"] == "MMExtScheduler"
    assert plugin["tokens"] == stock["tokens"]
    with_one, with_the_other = plugin["tokens"]
    assert with_one != with_the_other
    for found in (stock, plugin):
        assert found["reset"] == [True] * 2
        assert found["drafts"] > 300
        assert found["preempted"] > 0
        assert found["left"] == 0
