"""Routers of the simulated fleet."""

from __future__ import annotations

import math
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllm_mm_ext.fleet.maglev import TABLE_SIZE, maglev_table
from vllm_mm_ext.fleet.simulated_routers import BALANCE_FACTOR, ROUTERS, Hashed


@given(st.lists(st.integers(0, 10_000), min_size=1, max_size=12, unique=True))
def test_every_server_has_as_many_places_as_the_others(servers):
    counts = Counter(maglev_table(servers, 251))
    assert set(counts) == set(servers)
    assert max(counts.values()) - min(counts.values()) <= 1


def test_few_places_change_hands_when_a_server_goes():
    servers = list(range(20))
    before, after = maglev_table(servers), maglev_table(servers[1:])
    moved = sum(one not in (0, other) for one, other in zip(before, after, strict=True))
    assert moved < 0.1 * TABLE_SIZE


@pytest.mark.parametrize("servers", [[], list(range(8))])
def test_a_table_is_refused_without_servers_or_with_too_many(servers):
    with pytest.raises(ValueError, match="from 1 to 7 servers"):
        maglev_table(servers, 7)


# Maglev's table is made at the first use, which takes long.
@given(st.lists(st.integers(0, 9), min_size=1, max_size=400), st.integers(1, 9))
def test_no_replica_gets_more_than_its_bound_however_hot_a_video_is(videos, count):
    router = Hashed(by_media=True, balance=BALANCE_FACTOR)
    router.serve_by(range(count))
    loads = [0] * count
    for total, video in enumerate(videos):
        chosen = router.choose(total, video, loads, total)
        # As with Envoy, a replica may take one more than its slots.
        of_all = math.ceil((total + 1) * BALANCE_FACTOR / 100)
        assert loads[chosen] <= max(1, math.ceil(of_all / count))
        loads[chosen] += 1


@pytest.mark.parametrize("name", sorted(ROUTERS))
def test_routers_choose_among_those_that_serve(name):
    router = ROUTERS[name](0)
    router.serve_by([1, 3])
    assert {router.choose(key, key, [0] * 4, 0) for key in range(200)} == {1, 3}


def test_a_medium_and_a_session_keep_their_replica():
    media, session = ROUTERS["media-key-unbounded"](0), ROUTERS["session"](0)
    for router in (media, session):
        router.serve_by(range(8))
    assert len({media.choose(number, 5, [], 0) for number in range(50)}) == 1
    assert len({session.choose(5, number, [], 0) for number in range(50)}) == 1
    # Without a medium the session decides.
    assert len({media.choose(5, -1, [], 0) for _ in range(50)}) == 1
    assert len({media.choose(number, -1, [], 0) for number in range(200)}) == 8
