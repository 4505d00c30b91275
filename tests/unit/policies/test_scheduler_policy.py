"""Order, budgets and encoder plan of a step: pure policy."""

from __future__ import annotations

import math
from dataclasses import replace
from functools import lru_cache
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from vllm.v1.request import RequestStatus

from vllm_mm_ext.adapters.scheduler.step_candidates import Candidate, chunk_limits, finishing_first
from vllm_mm_ext.config.scheduler_settings import SchedulerSettings
from vllm_mm_ext.policies.scheduler.encoder_plan import (
    EncoderCapacity,
    EncoderDemand,
    EncoderPlan,
    Item,
    plan,
    serving_order,
)
from vllm_mm_ext.policies.scheduler.order import Rank, RankInputs, aged_after_s, is_aged, rank_of
from vllm_mm_ext.policies.scheduler.step_budget import (
    FINISH_BOTH_SLACK,
    FINISH_SLACK,
    LEAST_PREFILL_TOKENS,
    LEAST_SHARE,
    NOTHING,
    TEXT_FIRST_STEPS,
    Demand,
    Remainder,
    StepBudget,
    StepLimits,
    fair_level,
)
from vllm_mm_ext.policies.scheduler.step_times import StepTimes, StepWork, attended

AGING_S = 20.0
MOST = 2048
# No deadline: the machine may be busy.
QUICK = settings(deadline=None, max_examples=60)
CAPACITY = EncoderCapacity(
    tokens=1000, items=64, cache_tokens=4000, slots=4, reserved=0, lookahead=2
)

candidates = st.lists(
    st.builds(
        RankInputs,
        key=st.just(""),
        since=st.floats(0, 100),
        order=st.just((0.0, 0)),
        priority=st.integers(-3, 3),
        encoder_tokens=st.integers(0, 50_000),
        prefill_steps=st.integers(1, 20),
        resumes=st.booleans(),
    ),
    max_size=20,
).map(
    lambda found: [
        one._replace(key=str(number), order=(0.0, number))
        for number, one in enumerate(sorted(found, key=lambda one: one.since))
    ]
)


# --- order ----------------------------------------------------------------------------------------


def rank(one: RankInputs, now: float) -> Rank:
    return rank_of(one, aged=is_aged(one, now, AGING_S))


def ordered(found: list[RankInputs], now: float) -> list[RankInputs]:
    return sorted(found, key=lambda one: rank(one, now))


def came(name: str, since: float, number: int, **kwargs: Any) -> RankInputs:
    return RankInputs(name, since, (0.0, number), **kwargs)


@QUICK
@given(candidates, st.floats(100, 200))
def test_once_aged_a_request_goes_before_all_that_came_later(
    found: list[RankInputs], now: float
) -> None:
    served = ordered(found, now)
    for place, one in enumerate(served):
        if now - one.since < aged_after_s(AGING_S):
            continue
        assert all(before.order < one.order for before in served[:place])


@QUICK
@given(candidates, st.floats(100, 200), st.floats(0, 100))
def test_nobody_gets_before_an_aged_request_as_time_goes_by(
    found: list[RankInputs], now: float, later: float
) -> None:
    def ahead(one: RankInputs, at: float) -> set[str]:
        mine = rank(one, at)
        return {other.key for other in found if rank(other, at) < mine}

    for one in found:
        if now - one.since >= aged_after_s(AGING_S):
            assert ahead(one, now + later) <= {o.key for o in found if o.order < one.order}


def test_text_goes_before_short_videos_and_these_before_long_ones() -> None:
    long = came("long", 0.0, 0, encoder_tokens=9000)
    short = came("short", 1.0, 1, encoder_tokens=500)
    text = came("text", 2.0, 2)
    assert ordered([long, short, text], 3.0) == [text, short, long]


def test_priority_goes_before_size_until_a_request_is_aged() -> None:
    urgent = came("urgent", 9.0, 1, priority=-1, encoder_tokens=9000)
    text = came("text", 0.0, 0)
    assert ordered([text, urgent], 9.0) == [urgent, text]
    assert ordered([text, urgent], 10.0) == [text, urgent]


def test_prompts_of_many_steps_go_behind_prompts_of_one() -> None:
    book = came("book", 0.0, 0, prefill_steps=40)
    line = came("line", 1.0, 1)
    other = came("other", 2.0, 2)
    assert ordered([book, line, other], 3.0) == [line, other, book]


