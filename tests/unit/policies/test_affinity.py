"""Which data-parallel rank media go to."""

from __future__ import annotations

from collections import Counter
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from vllm.v1.engine.core_client import DPLBAsyncMPClient

from vllm_mm_ext.plugin import register
from vllm_mm_ext.policies.affinity import preference, rank_for


def test_content_is_spread_evenly() -> None:
    counts = Counter(preference(f"video{number}", 4)[0] for number in range(4000))
    assert all(850 < counts[rank] < 1150 for rank in range(4))


@given(st.text(max_size=20), st.integers(1, 12))
def test_a_rank_more_moves_only_what_goes_to_it(content: str, ranks: int) -> None:
    before, after = preference(content, ranks), preference(content, ranks + 1)
    assert [rank for rank in after if rank != ranks] == before


@given(st.text(max_size=20), st.lists(st.floats(0, 100), min_size=2, max_size=8))
def test_an_overloaded_rank_is_passed_over(content: str, loads: list[float]) -> None:
    mean = sum(loads) / len(loads)
    rank = rank_for(content, loads)
    assert rank is not None
    assert loads[rank] <= max(1.25 * mean, mean + 2)


def test_a_single_rank_is_left_to_vllm() -> None:
    assert rank_for("video", [3.0]) is None


@pytest.fixture
def client() -> Any:
    """vLLM's own routing over three engines, without its sockets."""
    register()
    made = object.__new__(DPLBAsyncMPClient)
    made.client_count = 1
    made.eng_start_index = 0
    made.reqs_in_flight = {}
    # vLLM 0.33 and later.
    made.streaming_reqs = set()
    made.core_engines = [b"0", b"1", b"2"]
    made.engine_inflight = Counter()
    # Finalizers look for it.
    made.resources = SimpleNamespace()
    made.lb_engines = [[0, 0, 0.0] for _ in range(3)]
    return made


def request(name: str, *digests: str, rank: int | None = None) -> Any:
    return SimpleNamespace(
        request_id=name,
        mm_features=[SimpleNamespace(identifier=digest) for digest in digests],
        data_parallel_rank=rank,
        # vLLM 0.33 keeps the requests of a streaming session on one rank.
        resumable=False,
        pooling_params=None,
    )


@pytest.mark.parametrize("api_servers", [1, 3, 8])
def test_requests_about_one_video_go_to_one_rank(client: Any, api_servers: int) -> None:
    client.client_count = api_servers
    chosen = {
        client.get_core_engine_for_request(request(f"r{turn}", "cat", f"rest{turn}"))
        for turn in range(4)
    }
    assert chosen == {str(preference("cat", 3)[0]).encode()}


def test_what_other_api_servers_sent_to_a_rank_counts(client: Any) -> None:
    first, second, _ = preference("cat", 3)
    client.lb_engines[first] = [0, 12, 0.0]
    assert client.get_core_engine_for_request(request("r", "cat")) == b"%d" % second


def test_a_text_that_vllm_routes_overloads_no_rank(client: Any) -> None:
    client.client_count = 8
    first, _, _ = preference("cat", 3)
    client.eng_start_index = first
    assert client.get_core_engine_for_request(request("text")) == b"%d" % first
    for turn in range(2):
        chosen = client.get_core_engine_for_request(request(f"r{turn}", "cat"))
        assert chosen == b"%d" % first
    # What the coordinator tells then counts as told, however the client had changed it before.
    client.lb_engines = [[12 if rank == first else 0, 0, 0.0] for rank in range(3)]
    assert client.get_core_engine_for_request(request("late", "cat")) != b"%d" % first


def test_a_rank_that_a_client_names_stands(client: Any) -> None:
    other = preference("cat", 3)[2]
    assert client.get_core_engine_for_request(request("r", "cat", rank=other)) == b"%d" % other


def test_text_is_balanced_by_vllm(client: Any) -> None:
    chosen = Counter(client.get_core_engine_for_request(request(f"t{n}")) for n in range(9))
    assert set(chosen.values()) == {3}
