"""Rendezvous hashing."""

from hypothesis import given
from hypothesis import strategies as st

from vllm_mm_ext.fleet.rendezvous import ranked

_SERVERS = st.lists(st.text(min_size=1, max_size=8), min_size=1, max_size=8, unique=True)


@given(st.text(), _SERVERS, st.randoms(use_true_random=False))
def test_the_order_of_servers_does_not_depend_on_the_order_in_which_they_are_listed(
    key: str, servers: list[str], random: object
) -> None:
    shuffled = list(servers)
    random.shuffle(shuffled)  # type: ignore[attr-defined]
    assert ranked(key, servers) == ranked(key, shuffled)


@given(st.text(), _SERVERS)
def test_a_server_that_goes_leaves_the_order_of_the_others_as_it_was(
    key: str, servers: list[str]
) -> None:
    order = ranked(key, servers)
    for gone in servers:
        left = [server for server in servers if server != gone]
        assert ranked(key, left) == [server for server in order if server != gone]


def test_a_server_that_comes_takes_about_its_share_of_the_keys_and_no_other_key_moves() -> None:
    servers = [f"http://server-{n}:8000" for n in range(9)]
    keys = [f"key {n}" for n in range(20_000)]
    before = {key: ranked(key, servers)[0] for key in keys}
    after = {key: ranked(key, [*servers, "http://new:8000"])[0] for key in keys}
    moved = [key for key in keys if before[key] != after[key]]
    assert {after[key] for key in moved} == {"http://new:8000"}
    assert len(moved) / len(keys) <= 1.3 / 10