def test_a_preempted_request_keeps_its_place_in_the_order_of_coming() -> None:
    preempted = came("preempted", 1.0, 1, encoder_tokens=9000, resumes=True)
    text = came("text", 2.0, 2)
    assert ordered([text, preempted], 3.0) == [preempted, text]


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
    assert times.prefill_s == pytest.approx(prefill, abs=1e-4 * step / 400, rel=1e-3)
    assert times.encoder_s == pytest.approx(encoder, abs=1e-4 * step / 512, rel=1e-3)
    assert times.seconds(512, 300, 3000) == pytest.approx(
        300 * prefill + 512 * encoder + attended(300, 3000) * attention, rel=1e-3
    )


@QUICK
@given(st.floats(1e-4, 1.0), st.integers(0, 30_000), st.booleans())
def test_as_many_tokens_fit_as_take_the_time(seconds: float, context: int, encoded: bool) -> None:
    times = learned(attention=20e-9)
    tokens = times.tokens(seconds, context, 10**9, encoded=encoded)
    took = [times.seconds(n if encoded else 0, n, context) for n in (tokens, tokens + 1)]
    assert took[0] <= seconds * (1 + 2e-6) <= took[1] * (1 + 4e-6)


@QUICK
@given(
    st.floats(1e-6, 1e-3),
    st.floats(1e-9, 1e-6),
    st.integers(1, 30_000),
    st.integers(0, 30_000),
    st.booleans(),
)
def test_the_time_of_a_prompt_is_time_for_its_last_token(
    prefill: float, attention: float, tokens: int, context: int, encoded: bool
) -> None:
    times = learned(prefill=prefill, attention=attention)
    seconds = times.seconds(tokens if encoded else 0, tokens, context)
    assert times.tokens(seconds, context, 10**9, encoded=encoded) == tokens


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
    assert times.encoder_s == pytest.approx(100e-6, rel=0.05)


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
    assert (times.base_s(1), times.itl_s, times.prefill_s, times.encoder_s) == (
        0.0,
        0.0,
        None,
        None,
    )


# --- budget ---------------------------------------------------------------------------------------


@QUICK
@given(st.lists(st.floats(0, 1e6), min_size=1, max_size=6), st.floats(0, 1e6))
def test_a_fair_level_uses_all_there_is(needs: list[float], total: float) -> None:
    given_out = sum(min(need, fair_level(needs, total)) for need in needs)
    assert given_out == pytest.approx(min(sum(needs), total), rel=1e-6, abs=1e-3)


def test_there_is_no_level_where_all_get_what_they_need() -> None:
    assert math.isinf(fair_level([1.0, 2.0], 3.0))


def demand(**changes: object) -> Demand:
    usual = Demand(
        decode_tokens=8,
        decoding=True,
        text_due=False,
        prefill_tokens=4000,
        encoder_tokens=20_000,
        next_item=512,
    )
    return replace(usual, **changes)  # type: ignore[arg-type]


def budget(**chosen: object) -> StepBudget:
    return StepBudget(SchedulerSettings(**chosen), MOST, 8192)  # type: ignore[arg-type]


def test_a_step_in_which_nothing_decodes_has_all_there_is() -> None:
    limits = budget().limits(demand(decoding=False), learned())
    assert limits.tokens == limits.prefill_tokens == MOST
    assert limits.encoder_tokens == 8192


def test_idle_encoder_work_is_bounded_by_time_but_one_item_always_goes() -> None:
    short = budget(encoder_step_idle_ms=100.0).limits(demand(decoding=False), learned())
    assert short.encoder_tokens == pytest.approx(1000, rel=0.01)
    shorter = budget(encoder_step_idle_ms=1.0).limits(demand(decoding=False), learned())
    assert shorter.encoder_tokens == 512


def test_work_of_a_step_fits_the_target_while_something_decodes() -> None:
    times = learned()
    found = budget(target_itl_ms=100.0, aging_s=1000.0)
    for prefill in range(0, 4000, 200):
        limits = found.limits(demand(prefill_tokens=prefill), times)
        found.spent(limits.encoder_tokens)
        took = min(prefill, limits.prefill_tokens) * 20e-6 + limits.encoder_tokens * 100e-6
        assert took <= 0.090 * 1.01
    assert found.limits(demand(prefill_tokens=10**6), times).prefill_tokens * 20e-6 <= 0.100


