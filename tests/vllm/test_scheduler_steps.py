"""The scheduler over vLLM's real classes: who holds a slot, what a step holds, what is left behind.

``scheduler_harness`` plays the model runner.
"""

from __future__ import annotations

import math
import statistics
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from scheduler_harness import MAX_TOKENS, Costs, Play, make_scheduler, request
from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.request import RequestStatus

from vllm_mm_ext.adapters.names.attributes_check import VllmAttributes
from vllm_mm_ext.adapters.names.names_check import VllmName
from vllm_mm_ext.adapters.scheduler import choice
from vllm_mm_ext.base.heap import HeapTrim

SCHEDULER = "vllm.v1.core.sched.scheduler:Scheduler"
VIDEO = [512] * 10
# A token costs the encoder what it costs prefill.
EVEN = Costs(step_s=0.010, prefill_s=100e-6, encoder_s=100e-6)


def running(play: Play) -> set[str]:
    return {one.request_id for one in play.scheduler.running}


def beside_a_decode(item: int) -> Play:
    """One text decodes, at a target of 100 ms, and what items of so many tokens take is known."""
    play = Play(make_scheduler(settings={"target_itl_ms": 100.0}), EVEN)
    play.add(
        request("first", text=100, answer=200), request("video", items=[item] * (2000 // item))
    )
    play.run(until=0.8)
    return play


def encoded(output: Any) -> dict[str, list[int]]:
    return dict(output.scheduled_encoder_inputs)


def test_text_is_answered_before_the_second_of_six_videos_on_four_slots() -> None:
    play = Play(make_scheduler(slots=4))
    play.add(*[request(f"v{number}", items=VIDEO, answer=8) for number in range(6)])
    for _ in range(3):
        play.step()
    play.add(request("text", text=64, answer=8))
    play.run()
    ends = sorted(play.timings[f"v{number}"].ended or 0.0 for number in range(6))
    assert (play.timings["text"].ended or 0.0) < ends[1]


def test_a_request_that_waits_for_the_encoder_holds_no_slot() -> None:
    play = Play(make_scheduler(slots=4))
    play.add(request("text", text=32, answer=400))
    play.step()
    play.add(*[request(f"v{number}", items=VIDEO) for number in range(6)])
    while play.timings["text"].ended is None:
        before = {one.request_id for one in play.scheduler.running if one.mm_features}
        output = play.step()
        # Only what is being encoded or prefilled is in.
        for name in running(play) - before - {"text"}:
            assert encoded(output).get(name)
        unfinished = [
            one
            for one in play.scheduler.running
            if one.mm_features and not one.num_output_tokens and one.is_prefill_chunk
        ]
        assert len(unfinished) <= 2


def test_decoding_goes_first_and_goes_on_in_every_step() -> None:
    play = Play(make_scheduler(slots=4))
    play.add(request("text", text=32, answer=200))
    play.step()
    play.add(request("video", items=VIDEO, answer=4), request("book", text=20_000, answer=4))
    while play.timings["text"].ended is None:
        output = play.step()
        assert "text" in output.num_scheduled_tokens
    assert play.timings["video"].tokens


def test_steps_keep_to_the_target_while_something_decodes() -> None:
    times = {}
    for plugin in (False, True):
        scheduler = make_scheduler(plugin=plugin, settings={"target_itl_ms": 60.0})
        play = Play(scheduler)
        play.add(request("text", text=32, answer=300))
        for _ in range(5):
            play.step()
        play.add(*[request(f"v{number}", items=VIDEO, answer=2) for number in range(3)])
        play.run()
        gaps = sorted(play.timings["text"].gaps)
        times[plugin] = gaps[int(0.99 * len(gaps))]
    # Items cost 51 ms each: one and its prefill fit, no two do.
    assert times[True] <= 0.080
    assert times[True] <= 0.35 * times[False]


@pytest.mark.parametrize("stages", [1, 2])
def test_steps_between_two_decodes_of_a_pipeline_keep_to_the_target_too(stages: int) -> None:
    scheduler = make_scheduler(
        stages=stages, encoder_tokens=16384, settings={"target_itl_ms": 50.0}
    )
    play = Play(scheduler, depth=stages)
    play.add(request("learn", items=[400] * 4))
    play.run()
    play.add(request("text", answer=300))
    for _ in range(6):
        play.step()
    play.add(request("video", items=[400] * 20))
    play.run()
    # A decode takes as many steps as there are stages; a step may be long by a part of an item.
    assert max(play.timings["text"].gaps) < stages * 0.060


def test_short_text_is_not_held_up_by_a_long_prompt_in_front_of_it() -> None:
    play = Play(make_scheduler(slots=4, max_tokens=512))
    play.add(request("book", text=30_000, answer=2))
    play.step()
    play.add(request("line", text=40, answer=2))
    output = play.step()
    assert output.num_scheduled_tokens["line"] == 40
    play.run()
    assert play.timings["book"].ended is not None


@pytest.mark.parametrize("item", [20, 64, 150])
def test_a_text_gets_its_first_token_in_the_step_it_comes_in_and_videos_the_rest(item: int) -> None:
    play = beside_a_decode(item)
    play.add(request("long", items=[item] * (7000 // item)))
    for _ in range(4):
        play.step()
    play.add(request("line", text=300))
    output = play.step()
    assert output.num_scheduled_tokens["line"] == 300
    assert 0 < output.num_scheduled_tokens["long"] <= 600
    assert play.durations[-1] <= 0.100 + 1e-3
    before = len(play.durations)
    while not play.timings["long"].tokens:
        play.step()
    # What is left over of a step is less than what an item costs the encoder.
    full = play.durations[before:-1]
    assert len(full) > 5
    assert max(full) <= 0.100 + 1e-3
    assert min(full) >= 0.100 - item * 100e-6 - 2e-3


def test_a_video_takes_as_few_steps_as_the_target_allows() -> None:
    play = beside_a_decode(64)
    play.add(request("long", items=[64] * 64))
    before = len(play.steps)
    while not play.timings["long"].tokens:
        play.step()
    # 90 ms of each step, and the part of a token that is left over in each.
    assert len(play.steps) - before <= math.ceil(64 * 64 * 200e-6 / 0.0895) + 1
    assert max(play.durations[before:]) <= 0.100 + 1e-3


def test_most_steps_that_encode_keep_to_the_target_where_what_they_take_varies() -> None:
    class Varied(Play):
        def duration(self, output: Any) -> float:
            if not encoded(output):
                return super().duration(output)
            return super().duration(output) * random.uniform(0.8, 1.2)

    random = np.random.default_rng(0)
    play = Varied(make_scheduler(settings={"target_itl_ms": 100.0}, max_tokens=4096), EVEN)
    play.add(request("first", text=100, answer=1000))
    for number in range(12):
        play.add(request(f"v{number}", items=[32] * 64))
        while not play.timings[f"v{number}"].ended:
            play.step()
    took = [
        seconds
        for output, seconds in zip(play.steps, play.durations, strict=True)
        # Full ones, while the first request decodes.
        if sum(map(len, encoded(output).values())) >= 10 and len(output.num_scheduled_tokens) > 1
    ]
    late = took[len(took) // 2 :]
    assert len(late) >= 12
    assert sum(seconds > 0.100 for seconds in late) <= len(late) / 3


@pytest.mark.parametrize("asynchronous", [False, True])
def test_texts_that_decode_are_scheduled_as_by_vllm_through_preemptions(asynchronous: bool) -> None:
    found = []
    for plugin in (False, True):
        # All come together, and there are blocks for the answers of some.
        scheduler = make_scheduler(plugin=plugin, blocks=24, asynchronous=asynchronous)
        play = Play(scheduler, depth=1 + asynchronous)
        play.add(*[request(f"t{number}", text=32, answer=100 + number) for number in range(4)])
        play.run()
        found.append([dict(step.num_scheduled_tokens) for step in play.steps])
        assert any(step.preempted_req_ids for step in play.steps)
    assert found[0] == found[1]


def test_everything_is_used_where_nothing_decodes() -> None:
    play = Play(make_scheduler(slots=4))
    play.add(request("video", text=20, items=VIDEO))
    output = play.step()
    assert output.num_scheduled_tokens["video"] == MAX_TOKENS
    assert len(encoded(output)["video"]) == 4


def test_an_item_is_encoded_ahead_of_prefill_where_that_fills_a_step() -> None:
    play = beside_a_decode(400)
    play.add(request("long", items=[400] * 8))
    ahead = 0
    while not play.timings["long"].tokens:
        output = play.step()
        request_, end = play.scheduler.requests["long"], 0
        for index in encoded(output).get("long", []):
            place = request_.mm_features[index].mm_position
            end = place.offset + place.length
        ahead += end > request_.num_computed_tokens
    # 40 ms to encode one and 40 ms to prefill it, of 90 ms.
    assert ahead >= 2


def test_equal_media_are_encoded_once_for_several_requests() -> None:
    play = Play(make_scheduler(slots=8, encoder_tokens=8192))
    play.add(*[request(f"n{number}", items=VIDEO, digest="same", prompt=7) for number in range(4)])
    play.run()
    items = [index for output in play.steps for one in encoded(output).values() for index in one]
    assert sorted(items) == list(range(10))


def test_requests_whose_media_are_encoded_pass_those_that_wait() -> None:
    play = Play(make_scheduler(slots=4, encoder_tokens=8192))
    play.add(request("first", items=VIDEO, digest="known", prompt=7, answer=2))
    play.run()
    play.add(request("text", text=32, answer=100))
    play.step()
    play.add(*[request(f"v{number}", items=VIDEO) for number in range(4)])
    play.add(request("again", items=VIDEO, digest="known", prompt=7, answer=2))
    play.run()
    assert play.timings["again"].wait < min(play.timings[f"v{n}"].wait for n in range(4))


def test_text_behind_a_long_queue_of_videos_is_answered_at_once() -> None:
    play = Play(make_scheduler(slots=8))
    videos = [request(f"v{number}", items=[512], answer=1) for number in range(200)]
    play.add(*videos)
    for _ in range(5):
        play.step()
    play.add(request("text", text=40, answer=4))
    play.run()
    text = play.timings["text"]
    assert text.wait < 0.1
    assert sum((one.ended or 0.0) > (text.ended or 0.0) for one in play.timings.values()) > 150
    assert all(timing.ended is not None for timing in play.timings.values())


def test_priority_is_respected() -> None:
    play = Play(make_scheduler(slots=1, policy="priority"))
    play.add(request("now", text=32, answer=4))
    play.step()
    play.add(request("later", text=32, priority=5), request("urgent", items=VIDEO, priority=-5))
    play.run()
    assert play.timings["urgent"].tokens[0] < play.timings["later"].tokens[0]


def test_a_video_of_higher_priority_passes_one_that_is_half_encoded() -> None:
    settings = {"target_itl_ms": 40.0}
    play = Play(make_scheduler(slots=4, policy="priority", settings=settings))
    play.add(request("text", text=32, answer=400))
    play.step()
    play.add(request("half", items=[100] * 20, priority=5))
    while not play.scheduler.requests["half"].num_computed_tokens:
        play.step()
    # As large, later, and more urgent.
    play.add(request("urgent", items=[100] * 20, priority=-5))
    play.run()
    assert play.timings["urgent"].tokens[0] < play.timings["half"].tokens[0]


def test_videos_with_sound_go_on_where_a_step_has_room_for_one_of_both() -> None:
    settings = {"target_itl_ms": 25.0, "max_encoder_batch": 1}
    play = Play(make_scheduler(settings=settings))
    play.add(request("text", text=32, answer=400))
    play.step()
    play.add(request("video", items=[300] * 4, sound=50, answer=2))
    play.run()
    assert play.timings["video"].wait < 20 * 0.060
    assert len(play.timings["video"].tokens) == 2


@pytest.mark.parametrize("asynchronous", [False, True])
def test_a_step_holds_no_more_prefill_than_is_granted(asynchronous: bool) -> None:
    scheduler = make_scheduler(settings={"target_itl_ms": 20.0}, asynchronous=asynchronous)
    play = Play(scheduler, depth=1 + asynchronous)
    play.add(*[request(f"t{number}", text=32, answer=40) for number in range(2)])
    play.step()
    play.add(request("video", items=VIDEO), request("book", text=9000, answer=4))
    while play.busy:
        decoding = [one for one in scheduler.running if not one.is_prefill_chunk]
        output = play.step()
        allowed = len(decoding) + scheduler._plan.tokens
        assert output.total_num_scheduled_tokens <= min(allowed, MAX_TOKENS)


@pytest.mark.parametrize("asynchronous", [False, True])
def test_the_variant_follows_async_scheduling(asynchronous: bool) -> None:
    scheduler = make_scheduler(asynchronous=asynchronous)
    assert isinstance(scheduler, AsyncScheduler) == asynchronous
    assert isinstance(scheduler, Scheduler)


@pytest.mark.parametrize("asynchronous", [False, True])
def test_where_vllm_changed_its_own_scheduler_is_used(
    asynchronous: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    for gone in (VllmName(f"{SCHEDULER}.gone"), VllmAttributes(SCHEDULER, ("waiting", "gone"))):
        with monkeypatch.context() as patch:
            patch.setattr(choice, "SCHEDULER_NAMES", (*choice.SCHEDULER_NAMES, gone))
            scheduler = make_scheduler(asynchronous=asynchronous, plugin=True)
        assert type(scheduler) is (AsyncScheduler if asynchronous else Scheduler)


# --- whatever comes -------------------------------------------------------------------------------

actions = st.lists(
    st.one_of(
        st.tuples(
            st.just("add"),
            st.integers(1, 1500),
            st.lists(st.integers(1, 700), max_size=5),
            st.integers(1, 30),
            st.integers(0, 3),
            st.sampled_from([0, 0, 40]),
        ),
        st.tuples(st.just("step"), st.integers(1, 12)),
        st.tuples(st.just("abort"), st.integers(0, 30)),
        st.tuples(st.just("reset")),
    ),
    max_size=40,
)


@settings(
    max_examples=160,
    phases=(Phase.explicit, Phase.generate),
    suppress_health_check=[HealthCheck.too_slow],
    derandomize=True,
)
@given(
    actions=actions,
    plan=st.sampled_from(["sync", "async", "priority", "pipeline", "async pipeline"]),
    blocks=st.sampled_from([400, 700, 4096]),
    target_ms=st.sampled_from([1.0, 50.0, 1000.0]),
)
def test_every_request_is_answered_in_full_and_nothing_is_left(
    actions: list[Any], plan: str, blocks: int, target_ms: float
) -> None:
    """Few blocks: preemption. Aborts and cache resets in between."""
    scheduler = make_scheduler(
        slots=4,
        blocks=blocks,
        asynchronous=plan.startswith("async"),
        stages=2 if plan.endswith("pipeline") else 1,
        policy="priority" if plan == "priority" else "fcfs",
        settings={"target_itl_ms": target_ms},
    )
    depth = {"sync": 1, "priority": 1, "async": 2, "pipeline": 2, "async pipeline": 3}[plan]
    play = Play(scheduler, depth=depth)
    wanted: dict[str, int] = {}
    for number, action in enumerate(actions):
        if action[0] == "add":
            _, text, items, answer, shared, sound = action
            name = f"r{number}"
            digest = f"shared{shared}-{items}-{sound}" if shared < 2 else None
            play.add(
                request(name, text=text, items=items, answer=answer, digest=digest, priority=shared)
            )
            wanted[name] = answer
        elif action[0] == "step":
            for _ in range(action[1]):
                if play.busy:
                    play.step()
        elif action[0] == "abort":
            name = f"r{action[1]}"
            if name in wanted and play.timings[name].ended is None:
                play.abort(name)
                del wanted[name]
        else:
            play.drain()
            scheduler.reset_prefix_cache(reset_running_requests=True)
    play.run(most=20_000)
    assert not play.not_sent
    for name, answer in wanted.items():
        assert len(play.timings[name].tokens) == answer, name
    assert not scheduler.requests
    assert not scheduler._prompts.arrivals
    assert not scheduler._prompts._media
    manager = scheduler.encoder_cache_manager
    assert manager.num_freeable_slots == manager.cache_size
    assert not any(manager.cached.values())
    assert scheduler.kv_cache_manager.block_pool.get_num_free_blocks() == blocks - 1


def test_preempted_requests_are_resumed_in_their_turn() -> None:
    play = Play(make_scheduler(slots=8, blocks=150))
    play.add(*[request(f"r{number}", text=200, answer=300) for number in range(6)])
    play.run()
    assert any(output.preempted_req_ids for output in play.steps)
    assert all(len(timing.tokens) == 300 for timing in play.timings.values())


def test_what_was_in_kv_can_be_encoded_after_a_preemption() -> None:
    """vLLM's scheduler sends no inputs of it, and a V1 runner has nothing to encode then."""
    for plugin in (False, True):
        scheduler = make_scheduler(plugin=plugin)
        play = Play(scheduler)
        for answer in (1, 20):
            play.run()
            play.add(request(f"a{answer}", items=VIDEO, answer=answer, prompt=1, digest="a"))
        play.step()
        assert scheduler.requests["a20"].num_computed_tokens > sum(VIDEO)
        play.drain()
        scheduler.reset_prefix_cache(reset_running_requests=True)
        scheduler.reset_encoder_cache()
        play.run()
        sent = plugin or scheduler.use_v2_model_runner
        assert [name for name, _ in play.not_sent] == ([] if sent else ["a20"] * len(VIDEO))


def test_a_request_that_ends_with_its_step_is_sent_no_inputs_of_what_is_in_kv() -> None:
    """It is not preempted any more, and between processes pixels are copied."""
    scheduler = make_scheduler()
    play = Play(scheduler)
    for name, answer in (("first", 1), ("ends", 1), ("goes on", 2)):
        play.add(request(name, items=VIDEO, answer=answer, prompt=1, digest="same"))
        output = play.step()
        while name not in output.num_scheduled_tokens:
            output = play.step()
        if name != "first" and not scheduler.use_v2_model_runner:
            [new] = output.scheduled_new_reqs
            sent = [bool(feature.data) for feature in new.mm_features]
            assert sent == [name == "goes on"] * len(VIDEO)
        play.run()


def test_a_finished_request_is_forgotten_also_while_it_waits() -> None:
    scheduler = make_scheduler(slots=1)
    play = Play(scheduler)
    play.add(request("a", text=32, answer=50), request("b", items=VIDEO))
    play.step()
    scheduler.finish_requests("b", RequestStatus.FINISHED_ABORTED)
    play.run()
    assert not scheduler._prompts.arrivals


def test_heaps_are_trimmed_when_media_come_and_left_alone_by_text(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked = []
    monkeypatch.setattr(HeapTrim, "when_due", lambda self: asked.append(self))
    play = Play(make_scheduler())
    play.add(request("text"))
    assert not asked
    play.add(request("video", items=[64]))
    assert len(asked) == 1


def test_costs_are_learned_from_the_steps_themselves() -> None:
    costs = Costs(step_s=0.02, prefill_s=50e-6, encoder_s=200e-6)
    scheduler = make_scheduler()
    play = Play(scheduler, costs)
    play.add(request("text", text=64, answer=400))
    play.step()
    for number in range(6):
        play.add(request(f"t{number}", text=400, answer=20))
        play.add(request(f"v{number}", items=VIDEO))
    play.run()
    assert scheduler._times.base_s(1) == pytest.approx(0.02, rel=0.1)
    assert scheduler._times.seconds(1, 0) == pytest.approx(200e-6, rel=0.15)


def test_steps_are_filled_beside_few_decodes_though_many_decoded_before() -> None:
    target_s = 0.100
    scheduler = make_scheduler(slots=40, settings={"target_itl_ms": 1e3 * target_s})
    play = Play(scheduler, Costs(0.010, 100e-6, 100e-6, decode_s=0.002))
    play.add(request("learn", items=[64] * 8, answer=2))
    play.run()
    play.add(*(request(f"t{n}", text=16, answer=30 + n // 4) for n in range(20)))
    play.add(request("long", text=16, answer=900))
    while len(scheduler.running) < 21 or play.durations[-1] < 0.05:
        play.step()
    for _ in range(10):
        play.step()
    # From here on every step has a video, while fewer and fewer texts decode.
    for number in range(12):
        play.add(request(f"v{number}", items=[64] * 40, answer=2))
    while any(f"t{n}" in scheduler.requests for n in range(20)):
        play.step()
    before = len(play.durations)
    while any(f"v{n}" in scheduler.requests for n in range(12)):
        play.step()
    beside = play.durations[before:]
    assert len(beside) > 30
    assert 0.93 * target_s < statistics.fmean(beside[:12]) < 1.05 * target_s


@pytest.mark.parametrize("aged", [False, True])
def test_equal_priorities_are_served_by_the_time_of_arrival(aged: bool) -> None:
    """Not by the order in which the engine got to know of the requests."""
    settings = {"aging_s": 0.01 if aged else 1000.0}
    play = Play(make_scheduler(slots=1, policy="priority", settings=settings))
    play.add(request("first", answer=8))
    play.step()
    for place, name in enumerate(("late", "early", "middle")):
        one = request(name, answer=2)
        one.arrival_time = 1000.0 + (2, 0, 1)[place]
        play.add(one)
    play.run()
    served = sorted(play.timings, key=lambda name: play.timings[name].tokens[0])
    assert served == ["first", "early", "middle", "late"]


def test_without_priorities_requests_are_served_in_the_order_of_their_coming() -> None:
    play = Play(make_scheduler(slots=1))
    for place, name in enumerate(("one", "two", "three")):
        one = request(name, answer=2)
        one.arrival_time = 1000.0 - place
        play.add(one)
    play.run()
    assert sorted(play.timings, key=lambda name: play.timings[name].tokens[0]) == [
        "one",
        "two",
        "three",
    ]
