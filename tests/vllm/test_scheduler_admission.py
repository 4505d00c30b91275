"""Requests that vLLM does not let in, and text under an overload of encoder work.

On vLLM's real scheduler classes; ``scheduler_harness`` plays the model runner.
"""

from __future__ import annotations

import gc
import weakref
from types import SimpleNamespace
from typing import Any

import pytest
from scheduler_harness import Costs, Play, make_scheduler, request
from vllm.v1.core.sched.interface import PauseState
from vllm.v1.request import Request, RequestStatus

from vllm_mm_ext.adapters.encoder_cache import never_served
from vllm_mm_ext.adapters.scheduler.queue import LOOKED_AT

AGING_S = 30.0
BLOCKS = 1024


def adapted(adapter: int, name: str, **kwargs: object) -> Request:
    one = request(name, **kwargs)  # type: ignore[arg-type]
    one.lora_request = SimpleNamespace(  # type: ignore[assignment]
        lora_int_id=adapter, lora_name=f"lora{adapter}", lora_path="/", adapter_id=adapter
    )
    return one


@pytest.mark.parametrize("whole", [False, True])
def test_a_picture_and_its_sound_that_vllms_own_cache_never_holds_end_their_request(
    whole: bool,
) -> None:
    def change(config: Any) -> None:
        config.scheduler_config.enable_chunked_prefill = not whole

    play = Play(make_scheduler(encoder_tokens=1024, settings={"aging_s": 1.0}, change=change))
    play.add(
        request("large", items=[1200], sound=400),
        request("fits", items=[1000], sound=400),
        request("text"),
    )
    play.run(most=2000)
    assert not play.timings["large"].tokens
    assert all(timing.ended is not None for timing in play.timings.values())
    assert all(len(play.timings[name].tokens) == 4 for name in ("fits", "text"))