def test_a_backlog_is_worked_off_even_if_the_target_leaves_no_time_for_it() -> None:
    times, aging_s = learned(base=0.010, encoder=100e-6), 32.0
    # 2 s of encoder work, half of what may wait at this bound: half of the time is for it, the
    # prefill of what was encoded included.
    found = budget(target_itl_ms=5.0, aging_s=aging_s, encoder_tokens_decoding=0)
    spent = 0
    for _ in range(50):
        limits = found.limits(demand(encoder_tokens=20_000, prefill_tokens=0), times)
        found.spent(limits.encoder_tokens)
        spent += limits.encoder_tokens
    assert spent * (100e-6 + 20e-6) == pytest.approx(50 * 0.010, rel=0.05)


def test_a_prompt_is_not_cut_where_it_fits_the_target_beside_decoding_and_the_least_encoding() -> (
    None
):
    limits = budget(target_itl_ms=40.0).limits(demand(prefill_tokens=1000), learned())
    assert limits.prefill_tokens >= 1000
    without = demand(prefill_tokens=1490, encoder_tokens=0, next_item=0)
    assert budget(target_itl_ms=40.0).limits(without, learned()).prefill_tokens >= 1490


@QUICK
@given(st.integers(0, 4000), st.integers(0, 4000), st.integers(0, 2000), st.integers(0, 20_000))
def test_what_a_step_holds_takes_no_longer_than_the_target(
    prefill: int, ready: int, encoder: int, context: int
) -> None:
    times = learned(attention=20e-9)
    found = budget(target_itl_ms=100.0, aging_s=80_000.0)
    left = Remainder(encoder, ready + encoder, context)
    asked = demand(prefill_tokens=prefill, encoder_tokens=encoder, next_item=1, context=context)
    if found.finishes(left, times, asked.decode_tokens):
        asked = replace(asked, finish=left)
    limits = found.limits(asked, times)
    media = max(limits.encoder_tokens, asked.finish.encoder_tokens)
    text = min(prefill, max(0, limits.prefill_tokens - media - asked.finish.ready_tokens))
    media = min(media, encoder)
    took = times.seconds(0, text) + times.seconds(media, media + asked.finish.ready_tokens, context)
    assert times.base_s(asked.decode_tokens) + took <= 0.100 * (1 + FINISH_SLACK) + 1e-3
    assert media >= asked.finish.encoder_tokens


@QUICK
@given(st.integers(1, 2000), st.integers(0, 20_000), st.integers(0, 3000))
def test_no_time_is_left_over_in_which_another_item_could_be_encoded(
    item: int, context: int, prefill: int
) -> None:
    times, target_s = learned(attention=2e-9), 0.100
    asked = demand(next_item=item, encoder_tokens=10**5, context=context)
    asked = replace(asked, prefill_tokens=prefill)
    limits = budget(target_itl_ms=100.0, aging_s=80_000.0).limits(asked, times)
    encoded = limits.encoder_tokens // item * item
    others = min(prefill, limits.prefill_tokens - limits.media_tokens)
    took = times.base_s(asked.decode_tokens) + times.seconds(0, others)
    took += times.seconds(encoded, limits.media_tokens if encoded else 0, context)
    assert took <= target_s + 1e-3
    bounded = limits.prefill_tokens == int(0.9 * MOST) or encoded + item > 8192
    assert took + times.seconds(item, 0) >= target_s - 1e-3 or bounded


def test_an_item_that_fits_a_step_only_without_its_prefill_is_encoded_and_prefilled_after() -> None:
    times, found = learned(base=0.010, encoder=100e-6), budget(target_itl_ms=100.0)
    # 80 ms to encode and 16 ms to prefill, in 90 ms.
    asked = demand(next_item=800, encoder_tokens=1600, prefill_tokens=0)
    limits = found.limits(asked, times)
    assert limits.encoder_tokens == 800
    assert limits.media_tokens == pytest.approx(500, abs=10)
    found.spent(800)
    rest = found.limits(replace(asked, encoder_tokens=800, prefill_tokens=300), times)
    assert rest.prefill_tokens - rest.media_tokens >= 300
    assert rest.encoder_tokens == 800


def alone(**changes: object) -> Demand:
    """A video that is the only one to get on, with segments of 64 tokens."""
    usual = demand(
        prefill_tokens=0,
        encoder_tokens=4000,
        next_item=64,
        cache_tokens=8192,
        one=Remainder(4000, 4000),
    )
    return replace(usual, **changes)  # type: ignore[arg-type]


