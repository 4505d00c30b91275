"""Looking through hours of video with a simulated model: nothing lost, nothing past its bounds."""

from __future__ import annotations

import asyncio
from collections import Counter
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from simulated_model import SimulatedModel, count, planted

from vllm_mm_ext.config.long_video_settings import LongVideoOptions, LongVideoSettings
from vllm_mm_ext.errors import OptionBoundError
from vllm_mm_ext.long_video.asking import AskFailedError, Cost
from vllm_mm_ext.long_video.looking import Progress
from vllm_mm_ext.long_video.note_store import NoteStore
from vllm_mm_ext.long_video.running import Outcome, look_through
from vllm_mm_ext.long_video.task import Task, WindowStrategy, task_of

HOURS = 2 * 3600.0
QUESTION = "How many blue flashes are there?"
STRATEGIES: list[WindowStrategy] = ["auto", "rolling", "map_reduce", "search"]


def task(strategy: WindowStrategy, *durations: float, **changes: Any) -> Task:
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
async def test_no_event_of_two_hours_is_lost_or_told_twice(strategy: WindowStrategy) -> None:
    model = SimulatedModel([planted(HOURS, 7)])
    outcome = await look(task(strategy, HOURS), model)
    assert flashes(outcome) == true_flashes(model)
    assert not outcome.left_out
    assert not outcome.is_thinned


@settings(max_examples=12)
@given(st.integers(0, 1000), st.floats(60, 8000), st.floats(8, 120), st.floats(0, 0.5))
async def test_whatever_the_windows_no_event_is_lost(
    seed: int, duration: float, window_s: float, part: float
) -> None:
    model = SimulatedModel([planted(duration, 11, seed)])
    options = {"window_s": window_s, "overlap_s": part * window_s}
    found = flashes(await look(task("map_reduce", duration, **options), model))
    # Windows begin within a second, so a time told in whole seconds is up to a second early.
    assert all({true, true - 1} & set(found) for true in true_flashes(model))


@pytest.mark.parametrize("strategy", STRATEGIES)
async def test_evidence_is_in_order_and_fits_the_answer(strategy: WindowStrategy) -> None:
    model = SimulatedModel([planted(HOURS, 7)], select=lambda prompt: prompt)
    outcome = await look(task(strategy, HOURS, answer_room=600), model)
    times = [entry.time for entry in outcome.evidence[0].entries]
    assert times == sorted(times)
    assert 200 < count(outcome.evidence[0].text) <= 600


async def test_two_runs_make_the_same_asks_whatever_the_order_of_their_replies() -> None:
    for strategy in STRATEGIES:
        asked = task(strategy, HOURS / 2, total_tokens=40_000)
        models = [SimulatedModel([planted(HOURS, 7)], misses=0.1, noise=0.3) for _ in range(2)]
        models[1].delays = 1
        one, two = [await look(asked, model) for model in models]
        assert one.evidence == two.evidence
        assert [replace(w, cost=Cost()) for w in one.windows] == [
            replace(w, cost=Cost()) for w in two.windows
        ]
        assert Counter(map(repr, models[0].asks)) == Counter(map(repr, models[1].asks))


@pytest.mark.parametrize("strategy", STRATEGIES)
async def test_at_most_max_parallel_prompts_are_under_way(strategy: WindowStrategy) -> None:
    model = SimulatedModel([planted(600, 7)] * 2)
    await look(task(strategy, 600.0, 500.0, max_parallel=3), model)
    assert model.most_under_way <= 3
    assert model.most_under_way == 3 or strategy == "rolling"


async def test_a_second_question_asks_about_no_window_again_and_costs_little() -> None:
    model, store = SimulatedModel([planted(HOURS, 7)]), NoteStore(1 << 24, 3600)
    first = await look(task("map_reduce", HOURS), model, store)
    asked, model.word = len(model.asks), "yellow flash"
    second = await look(task("map_reduce", HOURS, question="And yellow ones?"), model, store)
    assert all(ask.window is None for ask in model.asks[asked:])
    assert all(seen.is_kept for seen in second.windows)
    assert flashes(second, "yellow flash") == true_flashes(model, "yellow flash")
    assert sum(seen.kept_cost.prompt_tokens for seen in second.windows) > 0
    assert second.cost.computed_tokens < 0.2 * first.cost.computed_tokens