@pytest.mark.parametrize("depth", [1, 2])
def test_that_a_request_never_fits_is_said_once(
    depth: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[tuple[str, ...]] = []
    monkeypatch.setattr(never_served.logger, "error", lambda *args: said.append(args))
    play = Play(make_scheduler(encoder_tokens=1024, asynchronous=depth > 1), depth=depth)
    play.add(request("text", answer=40))
    play.step()
    play.add(request("large", items=[1200], sound=400))
    play.run(most=2000)
    assert play.timings["large"].ended is not None
    assert [args[1] for args in said] == ["large"]


@pytest.mark.parametrize("video", [18, 30])
def test_an_aged_video_without_blocks_does_not_stop_one_that_holds_them(video: int) -> None:
    play = Play(make_scheduler(blocks=BLOCKS))
    coming = [
        (0.0, request("text", text=7600, answer=1640)),
        (0.5, request("aged", items=[512] * video, answer=4)),
        (15.2, request("started", items=[512] * 13, answer=4)),
    ]
    play.play(coming, until=30)
    assert all(timing.ended is not None for timing in play.timings.values())


def test_a_small_video_in_a_long_prompt_does_not_stop_one_that_holds_the_blocks() -> None:
    play = Play(make_scheduler(blocks=BLOCKS))
    play.add(request("started", items=[512] * 28, answer=200))
    play.step()
    play.add(request("hungry", text=6500, items=[256], answer=4))
    play.run(until=60)
    assert all(timing.ended is not None for timing in play.timings.values())


def test_a_preempted_video_does_not_stop_one_that_holds_the_blocks() -> None:
    play = Play(make_scheduler(blocks=700))
    play.add(*[request(f"v{number}", items=[512] * 10, answer=600) for number in range(3)])
    play.run(until=120)
    assert any(output.preempted_req_ids for output in play.steps)
    assert all(timing.ended is not None for timing in play.timings.values())


def test_later_requests_do_not_take_the_blocks_for_ever() -> None:
    """Text that always leaves too few blocks comes without pause."""
    settings = {"aging_s": AGING_S}
    play = Play(make_scheduler(slots=64, blocks=BLOCKS, settings=settings))
    coming = [(0.25 * n, request(f"t{n}", text=1500, answer=100)) for n in range(200)]
    coming.append((2.0, request("video", items=[512] * 26, answer=4)))
    play.play(coming, until=60)
    assert play.timings["video"].wait <= AGING_S


def test_what_the_prompt_of_an_aged_video_still_needs_is_not_given_to_later_requests() -> None:
    """It was let in before they came; with priorities, vLLM would preempt it for them."""
    play = Play(make_scheduler(blocks=900, policy="priority", settings={"aging_s": 2.0}))
    coming = [
        (0.0, request("note", answer=400)),
        (0.1, request("video", items=[512] * 20, priority=9)),
        (1.3, request("book", text=6_000)),
    ]
    play.play(coming, until=60)
    video, book = play.timings["video"], play.timings["book"]
    assert video.came + 1.0 < book.came < video.tokens[0] < book.tokens[0]
    assert not any(output.preempted_req_ids for output in play.steps)


def test_requests_that_need_other_blocks_go_on_while_a_video_backs_off() -> None:
    play = Play(make_scheduler(blocks=BLOCKS))
    play.add(request("book", text=8000, answer=800))
    play.step()
    play.add(request("video", items=[512] * 26, answer=4))
    for _ in range(20):
        play.step()
    play.add(request("clip", items=[256] * 2, answer=4), request("line", answer=4))
    play.run()
    for name in ("clip", "line"):
        assert play.timings[name].wait < 1.0
    assert play.timings["video"].ended is not None


def test_what_is_not_encoded_for_want_of_blocks_costs_others_nothing() -> None:
    """An aged video that finds no blocks is granted its item again and again."""
    settings = {"target_itl_ms": 20.0, "aging_s": 0.2}
    play = Play(make_scheduler(blocks=BLOCKS, settings=settings))
    play.add(request("book", text=7400, answer=1400))
    play.run(until=1.0)
    play.add(request("hungry", items=[2048] * 7, answer=4))
    play.step()
    play.add(request("clip", items=[64] * 14, answer=4))
    play.run(until=4.0)
    assert play.timings["clip"].wait < 1.0
    assert not play.timings["hungry"].tokens


@pytest.mark.parametrize("bound", [False, True])
def test_what_a_throttled_step_tries_all_the_same_can_be_refused(bound: bool) -> None:
    """vLLM lets prompts in where an earlier step had no room for all that waited."""
    play = Play(make_scheduler(blocks=BLOCKS))
    play.add(request("book", text=4000, answer=800))
    while not play.timings["book"].tokens:
        play.step()
    play.scheduler.prefill_capacity_bound = bound
    play.add(request("video", items=[512] * 26, answer=4))
    play.scheduler.schedule(throttle_prefills=True)
    assert ("video" in play.scheduler._admission._refusals) == bound


@pytest.mark.parametrize("held", ["throttled", "paused"])
def test_a_prompt_under_way_that_a_step_held_back_does_not_go_last(held: str) -> None:
    play = Play(make_scheduler(slots=8, settings={"aging_s": 1.0}))
    scheduler = play.scheduler
    play.add(request("decodes", answer=3000))
    for _ in range(2):
        play.step()
    play.add(request("long", text=9000))
    play.step()
    play.now += 5.0
    if held == "paused":
        scheduler.set_pause_state(PauseState.PAUSED_ALL)
    output = scheduler.schedule(throttle_prefills=held == "throttled")
    assert "long" not in output.num_scheduled_tokens
    play._finish(output)
    scheduler.set_pause_state(PauseState.UNPAUSED)
    play.add(*[request(f"new{number}", text=900) for number in range(3)])
    assert scheduler._looked_at(play.now)[0].key == "long"
    assert "long" in play.step().num_scheduled_tokens


def test_no_step_has_more_adapters_than_vllm_may_have() -> None:
    """Of a running prompt that gets nothing in a step, vLLM 0.32 does not count the adapter."""
    scheduler = make_scheduler(slots=8)
    scheduler.lora_config = SimpleNamespace(max_loras=1)
    play = Play(scheduler)
    play.add(request("decodes", answer=300))
    for _ in range(3):
        play.step()
    play.add(adapted(1, "video", items=[1024] * 4))
    while "video" not in {one.request_id for one in scheduler.running}:
        play.step()
    play.add(adapted(2, "text", text=600, answer=40))
    play.run()
    assert all(timing.ended is not None for timing in play.timings.values())


def test_a_video_that_waits_for_a_lora_slot_stops_nobody_and_gets_one_within_the_bound() -> None:
    scheduler = make_scheduler(slots=8, blocks=65536, settings={"aging_s": AGING_S})
    scheduler.lora_config = SimpleNamespace(max_loras=1)
    play = Play(scheduler)
    coming = [(0.5 * n, adapted(1, f"t{n}", answer=100)) for n in range(80)]
    coming += [(1.5 + 2 * n, adapted(1, f"v{n}", items=[512] * 6)) for n in range(15)]
    coming += [(1.0, adapted(2, "other", items=[512] * 4))]
    play.play(coming, until=60)
    assert play.timings["other"].wait <= AGING_S
    assert all(play.timings[f"v{n}"].wait < 3.0 for n in range(15))


def test_text_without_an_adapter_passes_a_video_that_waits_for_one() -> None:
    scheduler = make_scheduler(slots=8, settings={"aging_s": 2.0})
    scheduler.lora_config = SimpleNamespace(max_loras=1)
    play = Play(scheduler)
    play.add(adapted(1, "first", answer=600))
    play.step()
    play.add(adapted(2, "video", items=[512] * 4))
    coming = [(3.0 + n / 2, request(f"t{n}", answer=4)) for n in range(5)]
    play.play(coming, until=20)
    assert all(play.timings[f"t{n}"].wait < 0.5 for n in range(5))
    assert play.timings["video"].ended is not None


@pytest.mark.parametrize("aging_s", [AGING_S, 0.1])
def test_texts_that_wait_for_a_lora_slot_stop_nobody(aging_s: float) -> None:
    scheduler = make_scheduler(slots=4, settings={"aging_s": aging_s})
    scheduler.lora_config = SimpleNamespace(max_loras=1)
    play = Play(scheduler)
    play.add(adapted(1, "first", answer=300))
    play.step()
    play.add(*[adapted(2, f"other{number}", answer=2) for number in range(2 * LOOKED_AT + 4)])
    for _ in range(40):
        play.step()
    play.add(request("text", text=600, answer=4))
    play.run(until=play.now + 0.5)
    assert play.timings["text"].ended is not None
    assert play.timings["first"].ended is None
    play.run()
    assert all(timing.ended is not None for timing in play.timings.values())


def test_the_credit_is_for_the_item_that_is_encoded_first() -> None:
    """A small item of a request without a slot comes before it by rank."""
    settings = {"target_itl_ms": 20.0, "text_slots": 0}
    play = Play(make_scheduler(slots=2, settings=settings))
    play.add(request("decodes", answer=400))
    play.step()
    play.add(request("started", items=[512] * 6, answer=4))
    while "started" not in {one.request_id for one in play.scheduler.running}:
        play.step()
    play.add(request("small", items=[64], answer=4))
    for _ in range(60):
        play.step()
    assert play.timings["started"].tokens


@pytest.mark.parametrize(("slots", "bound_s"), [(4, 20.0), (16, 8.0)])
def test_text_is_answered_soon_all_through_an_overload_of_encoder_work(
    slots: int, bound_s: float
) -> None:
    costs = Costs(step_s=0.5, prefill_s=400e-6, encoder_s=4e-3)
    settings = {"target_itl_ms": 3000.0, "aging_s": AGING_S}
    play = Play(make_scheduler(slots=slots, blocks=65536, settings=settings), costs)
    play.add(request("decodes", answer=30_000))
    end = 1200.0
    # An item takes 2 s, so a video takes 20 s: four times as many come as can be served, and more
    # wait at the end than a step looks at.
    coming = [(5.0 * n, request(f"v{n}", items=[512] * 10)) for n in range(int(end / 5))]
    coming += [(17.0 * n, request(f"t{n}")) for n in range(int(end / 17))]
    play.play(coming, until=end)
    assert len(play.scheduler.waiting) > 2 * LOOKED_AT
    waits = [
        timing.wait
        for name, timing in play.timings.items()
        if name.startswith("t") and timing.came < end - 60
    ]
    # A step that encodes takes 3 s. With few slots one must become free.
    assert max(waits) < bound_s
    assert sum(bool(one.tokens) for key, one in play.timings.items() if key[0] == "v") > 35


@pytest.mark.parametrize("ends", ["answered", "aborted"])
def test_of_requests_that_ended_no_inputs_are_kept_while_the_engine_is_idle(ends: str) -> None:
    scheduler = make_scheduler(settings={"aging_s": 0.001})
    play = Play(scheduler)
    # Its answer is one token, so its last step is one with a prompt.
    one = request("video", items=[512] * 8, answer=1)
    ended = weakref.ref(one)
    play.add(one)
    del one
    if ends == "aborted":
        play.step()
        play.step()
        play.abort("video")
    play.run()
    gc.collect()
    assert ended() is None


def test_nothing_is_remembered_of_requests_that_ended() -> None:
    scheduler = make_scheduler(blocks=BLOCKS)
    play = Play(scheduler)
    play.add(request("book", text=8000, answer=50))
    play.step()
    play.add(request("video", items=[512] * 26, answer=4), request("gone", items=[512] * 26))
    for _ in range(20):
        play.step()
    assert scheduler._admission._refusals
    scheduler.finish_requests("gone", RequestStatus.FINISHED_ABORTED)
    play.run()
    assert not scheduler._admission._refusals