def test_a_video_that_is_alone_has_a_step_filled_with_encoding_or_one_with_prefill() -> None:
    times, found = learned(attention=20e-9), budget(target_itl_ms=100.0)
    capacity = 0.100 - times.base_s(8, prompts=True)
    encoding = found.limits(alone(), times)
    took = times.seconds(encoding.encoder_tokens, encoding.prefill_tokens)
    assert encoding.encoder_tokens % 64 == 0
    assert encoding.prefill_tokens >= LEAST_PREFILL_TOKENS
    assert capacity - 64 * 20e-6 <= took <= capacity + 1e-3
    assert took - times.seconds(encoding.encoder_tokens, 0) < times.seconds(64, 32)
    few = alone(prefill_tokens=100, media_tokens=100, one=Remainder(4000, 4100))
    assert found.limits(few, times).encoder_tokens == encoding.encoder_tokens
    # What is there, far into the prompt, takes more than a step.
    there = alone(prefill_tokens=1000, media_tokens=1000, media_context=10_000)
    prefill = found.limits(there, times)
    assert prefill.encoder_tokens == 0
    assert times.seconds(0, prefill.prefill_tokens, 10_000) == pytest.approx(capacity, abs=1e-3)


def test_text_beside_a_video_that_is_alone_gets_what_it_needs_up_to_half_a_step() -> None:
    times, found = learned(), StepBudget(SchedulerSettings(target_itl_ms=100.0), 8192, 8192)
    capacity = 0.100 - times.base_s(8, prompts=True)
    line = int(0.4 * capacity / 20e-6)
    for media in (0, 4000):
        limits = found.limits(alone(prefill_tokens=line + media, media_tokens=media), times)
        assert limits.prefill_tokens - limits.media_tokens >= line
        took = times.seconds(limits.encoder_tokens, limits.prefill_tokens)
        assert took == pytest.approx(capacity, abs=64 * 100e-6)
    # More, and both have parts of every step.
    page = found.limits(alone(prefill_tokens=2 * line), times)
    assert page.encoder_tokens == page.media_tokens > 0


@pytest.mark.parametrize(
    "changes",
    [{"one": NOTHING}, {"cache_tokens": 63}, {"decoding": False, "text_due": True}],
    ids=["several prompts", "no room in the cache", "nothing decodes"],
)
def test_otherwise_what_is_encoded_is_prefilled_in_the_same_step(changes: dict[str, Any]) -> None:
    limits = budget(target_itl_ms=100.0).limits(alone(**changes), learned())
    assert limits.media_tokens >= limits.encoder_tokens - 64 > 0


def test_a_step_for_prefill_alone_is_not_repeated_if_nothing_came_of_it() -> None:
    times, found = learned(), budget(target_itl_ms=100.0)
    there = alone(prefill_tokens=9000, media_tokens=9000, one=Remainder(4000, 13_000))
    assert found.limits(there, times).encoder_tokens == 0
    assert found.limits(there, times).encoder_tokens > 0
    assert found.limits(replace(there, one=Remainder(4000, 12_000)), times).encoder_tokens == 0


def candidate(
    name: str,
    *,
    left: int = 100,
    items: tuple[Item, ...] = (),
    running: bool = True,
    media: bool = True,
    aged: bool = False,
) -> Candidate:
    status = RequestStatus.RUNNING if running else RequestStatus.WAITING
    request = SimpleNamespace(request_id=name, status=status, mm_features=[0] if media else [])
    rank_inputs = came(name, 0.0, 0, encoder_tokens=sum(item.tokens for item in items))
    return Candidate(request, rank_inputs, 0, left, items, ready=True, aged=aged)


def test_a_video_that_can_be_finished_goes_before_text_and_no_other_does() -> None:
    text, short = candidate("text", media=False, running=False), candidate("short", left=50)
    long = candidate("long", left=900)
    candidates = [text, long, short]
    assert finishing_first(candidates, lambda left: left.prefill_tokens <= 60) == (
        [short, text, long],
        Remainder(0, 50, 0),
    )
    assert finishing_first(candidates, lambda _: False) == (candidates, NOTHING)
    waiting = [text, candidate("short", left=50, running=False)]
    assert finishing_first(waiting, lambda _: True) == (waiting, NOTHING)


