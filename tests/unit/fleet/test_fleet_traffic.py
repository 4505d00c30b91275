"""Requests of the simulated fleet, and their files."""

from __future__ import annotations

import random
from collections import Counter, defaultdict
from dataclasses import replace
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st
from small_fleet import TRAFFIC

from vllm_mm_ext.fleet.quantiles import Quantiles
from vllm_mm_ext.fleet.traffic import UNIT_S, Ask
from vllm_mm_ext.fleet.traffic_file import TraceError, read_trace, write_trace


def test_requests_come_in_order_at_their_rate_and_popular_videos_more_often():
    traffic = replace(TRAFFIC, requests=20_000, videos=1000, zipf=1.0)
    asks = list(traffic.asks())
    assert len(asks) == 20_000
    assert asks == sorted(asks, key=lambda ask: ask.at)
    assert asks[-1].at == pytest.approx(20_000 / traffic.rate, rel=0.1)
    firsts = Counter(ask.media for ask in asks if ask.media >= 0)
    assert firsts[0] > 1.5 * firsts[2] > 2 * firsts[20]
    turns = Counter(ask.session for ask in asks)
    assert len(asks) / len(turns) == pytest.approx(traffic.turns, rel=0.1)


def test_live_sessions_send_a_unit_after_the_other_and_end():
    traffic = replace(TRAFFIC, requests=3000, rate=1.0, live=4)
    units = defaultdict(list)
    for ask in traffic.asks():
        if ask.live:
            units[ask.session].append(ask)
    assert all(ask.kind == 1 for of_one in units.values() for ask in of_one)
    for of_one in units.values():
        gaps = [after.at - ask.at for ask, after in pairwise(of_one)]
        assert gaps == pytest.approx([UNIT_S] * len(gaps))
        assert len({ask.media for ask in of_one}) == len(of_one)
        assert [ask.last for ask in of_one[:-1]] == [False] * (len(of_one) - 1)
    assert sum(of_one[-1].last for of_one in units.values()) == len(units) - 4


def test_a_written_trace_is_read_as_it_was(tmp_path):
    asks = [*replace(TRAFFIC, live=1).asks(), Ask(1e6, 1, kept=False)]
    file = tmp_path / "trace.jsonl"
    assert list(write_trace(iter(asks), file)) == asks
    assert list(read_trace(file, 2)) == asks


def test_sessions_and_media_of_a_trace_may_have_names(tmp_path):
    file = tmp_path / "trace.jsonl"
    file.write_text(
        '{"at": 0, "session": "a", "media": "x.mp4", "text": 5}\n\n'
        '{"at": 1, "session": "b", "media": "x.mp4"}\n{"at": 2, "session": "a", "last": true}\n'
    )
    one, two, three = read_trace(file, 1)
    assert one.media == two.media > 1 << 56
    assert one.session == three.session != two.session
    assert three == Ask(2.0, one.session, last=True)


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ('{"at": -1, "session": 1}', "at"),
        ('{"at": 0, "session": 1}', "at 0 is before 5"),
        ('{"at": 9, "session": 1, "sesion": 2}', "sesion"),
        ('{"at": 9, "session": 1, "kind": 3}', "kind 3, there are 2 kinds"),
        ('{"at": 9, "session": 1, "output": 0}', "output"),
        ("{", "truncated"),
        ("\udc80", "invalid"),
    ],
)
def test_a_bad_line_is_named_with_its_number_and_cause(line, words, tmp_path):
    file = tmp_path / "trace.jsonl"
    good = '{"at": 5, "session": 1}\n'
    file.write_bytes((good + line).encode("utf-8", "surrogateescape"))
    with pytest.raises(TraceError, match=r"trace.jsonl:2: ") as error:
        list(read_trace(file, 2))
    assert words in str(error.value)


@given(st.lists(st.floats(1e-5, 1e6), min_size=1), st.sampled_from([0.0, 0.5, 0.9, 1.0]))
def test_quantiles_are_within_one_percent_of_a_value_of_that_rank(values, share):
    counted = Quantiles()
    for value in values:
        counted.add(value)
    exact = sorted(values)[int(share * (len(values) - 1))]
    assert counted.at(share) == pytest.approx(exact, rel=0.0101)


def test_quantiles_of_two_are_those_of_all_values():
    source = random.Random(1)
    one, other, both = Quantiles(), Quantiles(), Quantiles()
    for number in range(1000):
        value = source.lognormvariate(0, 1)
        both.add(value)
        (one if number % 3 else other).add(value)
    together = one.with_those_of(other)
    assert [together.at(share / 10) for share in range(11)] == [
        both.at(share / 10) for share in range(11)
    ]
