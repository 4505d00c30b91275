"""What an engine publishes of its load, for the API servers of its service."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from scheduler_harness import Play, make_scheduler, request

from vllm_mm_ext.adapters.scheduler.load_publisher import LoadPublisher
from vllm_mm_ext.base.shared_state import SharedState, open_state


@pytest.fixture
def state(request: pytest.FixtureRequest) -> Iterator[SharedState]:
    made = open_state(request.node.name)
    yield made
    made.close()


def test_a_scheduler_publishes_its_backlog_and_takes_it_back(
    state: SharedState, monkeypatch: pytest.MonkeyPatch
) -> None:
    scheduler = make_scheduler()
    service = "test_a_scheduler_publishes_its_backlog_and_takes_it_back"
    monkeypatch.setattr(
        scheduler.vllm_config.model_config, "mm_ext_service", service, raising=False
    )
    scheduler._publisher = LoadPublisher(scheduler)
    idle = state.load(0)
    assert idle is not None
    assert idle.by_engine
    assert (idle.running, idle.waiting, idle.slots) == (0, 0, 4)
    play = Play(scheduler)
    play.add(request("text", text=32, answer=60), request("v", items=[512] * 12))
    backlogs = []
    while play.busy:
        play.step()
        load = state.load(0)
        assert load is not None
        backlogs.append(load.backlog_tokens or 0)
        assert 0 <= load.kv_usage <= (load.kv_pressure or 0) <= 1
    assert max(backlogs) >= 4000
    assert backlogs[-1] == 0
    assert (load.running, load.waiting, load.slots) == (0, 0, 4)
    assert (load.itl_s or 0) > 0
    scheduler._publisher.close()
    assert state.load(0) is None