def test_a_video_that_can_be_finished_does_not_pass_an_aged_request() -> None:
    old, short = candidate("old", media=False, aged=True), candidate("short", left=50)
    assert finishing_first([old, short], lambda _: True) == ([old, short], NOTHING)


LINE = demand(prefill_tokens=900, text_due=True, text=(Remainder(0, 300), Remainder(0, 200)))


def test_a_step_in_which_text_gets_its_first_token_holds_no_media() -> None:
    limits = budget(target_itl_ms=100.0).limits(LINE, learned())
    assert limits.text_first
    assert limits.prefill_tokens == 500
    assert limits.encoder_tokens == limits.media_tokens == 0


@pytest.mark.parametrize("finish", [NOTHING, Remainder(0, 4400)])
def test_few_steps_put_text_first_however_much_there_is(finish: Remainder) -> None:
    found, times = StepBudget(SchedulerSettings(target_itl_ms=100.0), 8192, 8192), learned()
    asked = replace(LINE, finish=finish)
    cut = [found.limits(asked, times).text_first for _ in range(100)]
    assert cut[0]
    assert sum(cut) == math.ceil(100 * TEXT_FIRST_STEPS)


def test_no_step_puts_text_first_where_there_is_no_media_to_hold_back() -> None:
    found, times = budget(target_itl_ms=100.0), learned()
    alone = replace(LINE, prefill_tokens=500, encoder_tokens=0, next_item=0)
    for _ in range(10):
        assert not found.limits(alone, times).text_first
    assert found.limits(LINE, times).text_first


def test_no_step_puts_text_first_that_it_has_no_time_or_no_room_for() -> None:
    book = replace(LINE, prefill_tokens=9000, text=(Remainder(0, 9000),))
    assert not budget(target_itl_ms=100.0).limits(book, learned()).text_first
    page = replace(LINE, prefill_tokens=1900, text=(Remainder(0, 1900),))
    assert not budget(target_itl_ms=100.0).limits(page, learned()).text_first
    most = StepBudget(SchedulerSettings(target_itl_ms=100.0), 4096, 8192)
    assert most.limits(page, learned()).text_first


def test_the_users_own_encoder_allowance_is_not_cut() -> None:
    found = budget(target_itl_ms=100.0, encoder_tokens_decoding=512)
    assert found.limits(LINE, learned()).encoder_tokens == 512


@QUICK
@given(st.integers(1, 6000), st.integers(0, 1000), st.integers(0, 1000), st.booleans())
def test_a_prompt_that_ends_and_text_share_a_step_that_is_half_longer_at_most(
    text: int, ready: int, encoder: int, only: bool
) -> None:
    times = learned()
    found = StepBudget(SchedulerSettings(target_itl_ms=100.0, aging_s=80_000.0), 8192, 8192)
    left = Remainder(encoder, ready + encoder)
    asked = replace(LINE, prefill_tokens=text, finish=left, text=(Remainder(0, text),))
    if only:
        asked = replace(asked, encoder_tokens=encoder, next_item=encoder)
    if not left.prefill_tokens or not found.finishes(left, times, asked.decode_tokens):
        return
    capacity = 0.100 - times.base_s(asked.decode_tokens, prompts=True)
    both = times.seconds(0, text) + left.seconds(times)
    limits = found.limits(asked, times)
    assert limits.text_first == (capacity < both <= (1 + FINISH_BOTH_SLACK) * capacity)
    if both <= (1 + FINISH_BOTH_SLACK) * capacity:
        assert limits.encoder_tokens >= encoder
        assert limits.prefill_tokens >= text + ready + encoder - 1


def test_text_that_could_be_done_takes_of_a_step_what_it_needs_and_others_share_the_rest() -> None:
    limits = StepLimits(tokens=300, prefill_tokens=200, encoder_tokens=0, media_tokens=0)
    text, media = candidate("text", media=False, left=150), candidate("media", left=900)
    assert chunk_limits(limits, [text, media], []) == {"media": 50}
    book = candidate("book", media=False, left=5000)
    assert chunk_limits(limits, [book, media], []) == {"book": 100, "media": 100}
    line = candidate("line", media=False, left=80, running=False)
    assert chunk_limits(limits, [text, media], [line]) == {"text": 120, "media": 0}
    old = candidate("old", left=900, aged=True)
    assert chunk_limits(limits, [old, text], []) == {"old": 100, "text": 100}