@pytest.mark.parametrize("strategy", ["map_reduce", "rolling"])
async def test_a_recording_that_has_grown_only_adds_windows(strategy: WindowStrategy) -> None:
    events, store = planted(1000, 7), NoteStore(1 << 24, 3600)
    await look(task(strategy, 300.0), SimulatedModel([events]), store)
    model = SimulatedModel([events])
    outcome = await look(task(strategy, 500.0), model, store)
    kept = [seen.window.number for seen in outcome.windows if seen.is_kept]
    assert kept == list(range(10))
    assert min(ask.window.start for ask in model.asks if ask.window) == 280


async def test_rolling_tells_a_window_the_notes_of_the_two_before_it() -> None:
    model = SimulatedModel([[(3.0, "a"), (31.0, "b"), (60.0, "c"), (90.0, "d")]] * 2)
    await look(task("rolling", 100.0, 20.0), model)
    assert [ask.texts[:-1] for ask in model.asks] == [
        (),
        ("Before this part: [0:00:03] a\n",),
        ("Before this part: [0:00:03] a\n[0:00:31] b\n",),
        ("Before this part: [0:00:31] b\n[0:01:00] c\n",),
        (),
    ]


async def test_search_looks_closely_at_few_windows_and_costs_a_fraction() -> None:
    model, thorough = (SimulatedModel([planted(HOURS, 7)], noise=0.04) for _ in range(2))
    outcome = await look(task("search", HOURS, close_fps=4), model)
    everything = await look(task("map_reduce", HOURS, fps=4), thorough)
    close = [ask for ask in model.asks if ask.look and ask.look.kind == "close"]
    assert len(true_flashes(model)) <= len(close) <= 12
    assert flashes(outcome) == true_flashes(model)
    assert outcome.cost.prompt_tokens < 0.15 * everything.cost.prompt_tokens


async def test_search_uses_the_notes_that_an_earlier_question_left_beside_its_windows() -> None:
    events = [(float(at), f"scene {at}") for at in range(0, 600, 7)] + [(300.0, "blue flash")]
    model, store = SimulatedModel([sorted(events)]), NoteStore(1 << 24, 3600)
    alone = await look(task("search", 600.0), model, store)
    await look(task("map_reduce", 600.0), model, store)
    asked = len(model.asks)
    again = await look(task("search", 600.0), model, store)
    assert len(model.asks) == asked
    first, last = alone.evidence[0].entries[0].time, alone.evidence[0].entries[-1].time
    assert again.evidence[0].entries[0].time < first - 20
    assert again.evidence[0].entries[-1].time > last + 20


async def test_auto_searches_where_few_windows_matter_and_else_notes_all() -> None:
    model = SimulatedModel([planted(HOURS, 7)])
    found = await look(task("auto", HOURS), model)
    assert found.strategy == "search"
    assert flashes(found) == true_flashes(model)
    whole, told = SimulatedModel([planted(HOURS, 7)], word="circle"), list[Progress]()
    everything = await look(task("auto", HOURS, answer_room=9999), whole, progress=told.append)
    assert everything.strategy == "map_reduce"
    assert len(everything.windows) == 258
    assert all(seen.entries for seen in everything.windows)
    assert not everything.left_out
    coarse = [ask for ask in whole.asks if ask.choices]
    assert len(coarse) < 40, "as soon as too many windows matter, all are noted"
    assert [told[0].total, told[-1].total] == [258, len(coarse) + 258]
    absent = SimulatedModel([planted(HOURS, 7)], word="green flash")
    assert (await look(task("auto", HOURS), absent)).strategy == "map_reduce"


async def test_auto_takes_kept_notes_where_all_but_few_windows_have_them() -> None:
    model, store = SimulatedModel([planted(HOURS, 7)]), NoteStore(1 << 24, 3600)
    await look(task("map_reduce", HOURS - 120), model, store)
    asked = len(model.asks)
    second = await look(task("auto", HOURS, question="Why?"), model, store)
    assert second.strategy == "map_reduce"
    assert 0 < sum(ask.window is not None for ask in model.asks[asked:]) <= 6
    unknown = await look(task("auto", HOURS, window_s=20), model, store)
    assert unknown.strategy == "search"


@pytest.mark.parametrize("strategy", STRATEGIES)
async def test_replies_that_may_not_be_kept_are_not(strategy: WindowStrategy) -> None:
    model, store = SimulatedModel([planted(600, 7)], may_be_kept=False), NoteStore(1 << 24, 3600)
    first = await look(task(strategy, 600.0), model, store)
    assert len(store) == 0
    second = await look(task(strategy, 600.0), model, store)
    assert (second.evidence, second.cost) == (first.evidence, first.cost)


