"""What a step gives to whom, and what steps cost: pure policy."""

from __future__ import annotations

import math
from dataclasses import replace
from functools import lru_cache
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vllm_mm_ext.policies.scheduler.step_plan import (
    LEAST_SHARE,
    Candidate,
    Item,
    Room,
    StepPlan,
    plan,
    step_seconds,
)
from vllm_mm_ext.policies.scheduler.step_times import StepTimes, StepWork, attended

# No deadline: the machine may be busy.
QUICK = settings(max_examples=60)
# Of prefill and of encoding, in seconds a token.
PREFILL, ENCODER = 20e-6, 100e-6
ROOM = Room(seconds=0.1, media_s=0.1, tokens=2048, encoder_tokens=4096, items=64, slots=4)


def prompt(
    name: str, *items: int, text: int = 0, came: int = 0, computed: int = 0, **changes: Any
) -> Candidate:
    """A prompt of items, of so many tokens each, then text."""
    starts = [sum(items[:number]) for number in range(len(items))]
    missing = tuple(
        Item(number, size, f"{name}#{number}", start, start + size)
        for number, (size, start) in enumerate(zip(items, starts, strict=True))
    )
    left = sum(items) + text
    usual = Candidate(
        key=name,
        order=(0.0, came),
        priority=0,
        computed=computed,
        left=left,
        items=missing,
        encoder_tokens=sum(items),
        media=bool(items),
        running=True,
        aged=False,
    )
    return usual._replace(**changes)


candidates = st.lists(
    st.tuples(
        st.lists(st.integers(1, 900), max_size=6),
        st.integers(1, 900),
        st.integers(-2, 2),
        st.booleans(),
        st.booleans(),
    ),
    max_size=8,
).map(
    lambda found: ordered(
        prompt(
            str(number),
            *items,
            text=text,
            came=number,
            priority=priority,
            running=running,
            aged=aged,
        )
        for number, (items, text, priority, running, aged) in enumerate(found)
    )
)
rooms = st.builds(
    Room,
    seconds=st.floats(0.01, 0.3),
    media_s=st.floats(0.01, 0.3),
    tokens=st.integers(1, 3000),
    encoder_tokens=st.integers(0, 3000),
    items=st.integers(1, 10),
    slots=st.integers(0, 4),
    reserved=st.integers(0, 2),
    late_s=st.sampled_from([0.0, 0.0, 0.05]),
).map(lambda room: replace(room, seconds=max(room.seconds, room.media_s)))


def ordered(found: Any) -> list[Candidate]:
    return sorted(found, key=lambda one: one.rank)


def planned(*found: Candidate, **changes: Any) -> StepPlan:
    return plan(ordered(found), replace(ROOM, **changes), learned())


def counts(made: StepPlan) -> dict[str, int]:
    return {key: len(grant.items) for key, grant in made.grants.items()}


# --- order ----------------------------------------------------------------------------------------


@QUICK
@given(candidates)
def test_an_aged_request_goes_before_all_that_came_later(found: list[Candidate]) -> None:
    for place, one in enumerate(found):
        if one.aged:
            assert all(before.order < one.order for before in found[:place])


def test_text_goes_before_short_videos_and_these_before_long_ones() -> None:
    long = prompt("long", 9000)
    short = prompt("short", 500, came=1)
    text = prompt("text", text=100, came=2)
    assert ordered([long, short, text]) == [text, short, long]


def test_a_video_that_is_nearly_done_goes_before_a_text_that_takes_longer() -> None:
    video, text = prompt("video", text=100), prompt("text", text=300, came=1)
    assert ordered([text, video]) == [video, text]


def test_videos_about_as_large_go_in_the_order_of_coming() -> None:
    first, second = prompt("first", 620), prompt("second", 600, came=1)
    assert ordered([second, first]) == [first, second]


def test_priority_goes_before_size_until_a_request_is_aged() -> None:
    urgent = prompt("urgent", 9000, priority=-1, came=1)
    text = prompt("text", text=100)
    assert ordered([text, urgent]) == [urgent, text]
    assert ordered([text._replace(aged=True), urgent]) == [text._replace(aged=True), urgent]