def test_where_text_goes_first_all_behind_it_wait_but_what_is_finished_does_not() -> None:
    limits = StepLimits(300, 200, encoder_tokens=0, media_tokens=0, text_first=True)
    text, media = candidate("text", media=False, left=100), candidate("media", left=900)
    assert chunk_limits(limits, [text, media], []) == {"media": 0}
    short, book = candidate("short", left=50), candidate("book", media=False, left=5000)
    assert chunk_limits(limits, [short, text, media, book], [], Remainder(0, 50)) == {
        "media": 0,
        "book": 0,
    }


@QUICK
@given(
    target=st.floats(0.1, 1000),
    base=st.floats(1e-4, 1.0),
    item=st.integers(1, 2048),
)
def test_an_item_larger_than_the_allowance_is_encoded_after_as_many_steps_as_it_takes(
    target: float, base: float, item: int
) -> None:
    times = learned(base)
    # However much there is to prefill.
    least = LEAST_SHARE * max(target / 1e3, base)
    allowance = max(1.0, min(8192, least / (times.encoder_s or 1.0)) - 2)
    found = budget(target_itl_ms=target)
    steps = 1
    while found.limits(demand(next_item=item), times).encoder_tokens < item:
        steps += 1
    assert steps <= math.ceil(item / allowance)


@QUICK
@given(st.lists(st.integers(0, 4000), max_size=50), st.integers(1, 4000))
def test_encoder_work_stays_within_the_allowance_on_average(
    wanted: list[int], allowance: int
) -> None:
    found = budget(encoder_tokens_decoding=allowance)
    times, spent, largest = learned(), 0, 0
    for step, item in enumerate(wanted, 1):
        limits = found.limits(demand(next_item=item, encoder_tokens=item), times)
        if item <= limits.encoder_tokens:
            found.spent(item)
            spent += item
            largest = max(largest, item)
        assert spent <= step * allowance + largest


def test_prefill_never_takes_the_whole_step_while_something_decodes() -> None:
    limits = budget(prefill_share=0.5).limits(demand(), StepTimes())
    assert limits.prefill_tokens <= MOST // 2


def test_prefill_and_encoder_work_go_on_where_decoding_takes_all_of_the_target() -> None:
    times = learned(base=1.0)
    found = budget(target_itl_ms=10.0)
    limits = found.limits(demand(), times)
    assert limits.prefill_tokens >= LEAST_PREFILL_TOKENS
    assert limits.encoder_tokens > 0


def test_text_that_is_due_is_not_kept_waiting_by_encoder_work_alone() -> None:
    limits = budget().limits(demand(decoding=False, text_due=True), learned())
    assert limits.prefill_tokens == MOST
    assert limits.encoder_tokens < 1000


def test_one_item_is_encoded_to_learn_what_encoding_costs() -> None:
    limits = budget().limits(demand(), StepTimes())
    assert limits.encoder_tokens == 512


# --- encoder plan ---------------------------------------------------------------------------------


def video(
    name: str, *tokens: int, running: bool = False, reach: int = 10**6, aged: bool = False
) -> EncoderDemand:
    starts = [sum(tokens[:number]) for number in range(len(tokens))]
    items = tuple(
        Item(number, size, f"{name}#{number}", start, start + size)
        for number, (size, start) in enumerate(zip(tokens, starts, strict=True))
    )
    return EncoderDemand(name, items, sum(item.tokens for item in items), reach, running, aged)


def counts(found: EncoderPlan) -> dict[str, int]:
    return {key: len(items) for key, items in found.items.items()}


demands = st.lists(
    st.tuples(
        st.lists(st.integers(1, 900), min_size=1, max_size=6),
        st.booleans(),
        st.booleans(),
        st.integers(0, 3000),
    ),
    max_size=8,
).map(
    lambda found: [
        video(str(number), *tokens, running=running, reach=reach, aged=aged)
        for number, (tokens, running, aged, reach) in enumerate(found)
    ]
)
capacities = st.builds(
    EncoderCapacity,
    tokens=st.integers(0, 3000),
    items=st.integers(0, 10),
    cache_tokens=st.integers(0, 3000),
    slots=st.integers(0, 4),
    reserved=st.integers(0, 2),
    lookahead=st.integers(0, 3),
)


