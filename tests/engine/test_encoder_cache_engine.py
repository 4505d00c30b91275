"""Both tiers of the encoder cache in a real engine: nothing but the work changes."""

from __future__ import annotations

from typing import Any

import pytest
from engine_script import run_script

pytestmark = pytest.mark.engine


@pytest.fixture(scope="module")
def outcome(tmp_path_factory: pytest.TempPathFactory) -> Any:
    env = {"VLLM_PLUGINS": "", "VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
    media = tmp_path_factory.mktemp("media")
    return run_script("encoder_cache_engine.py", media, timeout_s=500, env=env)


def assert_equal(got: list[Any], expected: list[Any]) -> None:
    assert len(got) == len(expected)
    for one, other in zip(got, expected, strict=True):
        assert one["prompt"] == other["prompt"]
        assert one["tokens"] == other["tokens"]
        assert one["logprobs"] == pytest.approx(other["logprobs"], abs=2e-3)


def test_answers_are_stocks_whatever_is_evicted_and_loaded(outcome: Any) -> None:
    assert outcome["off"] == []
    assert outcome["classes"] == ["MMExtEncoderCacheManager", "MMExtECConnector"]
    for ours, stock in zip(outcome["plugin"], outcome["stock"], strict=True):
        assert_equal(ours, stock)
    assert_equal(outcome["after reset_mm_cache"][0], outcome["stock"][0])
    assert_equal(outcome["after reset_encoder_cache"][0], outcome["stock"][0])


def test_nothing_is_encoded_twice_while_the_host_tier_has_it(outcome: Any) -> None:
    first, *later = outcome["encoded"]
    # Segments: stock encodes whole videos.
    assert first > 2 * outcome["stock_encoded"][0]
    assert later == [0, 0]
    held, capacity, host = outcome["device"]
    assert held <= capacity
    # The device tier alone could not have done it.
    assert capacity < host / 2


def test_new_weights_empty_both_tiers_and_new_processor_caches_neither(outcome: Any) -> None:
    assert outcome["after reset_mm_cache"][1] == 0
    assert outcome["after reset_encoder_cache"][1] == outcome["encoded"][0]


def test_kept_outputs_keep_nothing_else_in_memory(outcome: Any) -> None:
    # Outputs of one encoder call are views of one tensor, until each is copied out of it.
    _, capacity, _ = outcome["device"]
    assert 0 < outcome["device_memory"] <= capacity


def test_clients_still_cannot_send_embeddings(outcome: Any) -> None:
    assert "--enable-mm-embeds" in outcome["refusal"]
