"""What answers about long videos report."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from vllm_mm_ext.long_video.asking import Cost, Window
from vllm_mm_ext.long_video.looking import Progress, SeenWindow
from vllm_mm_ext.long_video.notes import Entry
from vllm_mm_ext.long_video.running import Outcome
from vllm_mm_ext.request.long_report import LongVideoReport

MADE = Cost(prompt_tokens=100, cached_tokens=30, completion_tokens=5, seconds=1.5)
FIRST, SECOND, THIRD = (Window(0, number, 28.0 * number, 28.0 * number + 30) for number in range(3))
NOTED = SeenWindow(FIRST, entries=(Entry(0, 12.0, "blue flash", 0),), cost=MADE)
KEPT = SeenWindow(SECOND, is_kept=True, kept_cost=MADE, relevance=0.25, is_close=True)
OUTCOME = Outcome("search", (), (NOTED, KEPT), (THIRD,), False, MADE)


def block(shows_cache_hits: bool) -> dict[str, Any]:
    return LongVideoReport("search", shows_cache_hits, OUTCOME).block()


def test_a_window_is_told_with_what_is_known_of_it() -> None:
    first, second = block(True)["windows"]
    assert first["note"] == "[0:00:12] blue flash"
    assert (first["start"], first["end"]) == (0.0, 30.0)
    assert first.keys() & {"relevance", "close", "failed"} == set()
    assert "note" not in second
    assert (second["relevance"], second["close"]) == (0.25, True)
    assert [place["window"] for place in block(True)["left_out"]] == [2]


@pytest.mark.parametrize("is_thinned", [True, False])
def test_notes_for_which_there_was_no_room_are_told(is_thinned: bool) -> None:
    report = LongVideoReport("search", False, replace(OUTCOME, is_thinned=is_thinned))
    assert report.block()["thinned"] is is_thinned


def test_where_cache_hits_are_told_a_kept_note_costs_nothing() -> None:
    told = block(True)
    assert [window["kept"] for window in told["windows"]] == [False, True]
    assert told["windows"][1]["cost"]["prompt_tokens"] == 0
    assert told["cost"]["prompt_tokens"] == MADE.prompt_tokens
    assert told["cost"]["cached_tokens"] == MADE.cached_tokens


def test_where_cache_hits_are_not_told_a_kept_note_looks_like_a_new_one() -> None:
    told = block(False)
    first, second = told["windows"]
    assert first["cost"] == second["cost"]
    assert first.keys() - second.keys() == {"note"}
    assert told["cost"]["prompt_tokens"] == 2 * MADE.prompt_tokens
    assert "kept" not in str(told)
    assert "cached" not in str(told)
    assert "seconds" not in str(told)


def test_a_video_answered_in_one_pass_has_no_windows_and_no_cost() -> None:
    report = LongVideoReport("single", True)
    assert report.block() == {"strategy": "single"}
    assert report.cost == Cost()


@pytest.mark.parametrize("streamed", [True, False])
def test_the_times_that_an_answer_names_are_told(streamed: bool) -> None:
    report = LongVideoReport("search", False, OUTCOME)
    if streamed:
        for text in ("At 0:2", "8:52, and again at ", "[1:00:01]."):
            report.hear(f'data: {{"choices":[{{"index":0,"delta":{{"content":"{text}"}}}}]}}\n\n')
        report.hear("data: [DONE]\n\n")
    else:
        report.hear_all(["At 0:28:52, and again at [1:00:01].", None])
    assert report.block()["cited"] == [28 * 60 + 52, 3601]


def test_progress_tells_the_window_and_its_note_without_its_cost() -> None:
    told = LongVideoReport("map_reduce", True).progress(Progress(1, 3, NOTED))
    assert (told["done"], told["total"], told["window"]) == (1, 3, 0)
    assert told["note"] == "[0:00:12] blue flash"
    assert "cost" not in told