@QUICK
@given(demands, capacities)
def test_a_plan_keeps_to_its_capacity(
    found: list[EncoderDemand], capacity: EncoderCapacity
) -> None:
    made = plan(found, capacity)
    by_key = {one.key: one for one in found}
    total = sum(item.tokens for items in made.items.values() for item in items)
    assert made.tokens == total <= min(capacity.tokens, capacity.cache_tokens)
    assert sum(counts(made).values()) <= capacity.items  # none of these share a placeholder
    assert sum(not by_key[key].running for key in made.items) <= capacity.slots
    for key, items in made.items.items():
        assert items == by_key[key].items[: len(items)]


@QUICK
@given(demands, capacities)
def test_nobody_behind_gets_what_one_before_it_found_no_room_for(
    found: list[EncoderDemand], capacity: EncoderCapacity
) -> None:
    made = plan(found, replace(capacity, slots=100))
    refused = False
    for one in serving_order(found):
        got = made.items.get(one.key, ())
        assert not (refused and got)
        reached = sum(item.start < one.reach for item in one.items)
        wanted = max(reached, not one.running) + capacity.lookahead
        refused = refused or len(got) < min(wanted, len(one.items))


@QUICK
@given(demands, capacities)
def test_the_first_in_order_gets_its_first_item_if_it_fits(
    found: list[EncoderDemand], capacity: EncoderCapacity
) -> None:
    if not found or not capacity.items:
        return
    first = serving_order(found)[0]
    fits = first.items[0].tokens <= min(capacity.tokens, capacity.cache_tokens)
    reached = first.items[0].start < first.reach or not first.running or capacity.lookahead > 0
    slot = first.running or capacity.slots > (0 if first.aged else capacity.reserved)
    assert (first.key in plan(found, capacity).items) == (fits and reached and slot)


def test_a_waiting_request_is_let_in_only_with_its_first_item() -> None:
    made = plan([video("a", 600, 600), video("b", 300)], CAPACITY)
    assert counts(made) == {"a": 1}


def test_what_lies_ahead_in_a_request_goes_before_the_next_request() -> None:
    ahead = video("ahead", 300, 300, 300, running=True, reach=100)
    made = plan([ahead, video("b", 300, running=True)], CAPACITY)
    assert counts(made) == {"ahead": 3}
    made = plan([ahead, video("b", 300, running=True)], replace(CAPACITY, tokens=1200))
    assert counts(made) == {"ahead": 3, "b": 1}


def test_a_running_request_has_encoded_what_its_prefill_does_not_reach_yet() -> None:
    far = video("far", 300, 300, 300, running=True, reach=0)
    assert counts(plan([far], CAPACITY)) == {"far": 2}
    assert counts(plan([far], replace(CAPACITY, lookahead=0))) == {}


def test_lookahead_is_bounded() -> None:
    one = video("one", *[100] * 8, running=True, reach=100)
    assert counts(plan([one], CAPACITY)) == {"one": 3}
    assert counts(plan([one], replace(CAPACITY, lookahead=0))) == {"one": 1}


def test_equal_items_are_encoded_once() -> None:
    one, other = video("same", 900), video("same", 900)._replace(key="twin")
    made = plan([one, other], CAPACITY)
    assert counts(made) == {"same": 1, "twin": 1}
    assert made.tokens == 900


def test_few_half_encoded_requests_hold_slots_whatever_comes() -> None:
    """An adversary sends videos ever shorter; each would pass the others and hold a slot."""
    running: list[EncoderDemand] = []
    for size in range(4096, 15, -16):
        comes = video(f"v{size}", *[16] * (size // 16))
        order = serving_order(sorted([comes, *running], key=lambda one: one.tokens))
        if order[0] is comes:
            running.append(comes._replace(running=True))
    assert len(running) <= 1 + math.log2(4096 / 16)


def test_the_reserved_slot_is_for_text_and_aged_requests() -> None:
    capacity = replace(CAPACITY, slots=1, reserved=1)
    assert counts(plan([video("a", 100)], capacity)) == {}
    assert counts(plan([video("a", 100, aged=True)], capacity)) == {"a": 1}


def test_items_that_share_a_placeholder_are_encoded_together() -> None:
    picture, sound = Item(0, 300, "picture", 0, 400), Item(1, 100, "sound", 0, 400)
    later = Item(2, 300, "later", 400, 700)
    both = EncoderDemand("both", (picture, sound, later), 700, reach=10, running=False)
    assert counts(plan([both], replace(CAPACITY, tokens=399))) == {}
    assert counts(plan([both], replace(CAPACITY, tokens=400))) == {"both": 2}
    assert counts(plan([both], replace(CAPACITY, items=1))) == {"both": 2}
