"""What an engine tells of its steps, with vLLM's real schedulers and the plugin's."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import kv_harness
import pytest
from scheduler_harness import Play, make_scheduler, request
from vllm.v1.request import RequestStatus

from vllm_mm_ext.adapters.sight import step_observer
from vllm_mm_ext.adapters.sight.step_observer import StepObserver
from vllm_mm_ext.base.engine_figures import COUNTERS, FIGURES, STEP_KINDS, EngineBoard
from vllm_mm_ext.base.shared_state import SharedState, open_state

SERVICE = "test_step_observer"


@pytest.fixture
def state(tmp_path: Path) -> Iterator[SharedState]:
    made = open_state(SERVICE, [tmp_path])
    yield made
    made.close()


def _play(state: SharedState, *, plugin: bool, depth: int = 1) -> tuple[Play, EngineBoard]:
    scheduler = make_scheduler(plugin=plugin, asynchronous=depth > 1)
    play = Play(scheduler, depth=depth)
    assert state.path is not None
    own = open_state(SERVICE, [state.path.parent])
    scheduler.mm_ext_steps = StepObserver(scheduler, own, lambda: play.now)
    return play, EngineBoard(state)


@pytest.mark.parametrize("depth", [1, 2])
@pytest.mark.parametrize("plugin", [False, True], ids=["stock", "plugin"])
def test_counts_are_what_the_requests_needed(state: SharedState, plugin: bool, depth: int) -> None:
    play, board = _play(state, plugin=plugin, depth=depth)
    wanted = [request("t", text=100, answer=20), request("v", items=[300] * 3, answer=5)]
    prompts = sum(one.num_prompt_tokens for one in wanted)
    for one in wanted:
        one.arrival_time = 1000.0 + len(one.mm_features)
    play.add(*wanted)
    while play.busy:
        play.step()
    found = board.figures(0)
    assert found is not None
    assert found["prefill_tokens"] == prompts
    # The first token of an answer comes with the prompt; async steps may compute one too many.
    assert 23 <= found["decode_tokens"] <= 23 + 2 * (depth - 1)
    assert found["encoder_tokens_video"] == 900
    assert found["encoder_items"] == 3
    steps = {kind: found[f"steps_{kind}"] for kind in STEP_KINDS}
    assert steps["encode"] >= 1
    assert steps["decode"] >= 1
    assert all(found[f"step_s_{kind}"] > 0 for kind, count in steps.items() if count)
    assert (found["running"], found["waiting"]) == (0, 0)
    assert found["kv_blocks"] == 8191
    assert 0 <= found["kv_pressure"] <= 1
    times = board.times(1003.0)
    assert times is not None
    assert times.encode_s > 0
    first = play.timings["v"].tokens[0]
    assert times.encode_s + times.prefill_s + times.wait_s <= first + 1e-9
    assert board.times(1000.0) is None, "requests without media tell no times"


def test_a_step_that_hangs_after_a_rest_shows_that_requests_run(state: SharedState) -> None:
    play, board = _play(state, plugin=False)
    observer = play.scheduler.mm_ext_steps
    for name in ("first", "second"):
        play.add(request(name, text=100, answer=2))
        observer.scheduled(play.scheduler.schedule())
        found = board.figures(0)
        assert found is not None
        assert found["running"] == 1
        play.scheduler.finish_requests([name], RequestStatus.FINISHED_ABORTED)
        observer.finished(None)
        found = board.figures(0)
        assert found is not None
        assert found["running"] == 0


def test_steps_and_seconds_add_up(state: SharedState) -> None:
    play, board = _play(state, plugin=True)
    play.add(*(request(f"r{number}", items=[128] * number, answer=8) for number in range(6)))
    while play.busy:
        play.step()
    found = board.figures(0)
    assert found is not None
    steps = sum(found[f"steps_{kind}"] for kind in STEP_KINDS)
    assert steps == sum(bool(step.total_num_scheduled_tokens) for step in play.steps)
    assert sum(found[f"step_s_{kind}"] for kind in STEP_KINDS) == pytest.approx(play.now)


def test_an_aborted_prompt_is_forgotten(
    state: SharedState, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(step_observer, "_MOST_GONE", 8)
    play, _ = _play(state, plugin=False)
    observer = play.scheduler.mm_ext_steps
    for number in range(30):
        one = request(f"v{number}", items=[1500] * 3, answer=2)
        play.add(one)
        play.step()
        play.scheduler.finish_requests([one.request_id], one.status.FINISHED_ABORTED)
    assert 0 < len(observer._prompts) <= 10


def test_media_in_the_kv_cache_are_told_when_the_engine_comes_to_rest(state: SharedState) -> None:
    play, board = _play(state, plugin=True)
    engine = kv_harness.Engine(64)
    play.scheduler.kv_cache_manager.block_pool = engine.pool
    observer = StepObserver(play.scheduler, state, lambda: play.now)
    for name, modality in (("a", "video"), ("b", "hologram")):
        engine.admit(kv_harness.request(name, [kv_harness.Media(name, 8, modality)]))
        engine.finish(name)
    observer.finished(None)
    found = board.figures(0)
    assert found is not None
    assert found["kv_media_items"] == 2
    assert found["kv_media_tokens_video"] == found["kv_media_tokens_other"] == 8


def test_an_engine_that_ends_takes_its_figures_back(state: SharedState) -> None:
    play, board = _play(state, plugin=False)
    assert board.figures(0) == dict.fromkeys(FIGURES, 0.0) | {"kv_blocks": 8191.0}
    assert set(COUNTERS) < set(FIGURES)
    play.scheduler.shutdown()
    assert board.figures(0) is None
