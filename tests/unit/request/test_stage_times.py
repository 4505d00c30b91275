"""Stages of a media item, placed in time."""

from __future__ import annotations

import math

from hypothesis import given
from hypothesis import strategies as st

from vllm_mm_ext.request.stage_times import ITEM_STAGES, item_stages

_WORK = st.dictionaries(
    st.sampled_from(["probe", "profile", "decode", "audio", "resample"]), st.floats(0, 100)
)


def test_an_item_out_of_the_cache_was_only_fetched():
    assert item_stages({}, fetch_s=0.5, use_s=0.25, ended=100.0) == [("fetch", 99.25, 0.5)]


def test_what_no_stage_took_is_waiting():
    work = {"probe": 1.0, "profile": 2.0, "decode": 3.0, "audio": 1.0, "resample": 0.5}
    placed = item_stages(work, fetch_s=4.0, use_s=10.0, ended=100.0)
    assert placed == [
        ("fetch", 86.0, 4.0),
        ("probe", 90.0, 1.0),
        ("wait", 91.0, 3.5),
        ("sample", 94.5, 2.0),
        ("decode", 96.5, 3.0),
        ("audio", 96.5, 1.0),
        ("resample", 99.5, 0.5),
    ]


@given(_WORK, st.floats(0, 100), st.floats(0, 100))
def test_every_stage_is_known_and_none_ends_after_the_item(work, fetch_s, use_s):
    placed = item_stages(work, fetch_s=fetch_s, use_s=use_s, ended=1000.0)
    assert {stage for stage, _, _ in placed} <= set(ITEM_STAGES)
    assert len(placed) >= len(work) + 1
    for stage, began, seconds in placed:
        # A probe that another request had begun may be longer than this request waited.
        limit = 1000.0 + (seconds if stage == "probe" else 0.0)
        assert began + seconds <= limit or math.isclose(began + seconds, limit)
