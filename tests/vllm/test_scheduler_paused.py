"""A paused engine lets no request in, and ends those that it has let in."""

from __future__ import annotations

import pytest
from scheduler_harness import Play, make_scheduler, request
from vllm.v1.core.sched.interface import PauseState


@pytest.mark.parametrize("decodes", [False, True])
def test_prompts_under_way_end_though_an_aged_request_before_them_waits(decodes: bool) -> None:
    """As in ``/pause`` with mode `wait`: the first one would get all of each step for nothing."""
    play = Play(make_scheduler(settings={"aging_s": 1.0}))
    if decodes:
        play.add(request("note", answer=500))
        play.step()
    play.add(request("book", text=3_000))
    play.step()
    (book,) = [one for one in play.scheduler.running if one.request_id == "book"]
    play.add(request("film", text=30_000))
    # It came before the book.
    arrivals = play.scheduler._prompts.arrivals
    arrivals["book"], arrivals["film"] = (
        arrivals["book"]._replace(order=arrivals["film"].order),
        arrivals["film"]._replace(order=arrivals["book"].order),
    )
    play.now += 10.0
    play.scheduler.set_pause_state(PauseState.PAUSED_NEW)
    assert book.is_prefill_chunk
    for _ in range(400):
        play.step()
    assert play.timings["book"].ended is not None
    assert not play.timings["film"].tokens
    play.scheduler.set_pause_state(PauseState.UNPAUSED)
    play.run()
    assert play.timings["film"].ended is not None