def test_few_half_encoded_requests_hold_slots_whatever_comes() -> None:
    """An adversary sends videos ever shorter; each would pass the others and hold a slot."""
    running: list[Candidate] = []
    for size in range(4096, 15, -16):
        comes = prompt(f"v{size}", *[16] * (size // 16), running=False)
        if ordered([comes, *running])[0] is comes:
            running.append(comes._replace(running=True))
    assert len(running) <= 1 + math.log2(4096 / 16)


# --- times ----------------------------------------------------------------------------------------


@lru_cache(maxsize=64)
def learned(
    base: float = 0.010,
    prefill: float = 20e-6,
    encoder: float = 100e-6,
    attention: float = 0.0,
) -> StepTimes:
    times = StepTimes()
    for _ in range(50):
        for work in (
            StepWork(3, 0, 0),
            StepWork(3, 400, 0, attended(400, 0)),
            StepWork(3, 300, 512, attended(300, 3000)),
            StepWork(3, 200, 100, attended(200, 9000)),
        ):
            took = base + work.prefill_tokens * prefill + work.encoder_tokens * encoder
            times.observe(work, took + work.attended * attention)
    return times


@QUICK
@given(st.floats(0.001, 0.1), st.floats(1e-6, 1e-3), st.floats(1e-6, 1e-3), st.floats(1e-9, 1e-6))
def test_prices_are_recovered_where_prefill_and_encoder_work_come_together(
    base: float, prefill: float, encoder: float, attention: float
) -> None:
    times = learned(base, prefill, encoder, attention)
    assert times.base_s(3) == pytest.approx(base)
    step = prefill * 400 + encoder * 512 + attention * attended(300, 3000)
    assert times.seconds(0, 400) == pytest.approx(
        400 * prefill + attended(400, 0) * attention, abs=1e-4 * step, rel=1e-3
    )
    assert times.seconds(1, 0) == pytest.approx(encoder, abs=1e-4 * step / 512, rel=1e-3)
    assert times.seconds(512, 300, 3000) == pytest.approx(
        300 * prefill + 512 * encoder + attended(300, 3000) * attention, rel=1e-3
    )


@QUICK
@given(st.floats(1e-4, 1.0), st.integers(0, 30_000))
def test_as_many_tokens_fit_as_take_the_time(seconds: float, context: int) -> None:
    times = learned(attention=20e-9)
    tokens = times.tokens(seconds, context, 10**9)
    took = [times.seconds(0, n, context) for n in (tokens, tokens + 1)]
    assert took[0] <= seconds * (1 + 2e-6) <= took[1] * (1 + 4e-6)


@QUICK
@given(
    st.floats(1e-6, 1e-3),
    st.floats(1e-9, 1e-6),
    st.integers(1, 30_000),
    st.integers(0, 30_000),
)
def test_the_time_of_a_prompt_is_time_for_its_last_token(
    prefill: float, attention: float, tokens: int, context: int
) -> None:
    times = learned(prefill=prefill, attention=attention)
    assert times.tokens(times.seconds(0, tokens, context), context, 10**9) == tokens


def test_a_step_that_was_held_up_does_not_change_what_others_are_expected_to_take() -> None:
    times = learned.__wrapped__()
    before = times.seconds(512, 300, 0)
    times.observe(StepWork(3, 300, 512, attended(300, 0)), 50.0)
    times.observe(StepWork(3, 0, 0), 50.0)
    assert times.seconds(512, 300, 0) <= 1.5 * before
    assert times.base_s(3) <= 0.011 + 1e-9


def test_a_slow_first_call_is_forgotten() -> None:
    times = StepTimes()
    times.observe(StepWork(1, 0, 512), 5.0)
    for _ in range(80):
        times.observe(StepWork(1, 0, 0), 0.010)
        times.observe(StepWork(1, 0, 512), 0.010 + 512 * 100e-6)
    assert times.seconds(1, 0) == pytest.approx(100e-6, rel=0.05)


@QUICK
@given(token=st.floats(0.0, 0.005), decodes=st.integers(1, 32), slower=st.floats(0.5, 2.0))
def test_the_base_is_that_of_as_many_decodes_whatever_decoded_last(
    token: float, decodes: int, slower: float
) -> None:
    times, step = StepTimes(), 0.010
    for _ in range(20):
        for other in range(1, 17):
            times.observe(StepWork(other, 0, 0), step + other * token)
        # Steps that do more leave the base alone.
        times.observe(StepWork(3, 300, 512), step + 3 * token + 300 * 20e-6 + 512 * 100e-6)
    assert times.base_s(decodes) == pytest.approx(step + decodes * token, rel=0.02)
    for _ in range(40):
        times.observe(StepWork(8, 0, 0), slower * (step + 8 * token))
    assert times.base_s(8) == pytest.approx(slower * (step + 8 * token), rel=0.05)
    assert 0.0 <= times.base_s(1) <= times.base_s(8)


@QUICK
@given(st.floats(0.0, 0.05), st.floats(1e-6, 1e-3))
def test_what_any_prompt_adds_to_a_step_is_told_from_what_its_tokens_take(
    added: float, prefill: float
) -> None:
    times = StepTimes()
    for tokens in (40, 300, 120, 700, 20, 450) * 8:
        times.observe(StepWork(3, 0, 0), 0.010)
        times.observe(StepWork(3, tokens, 0), 0.010 + added + prefill * tokens)
    assert times.base_s(3) == pytest.approx(0.010)
    step = added + prefill * 700
    assert times.base_s(3, prompts=True) == pytest.approx(0.010 + added, abs=0.02 * step)
    assert times.seconds(0, 500) == pytest.approx(500 * prefill, abs=0.02 * step)


def test_prompts_that_are_all_of_one_size_are_charged_by_the_token() -> None:
    times = StepTimes()
    for _ in range(20):
        times.observe(StepWork(3, 0, 0), 0.010)
        times.observe(StepWork(3, 256, 0), 0.010 + 256e-4)
    assert times.base_s(3, prompts=True) == pytest.approx(0.010, rel=0.02)
    assert times.seconds(0, 256) == pytest.approx(256e-4, rel=0.02)


@pytest.mark.parametrize("varies", [0.0, 0.1, 0.25])
def test_the_spread_is_that_of_steps_that_mostly_encode(varies: float) -> None:
    times = StepTimes()
    for share in (math.sqrt(2) * varies * math.sin(number) for number in range(200)):
        times.observe(StepWork(3, 0, 0), 0.010)
        times.observe(StepWork(3, 400, 0), 0.010 + 400 * 20e-6 * (1 + 2 * share))
        times.observe(StepWork(3, 0, 512), (0.010 + 512 * 100e-6) * (1 + share))
    # What is expected follows the last steps, too.
    assert 0.7 * varies - 1e-6 <= times.encoder_spread <= 1.4 * varies + 1e-3


def test_prices_are_unknown_before_there_was_a_step() -> None:
    times = StepTimes()
    assert (times.base_s(1), times.itl_s, times.seconds(9, 9)) == (0.0, 0.0, 0.0)


# --- a step ---------------------------------------------------------------------------------------


@QUICK
@given(st.floats(0.001, 1.0), st.floats(0.0, 1.0))
def test_prompts_have_what_decoding_leaves_of_the_target_but_a_share_at_least(
    target: float, base: float
) -> None:
    seconds = step_seconds(target, base)
    assert seconds >= LEAST_SHARE * (seconds + base) * (1 - 1e-9)
    assert seconds + base == pytest.approx(max(target, base / (1 - LEAST_SHARE)))


@QUICK
@given(candidates, rooms)
def test_a_plan_keeps_to_its_room(found: list[Candidate], room: Room) -> None:
    made = plan(found, room, learned())
    by_key = {one.key: one for one in found}
    grants = made.grants.items()
    assert made.tokens == sum(grant.tokens for _, grant in grants) <= room.tokens
    encoded = sum(item.tokens for _, grant in grants for item in grant.items)
    assert made.encoder_tokens == encoded <= room.encoder_tokens
    assert sum(counts(made).values()) <= room.items
    assert sum(not by_key[key].running for key in made.grants) <= room.slots
    for key, grant in grants:
        assert grant.items == by_key[key].items[: len(grant.items)]
        assert 0 < grant.tokens <= by_key[key].left
    # What fits no step, or none with text in it, and the tokens that go with what is encoded.
    largest = max((item.tokens for one in found for item in one.items), default=0)
    slack = largest * ENCODER * (2 * largest * ENCODER > room.media_s) + 32 * 9 * PREFILL
    assert made.seconds <= room.seconds + slack


@QUICK
@given(st.lists(st.integers(1, 900), min_size=1, max_size=9), st.integers(40, 900), rooms)
def test_a_step_is_full_if_there_is_enough_to_do(items: list[int], text: int, room: Room) -> None:
    room = replace(room, encoder_tokens=10**6, items=64, tokens=10**6, late_s=0.0)
    video = prompt("video", *items, text=text)
    made = plan([video], room, learned())
    everything = learned().seconds(sum(items), video.left)
    enough = min(room.media_s, everything) - made.seconds
    # What is left over is less than the next item takes to encode.
    assert enough <= ENCODER * max(items) + PREFILL + 1e-6


@QUICK
@given(candidates, rooms)
def test_nobody_behind_has_encoded_what_one_before_it_found_no_room_for(
    found: list[Candidate], room: Room
) -> None:
    room = replace(room, slots=100, reserved=0, seconds=1e3, media_s=1e3, tokens=10**6)
    made = plan(found, room, learned())
    refused = False
    for one in found:
        got = counts(made).get(one.key, 0)
        assert not (refused and got)
        refused = refused or got < len(one.items)


def test_an_item_that_fits_a_step_only_without_its_prefill_is_encoded_and_prefilled_after() -> None:
    made = planned(prompt("video", 900, 900))
    assert counts(made) == {"video": 1}
    assert made.tokens == pytest.approx(500, abs=5)


def test_an_item_that_fits_no_step_is_encoded_and_later_steps_make_up_for_it() -> None:
    large = prompt("large", 3000, 3000)
    made = planned(large)
    assert counts(made) == {"large": 1}
    late = made.seconds - ROOM.seconds
    assert late == pytest.approx(0.2, abs=0.01)
    behind = large._replace(computed=3000, left=3000, items=large.items[1:])
    text = prompt("text", text=400)
    assert counts(planned(behind, text, late_s=late)) == {"text": 0}
    assert counts(planned(behind, text, late_s=0.0)) == {"text": 0, "large": 1}


def test_what_is_ready_is_computed_before_more_is_encoded() -> None:
    video = prompt("video", 400, computed=0)
    ready = Candidate(
        **{**video._asdict(), "left": 8400, "items": (Item(0, 400, "x", 8000, 8400),)}
    )
    made = planned(ready, tokens=10**6)
    assert counts(made) == {"video": 0}
    assert made.tokens == pytest.approx(5000, abs=5)


def test_a_waiting_request_gets_a_slot_only_with_its_first_item_unless_that_is_far_off() -> None:
    waits = prompt("waits", 600, running=False)
    assert counts(planned(waits, encoder_tokens=500)) == {}
    assert counts(planned(waits)) == {"waits": 1}
    far = waits._replace(left=6600, items=(Item(0, 600, "far", 6000, 6600),))
    assert counts(planned(far, encoder_tokens=500)) == {"waits": 0}


def test_one_request_gets_all_it_can_use_before_the_next_gets_any() -> None:
    made = planned(prompt("one", *[64] * 20), prompt("two", *[64] * 30, came=1))
    assert list(made.grants) == ["one"]
    made = planned(prompt("one", *[64] * 4), prompt("two", *[64] * 30, came=1))
    assert counts(made)["one"] == 4
    assert counts(made)["two"] > 4


def test_encoders_are_called_in_few_steps_and_none_is_left_half_empty() -> None:
    """A step of 100 ms has time to encode 15 of 64 items, or to prefill half of what these are."""
    video, calls, seconds = prompt("video", *[64] * 64), 0, []
    while video.left:
        made = plan([video], ROOM, learned(prefill=200e-6))
        grant = made.grants["video"]
        calls += bool(grant.items)
        seconds.append(made.seconds)
        items = video.items[len(grant.items) :]
        video = video._replace(
            computed=video.computed + grant.tokens,
            left=video.left - grant.tokens,
            items=items,
            encoder_tokens=sum(item.tokens for item in items),
        )
    assert min(seconds[:-1]) >= ROOM.seconds - 64 * ENCODER
    assert calls <= len(seconds) / 2


def test_who_was_refused_of_late_goes_behind_all_others_however_long_it_waits() -> None:
    refused = prompt("refused", 600, running=False, aged=True, last=True)
    video, text = prompt("video", 900, came=1), prompt("text", text=100, came=2, aged=True)
    assert ordered([refused, video, text]) == [text, video, refused]


def test_equal_items_are_encoded_once() -> None:
    one, other = prompt("same", 700), prompt("same", 700, came=1)._replace(key="twin")
    made = planned(one, other)
    assert counts(made) == {"same": 1, "twin": 1}
    assert made.encoder_tokens == 700


def test_items_that_share_a_placeholder_are_encoded_together() -> None:
    picture, sound = Item(0, 300, "picture", 0, 400), Item(1, 100, "sound", 0, 400)
    both = prompt("both", 700)._replace(items=(picture, sound, Item(2, 300, "later", 400, 700)))
    assert counts(planned(both, encoder_tokens=399)) == {}
    assert counts(planned(both, encoder_tokens=400)) == {"both": 2}
    assert counts(planned(both, items=1)) == {"both": 2}
    assert counts(planned(both, seconds=0.03, media_s=0.03)) == {"both": 2}


def test_the_reserved_slot_is_for_text_and_aged_requests() -> None:
    video = prompt("video", 100, running=False)
    text = prompt("text", text=100, running=False)
    assert counts(planned(video, slots=1, reserved=1)) == {}
    assert counts(planned(video._replace(aged=True), slots=1, reserved=1)) == {"video": 1}
    assert counts(planned(video, text, slots=1, reserved=1)) == {"text": 0}


def test_a_slot_is_kept_for_an_aged_request_whose_turn_has_not_come() -> None:
    aged = prompt("aged", 900, running=False, aged=True)
    texts = [prompt(f"text{n}", text=10, running=False, came=1 + n) for n in range(3)]
    made = planned(aged, *texts, encoder_tokens=0, slots=3)
    assert len(made.grants) == 2


def test_text_has_half_of_a_step_beside_aged_videos() -> None:
    videos = [prompt(f"video{n}", *[100] * 50, aged=True, came=n) for n in range(9)]
    text = prompt("text", text=5000, came=10)
    made = planned(*videos, text, tokens=10**6)
    assert made.grants["text"].tokens == pytest.approx(2500, abs=5)
    assert counts(made)["video0"] > 2


def test_prompts_get_on_where_decoding_takes_all_of_the_target() -> None:
    seconds = step_seconds(0.01, 1.0)
    made = planned(prompt("video", 64, 64), seconds=seconds, media_s=seconds)
    assert made.tokens >= 32
    assert made.encoder_tokens


def test_where_prefill_is_not_limited_only_encoding_is() -> None:
    made = planned(prompt("video", 400, 400, 400, text=90), prefill_counts=False)
    assert counts(made) == {"video": 2}
    assert made.tokens == 800


@QUICK
@given(candidates, rooms)
def test_where_prompts_are_computed_in_one_piece_they_have_all_their_items_or_wait(
    found: list[Candidate], room: Room
) -> None:
    room = replace(room, whole=True, prefill_counts=False)
    made = plan(found, room, learned())
    begun = [one for one in found if not one.running and one.items and one.key in made.grants]
    assert all(made.grants[one.key].items == one.items for one in begun)
    # One that is larger than any step or cache has its turn, too.
    alone = [one._replace(running=False, aged=True) for one in found[:1]]
    assert plan(alone, replace(room, slots=1, late_s=0.0), learned()).grants or not alone


@pytest.mark.parametrize("away", [2047, 2048, 2049])
def test_a_request_whose_first_item_is_a_step_away_begins(away: int) -> None:
    items = (Item(0, 100, "a#0", away, away + 100),)
    one = prompt("a", running=False, items=items, encoder_tokens=100, media=True, left=away + 100)
    grant = plan([one], ROOM, StepTimes()).grants["a"]
    assert grant.tokens == 2048
    assert grant.items == (items if away < 2048 else ())


@pytest.mark.parametrize("overdraws", [False, True])
def test_one_that_cannot_let_go_of_its_outputs_is_not_closed_out_by_one_without_room(
    overdraws: bool,
) -> None:
    """It holds an output beside which a drafter needs the next one, for which there is no room."""
    room = replace(ROOM, encoder_tokens=50, shift=1)
    waits, stands = prompt("waits", 100), prompt("stands", 100, text=9)
    found = plan([waits, stands._replace(overdraws=overdraws)], room, StepTimes()).grants
    assert found.keys() == ({"stands"} if overdraws else set())


@pytest.mark.parametrize("overdraws", [False, True])
def test_items_that_are_needed_together_and_find_no_room_take_no_step_from_others(
    overdraws: bool,
) -> None:
    """A drafter needs both of two items of one token, and the encoder cache has room for one."""
    room = replace(ROOM, encoder_tokens=1, shift=2, together=4096 if overdraws else math.inf)
    both, text = prompt("both", 1, 1, text=3000), prompt("text", text=3000)
    found = plan([both, text], room, StepTimes()).grants
    assert found.keys() == ({"both"} if overdraws else {"text"})


@pytest.mark.parametrize("size", [800, 400])
@pytest.mark.parametrize("together", [1024, math.inf])
def test_what_shares_a_placeholder_and_fits_no_step_has_one_if_the_encoder_cache_takes_it(
    together: float, size: int
) -> None:
    room = replace(ROOM, encoder_tokens=1024, together=together)
    items = (Item(0, size, "picture", 0, size + 400), Item(1, 400, "sound", 0, size + 400))
    whole = size + 400
    both = prompt("both", items=items, encoder_tokens=whole, media=True, left=whole)
    behind = prompt("behind", 200, came=1)
    found = counts(plan([both, behind], room, StepTimes()))
    fits = size == 400 or together == 1024
    assert found == ({"both": 2} | ({"behind": 1} if size == 400 else {}) if fits else {})
    # One before them that found no room they do not pass.
    busy = replace(room, encoder_tokens=900)
    assert not plan([prompt("before", 1000), both], busy, StepTimes()).grants