@pytest.mark.parametrize("strategy", STRATEGIES)
async def test_a_window_that_fails_is_named_and_the_others_answer(strategy: WindowStrategy) -> None:
    model = SimulatedModel([planted(600, 7)], fails=lambda window: window.number in (3, 4))
    outcome = await look(task(strategy, 600.0), model)
    assert [seen.window.number for seen in outcome.windows if seen.failed] == [3, 4]
    assert "[0:01:26-0:02:20] not looked at" in outcome.evidence[0].text
    assert "flash" in outcome.evidence[0].text


async def test_many_failed_windows_are_named_in_one_line() -> None:
    model = SimulatedModel([planted(600, 7)], fails=lambda window: window.number % 2 == 1)
    text = (await look(task("map_reduce", 600.0), model)).evidence[0].text
    assert text.count("not looked at") == 1
    assert "11 of 22 parts were not looked at" in text


@pytest.mark.parametrize("strategy", STRATEGIES)
async def test_when_all_windows_fail_the_request_fails_with_the_first_cause(
    strategy: WindowStrategy,
) -> None:
    model = SimulatedModel([planted(600, 7)], fails=lambda _: True)
    with pytest.raises(AskFailedError, match=r"None of 22 windows .*: window 0 cannot be read"):
        await look(task(strategy, 600.0), model)


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("total_tokens", [1, 5_000, 20_000])
async def test_a_bound_on_tokens_holds_but_for_one_look(
    strategy: WindowStrategy, total_tokens: int
) -> None:
    model = SimulatedModel([planted(HOURS, 7)])
    outcome = await look(task(strategy, HOURS, total_tokens=total_tokens), model)
    spent = [seen.cost.prompt_tokens for seen in outcome.windows]
    assert sum(spent) <= total_tokens + max(spent)
    assert outcome.left_out
    assert "[0:" in outcome.evidence[0].text
    assert outcome.evidence[0].text.endswith("-2:00:00] not looked at")


@pytest.mark.parametrize("strategy", STRATEGIES)
async def test_past_the_bound_on_time_no_window_is_looked_at(strategy: WindowStrategy) -> None:
    model = SimulatedModel([planted(600, 7)])
    outcome = await look(task(strategy, 600.0, time_s=1e-9), model)
    assert not model.asks
    assert len(outcome.left_out) == 22
    assert outcome.evidence[0].text == "[0:00:00-0:10:00] not looked at"


@pytest.mark.parametrize("strategy", STRATEGIES)
async def test_cancelling_the_request_ends_all_its_prompts_at_once(
    strategy: WindowStrategy,
) -> None:
    model = SimulatedModel([planted(HOURS, 7)], delays=10**9)
    before = asyncio.all_tasks()
    request = asyncio.create_task(look(task(strategy, HOURS), model))
    while not model.under_way:
        await asyncio.sleep(0)
    request.cancel()
    with pytest.raises(asyncio.CancelledError):
        await request
    assert model.under_way == 0
    assert asyncio.all_tasks() == before
    assert len(model.asks) <= 4


async def test_progress_tells_each_look_and_ends_with_all() -> None:
    model, told = SimulatedModel([planted(600, 7)]), list[Progress]()
    outcome = await look(task("search", 600.0), model, progress=told.append)
    assert [one.done for one in told] == list(range(1, len(told) + 1))
    assert {one.total for one in told[:22]} == {22}
    assert {one.total for one in told[22:]} == {len(told)}
    close = [one.seen.note for one in told if one.seen.is_close]
    assert close
    assert sorted(close) == sorted(seen.note for seen in outcome.windows if seen.is_close)


async def test_each_video_has_its_own_evidence_and_a_fair_share_of_the_room() -> None:
    model = SimulatedModel([planted(HOURS, 7), [(5.0, "blue flash")]], select=lambda prompt: prompt)
    outcome = await look(task("map_reduce", HOURS, 20.0, answer_room=1200), model)
    long, short = outcome.evidence
    assert short.text == "[0:00:05] blue flash"
    assert count(long.text) + count(short.text) <= 1200
    assert outcome.is_thinned


async def test_a_conversation_that_leaves_no_room_for_notes_is_refused_before_any_ask() -> None:
    model = SimulatedModel([planted(600, 7)])
    with pytest.raises(OptionBoundError, match="room for 100 tokens of notes"):
        await look(task("map_reduce", 600.0, answer_room=100), model)
    with pytest.raises(OptionBoundError, match="The question is too long"):
        await look(task("map_reduce", 600.0, question="why " * 4000), model)
    assert not model.asks
