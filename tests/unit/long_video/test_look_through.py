"""Looking through hours of video with a simulated model: nothing lost, nothing past its bounds."""

from __future__ import annotations

import asyncio
from collections import Counter
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from simulated_model import SimulatedModel, count, planted

from vllm_mm_ext.config.long_video_settings import LongVideoOptions, LongVideoSettings
from vllm_mm_ext.errors import OptionBoundError
from vllm_mm_ext.long_video.asking import AskFailedError
from vllm_mm_ext.long_video.looking import Progress
from vllm_mm_ext.long_video.note_store import NoteStore
from vllm_mm_ext.long_video.question_kind import UsedStrategy
from vllm_mm_ext.long_video.running import Outcome, look_through
from vllm_mm_ext.long_video.task import Task, task_of

HOURS = 2 * 3600.0
QUESTION = "How many blue flashes are there?"
STRATEGIES: list[UsedStrategy] = ["rolling", "map_reduce", "search"]


def task(strategy: UsedStrategy, *durations: float, **changes: Any) -> Task:
    """A task; ``changes`` are the request's options, or else the server's settings."""
    options = {k: v for k, v in changes.items() if k in LongVideoOptions.model_fields}
    rest = {k: v for k, v in changes.items() if k not in options}
    room, question = rest.pop("answer_room", 4000), rest.pop("question", QUESTION)
    server = {"select_tokens": 1000, **rest}
    return task_of(
        LongVideoSettings(**server),
        LongVideoOptions(**options),
        strategy=strategy,
        question=question,
        durations=durations,
        answer_room=room,
    )


async def look(
    task: Task, model: SimulatedModel, store: NoteStore | None = None, **to: Any
) -> Outcome:
    kept = store if store is not None else NoteStore(1 << 24, 3600)
    return await look_through(task, model, kept, to.get("progress", lambda _: None))


def flashes(outcome: Outcome, word: str = "blue flash") -> list[int]:
    return [int(e.time) for e in outcome.evidence[0].entries if word in e.text]


def true_flashes(model: SimulatedModel, word: str = "blue flash") -> list[int]:
    return [int(time) for time, what in model.events[0] if word in what]


@pytest.mark.parametrize("strategy", STRATEGIES)
async def test_no_event_of_two_hours_is_lost_or_told_twice(strategy):
    model = SimulatedModel([planted(HOURS, 7)])
    outcome = await look(task(strategy, HOURS), model)
    assert flashes(outcome) == true_flashes(model)
    assert not outcome.left_out
    assert not outcome.is_thinned


@given(st.integers(0, 1000), st.floats(60, 4 * 3600), st.floats(4, 120), st.floats(0, 0.5))
@settings(max_examples=15, deadline=None)
async def test_whatever_the_windows_no_event_is_lost(seed, duration, window_s, part):
    overlap_s = min(part * window_s, 60)
    model = SimulatedModel([planted(duration, 11, seed)])
    asked = (
        task("map_reduce", duration, window_s=window_s, overlap_s=overlap_s, max_windows=16384)
        if False
        else task("map_reduce", duration, window_s=window_s, overlap_s=overlap_s)
    )
    outcome = await look(asked, model)
    found = flashes(outcome)
    # A window may begin within a second, so a time told in whole seconds is up to one early.
    for true in true_flashes(model):
        assert any(true - 1 <= time <= true + 1 for time in found)


@pytest.mark.parametrize("strategy", STRATEGIES)
async def test_evidence_is_in_order_and_fits_the_answer(strategy):
    model = SimulatedModel([planted(HOURS, 7)], select=lambda prompt: prompt)
    outcome = await look(task(strategy, HOURS, answer_room=600), model)
    times = [entry.time for entry in outcome.evidence[0].entries]
    assert times == sorted(times)
    assert count(outcome.evidence[0].text) <= 600
    assert outcome.is_thinned == (strategy != "search")


async def test_two_runs_make_the_same_asks_whatever_the_order_of_their_replies():
    model = SimulatedModel([planted(HOURS, 7)], misses=0.1, noise=0.3)
    other = SimulatedModel([planted(HOURS, 7)], misses=0.1, noise=0.3)
    for strategy in STRATEGIES:
        asked = task(strategy, HOURS, total_tokens=80_000)
        one, two = await look(asked, model), await look(asked, other)
        assert one == two
        assert Counter(map(repr, model.asks)) == Counter(map(repr, other.asks))
