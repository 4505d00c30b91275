"""What a trace of engine steps tells, on steps written down by hand; engines are traced in
``test_segments_engine.py``."""

from __future__ import annotations

import json

import pytest
from rich.console import Console

from vllm_mm_ext.testing.step_trace import EncodedItem, RequestWork, Step, StepTrace, record_steps


def item(index: int) -> EncodedItem:
    return EncodedItem(index, "video", 64, 8 + 64 * index)


TRACE = StepTrace(
    [
        Step(0.0, (RequestWork(0, (item(0), item(1)), 0, 100, 0),), ()),
        Step(0.1, (RequestWork(0, (item(2),), 100, 60, 0), RequestWork(1, (), 32, 10, 0)), ()),
        Step(0.2, (RequestWork(0, (), 160, 10, 1), RequestWork(1, (), 42, 0, 1)), (1,)),
    ]
)


def test_items_and_cached_tokens_are_told_per_request() -> None:
    assert [one.index for one in TRACE.encoded(0)] == [0, 1, 2]
    assert TRACE.encoded(1) == []
    assert len(TRACE.encoded()) == 3
    assert [TRACE.cached_tokens(number) for number in TRACE.requests()] == [0, 32]


def test_a_step_overlaps_if_more_is_encoded_after_it() -> None:
    assert TRACE.overlapping_steps() == 1
    assert StepTrace(TRACE.steps[1:]).overlapping_steps() == 0


def test_the_table_shows_items_as_ranges_and_the_json_everything() -> None:
    console = Console(width=160, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    TRACE.print(console)
    text = console.export_text()
    for shown in ("0-1", "128", "100"):
        assert shown in text
    steps = json.loads(TRACE.to_json())
    assert [len(step["work"]) for step in steps] == [1, 2, 2]
    assert steps[1]["work"][0]["encoded"][0]["offset"] == 136


def test_an_engine_in_another_process_is_refused() -> None:
    class Elsewhere:
        llm_engine = type("Engine", (), {"engine_core": object()})()

    with (
        pytest.raises(ValueError, match="VLLM_ENABLE_V1_MULTIPROCESSING"),
        record_steps(Elsewhere()),
    ):
        pass
