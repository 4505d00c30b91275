"""The quality controller: bounds, tiers, sticky decisions and fitting together."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from quality_costs import FAMILY, FIXED, QWEN2_5_VL, RuleCosts, defaults, video

from vllm_mm_ext.base.shared_state import EngineLoad, private_state
from vllm_mm_ext.config.options import NO_REDUCTION, Floor, Reduction, RequestOptions
from vllm_mm_ext.config.quality_settings import (
    QualitySettings,
    StickySettings,
)
from vllm_mm_ext.errors import OverBudgetError
from vllm_mm_ext.policies.quality.controller import QualityController
from vllm_mm_ext.policies.quality.videos import (
    ContextUse,
    Family,
    SamplingDefaults,
    VideoDecision,
    VideoSource,
)

WIDE = ContextUse(length=1 << 20, text=100, output=100)


class Setup:
    """A controller with a state of its own, a clock that is set by hand, and one family."""

    def __init__(self, settings: QualitySettings | None = None) -> None:
        self.now = 1000.0
        self.state = private_state()
        self.controller = QualityController(
            settings or QualitySettings(), self.state, clock=lambda: self.now
        )

    def busy(self, kv: float) -> None:
        self.state.write_load(0, EngineLoad(self.now, kv, 0, 0, 64))
        self.controller.level()

    def plan(
        self,
        *videos: VideoSource,
        options: RequestOptions | None = None,
        session: str | None = None,
        context: ContextUse = WIDE,
        family: Family = FAMILY,
        base: SamplingDefaults | None = None,
        costs: RuleCosts | None = None,
        levels: Sequence[int] | None = None,
        sticky: bool = True,
    ) -> tuple[VideoDecision, ...]:
        return self.controller.plan(
            videos,
            costs or RuleCosts(videos),
            defaults=base or defaults(),
            family=family,
            options=options or RequestOptions(),
            session=session,
            context=context,
            levels=levels,
            sticky=sticky,
        )


@pytest.fixture
def setup() -> Iterator[Setup]:
    made = Setup()
    yield made
    made.state.close()


def with_settings(**sections: object) -> Setup:
    return Setup(QualitySettings.model_validate(sections))


def total(decisions: Sequence[VideoDecision]) -> int:
    """Tokens of videos that are shown once."""
    return sum(decision.tokens or 0 for decision in decisions)


# --- as asked -------------------------------------------------------------------------------------


def test_without_load_and_with_room_a_video_is_as_the_server_samples_it(setup: Setup) -> None:
    (decision,) = setup.plan(video())
    assert (decision.fps, decision.min_frames, decision.max_frames) == (1.0, 4, 64)
    assert (decision.level, decision.frame_pixels, decision.reduction) == (0, 0, NO_REDUCTION)
    assert decision.frames == 60
    assert decision.lowered == ()


def test_options_replace_the_servers_defaults(setup: Setup) -> None:
    options = RequestOptions(
        fps=2.0, min_frames=8, max_frames=100, resolution=300, reduction=Reduction(pool=2)
    )
    (decision,) = setup.plan(video(), options=options)
    assert (decision.fps, decision.min_frames, decision.max_frames) == (2.0, 8, 100)
    assert decision.frame_pixels == 300 * 300
    assert decision.reduction == Reduction(pool=2)
    assert decision.frames == 100


def test_a_lower_bound_above_the_servers_default_upper_bound_lifts_it(setup: Setup) -> None:
    (decision,) = setup.plan(video(seconds=600), options=RequestOptions(min_frames=100))
    assert decision.frames == 100


# --- load -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("kv", "level", "frames"), [(0.8, 1, 44), (0.9, 2, 30)])
@pytest.mark.parametrize("most", [60, 200])
def test_load_lowers_resolution_and_frame_rate_of_what_was_asked(
    setup: Setup, kv: float, level: int, frames: int, most: int
) -> None:
    setup.busy(kv)
    (decision,) = setup.plan(video(), base=defaults(max_frames=most))
    asked = RuleCosts([video()]).pixels(0, 60, 0)
    scale = (336, 224)[level - 1] / 448
    assert decision.level == level
    assert decision.frames == frames
    assert decision.frame_pixels == int(asked * scale**2)
    assert [(one.what, one.why) for one in decision.lowered] == [
        ("frames", "load"),
        ("resolution", "load"),
    ]


def test_a_clip_on_a_fixed_step_stays_on_one_under_load(setup: Setup) -> None:
    setup.busy(1.0)
    (decision,) = setup.plan(video(seconds=40))
    assert decision.fps * 40 < decision.max_frames


def test_fixed_quality_ignores_load(setup: Setup) -> None:
    setup.busy(1.0)
    (decision,) = setup.plan(video(), options=RequestOptions(quality="fixed"))
    assert (decision.level, decision.lowered) == (0, ())


def test_what_another_server_has_decided_holds_whatever_the_load_here(setup: Setup) -> None:
    setup.busy(1.0)
    here = Setup()
    try:
        here.busy(0.0)
        assert setup.plan(video(), levels=(0,)) == here.plan(video())
        # Fewer levels than videos, and more tiers than this server has.
        assert here.plan(video(), levels=())[0].level == 0
        assert here.plan(video(), levels=(1,))[0].level == 1
        assert here.plan(video(), levels=(99,))[0].level == 2
    finally:
        here.state.close()


def test_load_tiers_can_be_turned_off() -> None:
    setup = with_settings(enabled=False)
    setup.busy(1.0)
    assert setup.plan(video())[0].level == 0


def test_load_does_not_lower_a_video_below_the_requests_floor(setup: Setup) -> None:
    setup.busy(1.0)
    floor = Floor(fps=0.9, frames=50, resolution=700)
    (decision,) = setup.plan(video(), options=RequestOptions(floor=floor))
    assert decision.level == 2
    assert decision.fps == 0.9
    assert decision.frames >= 54
    assert decision.frame_pixels == 700 * 700


def test_load_leaves_the_size_of_a_family_with_one_size(setup: Setup) -> None:
    setup.busy(1.0)
    source = video()
    family = replace(FAMILY, resizable=False)
    (decision,) = setup.plan(source, family=family, costs=RuleCosts([source], rule=FIXED))
    assert decision.frame_pixels == 0
    assert [one.what for one in decision.lowered] == ["frames"]


def test_a_family_that_cannot_count_still_follows_load(setup: Setup) -> None:
    setup.busy(1.0)
    source = video()
    costs = RuleCosts([source])
    family = Family(resizable=True, reducible=False, countable=False, frame_multiple=2)
    narrow = ContextUse(length=10, text=5, output=5)
    (decision,) = setup.plan(source, family=family, costs=costs, context=narrow)
    assert (decision.level, decision.tokens, costs.calls) == (2, None, [])


# --- sticky decisions -----------------------------------------------------------------------------


@pytest.mark.parametrize("session", [None, "talk"])
def test_follow_ups_keep_their_tier_and_plan_through_a_load_ramp(
    setup: Setup, session: str | None
) -> None:
    first = setup.plan(video(), session=session)
    setup.busy(1.0)
    assert setup.plan(video("other"), session=session)[0].level == 2
    assert setup.plan(video(), session=session) == first
    setup.now += 900
    assert setup.plan(video(), session=session) == first
    setup.now += 900
    assert setup.plan(video(), session=session) == first


def test_a_decision_that_nobody_used_for_its_time_to_live_is_made_anew(setup: Setup) -> None:
    setup.plan(video(), session="talk")
    setup.now += StickySettings().ttl_s + 1
    setup.busy(1.0)
    assert setup.plan(video(), session="talk")[0].level == 2


def test_a_new_session_takes_over_the_tier_of_the_video(setup: Setup) -> None:
    setup.busy(1.0)
    setup.plan(video(), session="first")
    setup.now += 200
    assert setup.controller.level() == 0
    assert setup.plan(video(), session="second")[0].level == 2
    assert setup.plan(video("other"), session="second")[0].level == 0


@pytest.mark.parametrize("asker", [None, "other"])
@pytest.mark.parametrize("first", [None, "first"])
def test_what_one_session_s_text_left_for_a_video_decides_for_no_other(
    setup: Setup, first: str | None, asker: str | None
) -> None:
    context = ContextUse(length=8192, text=100, output=400)
    crowded = replace(context, text=6500)
    (full,) = Setup().plan(video(), context=context)
    (left,) = setup.plan(video(), session=first, context=crowded)
    assert (left.tokens or 0) < (full.tokens or 0)
    assert setup.plan(video(), session=asker, context=context) == (full,)
    assert setup.plan(video(), session=first, context=crowded) == (left,)


def test_a_video_in_constant_use_comes_back_to_full_quality_for_new_sessions(setup: Setup) -> None:
    setup.busy(1.0)
    setup.plan(video(), session="old")
    for step in range(40):
        setup.now += 300
        (kept,) = setup.plan(video(), session="old")
        assert kept.level == 2
        setup.plan(video(), session=f"new{step}")
    assert setup.plan(video(), session="newest")[0].level == 0


def test_other_options_are_decided_on_their_own(setup: Setup) -> None:
    setup.plan(video())
    setup.busy(1.0)
    assert setup.plan(video(), options=RequestOptions(max_frames=63))[0].level == 2


@pytest.mark.parametrize("session", [None, "talk"])
def test_a_request_may_neither_keep_a_decision_nor_take_one_over(
    setup: Setup, session: str | None
) -> None:
    setup.plan(video(), session=session, sticky=False)
    setup.busy(1.0)
    assert setup.plan(video(), session=session)[0].level == 2
    setup.now += 200
    assert setup.controller.level() == 0
    assert setup.plan(video(), session=session, sticky=False)[0].level == 0
    assert setup.plan(video(), session=session)[0].level == 2


def test_stickiness_can_be_turned_off() -> None:
    setup = with_settings(sticky={"enabled": False})
    setup.plan(video(), session="talk")
    setup.busy(1.0)
    assert setup.plan(video(), session="talk")[0].level == 2


def test_tokens_once_granted_stay_while_the_context_holds_them(setup: Setup) -> None:
    context = ContextUse(length=8192, text=100, output=400)
    first = setup.plan(video(), session="talk", context=context)
    assert 0 < total(first) <= 0.8 * 8192
    longer = replace(context, text=1200)
    assert setup.plan(video(), session="talk", context=longer) == first
    full = replace(context, text=6000)
    (squeezed,) = setup.plan(video(), session="talk", context=full)
    assert (squeezed.tokens or 0) <= full.left
    assert (squeezed.tokens or 0) < total(first)


@pytest.mark.parametrize("session", [None, "talk"])
@pytest.mark.parametrize("family", [FAMILY, replace(FAMILY, max_item_tokens=6000)])
def test_a_video_shown_again_keeps_its_plan(
    setup: Setup, session: str | None, family: Family
) -> None:
    once = setup.plan(video(), session=session, family=family)
    for uses in (2, 3, 1):
        again = replace(video(), uses=uses)
        assert setup.plan(again, session=session, family=family) == once


def test_a_video_shown_too_often_for_its_tokens_is_lowered_until_all_uses_fit(
    setup: Setup,
) -> None:
    context = ContextUse(length=8192, text=100, output=400)
    (once,) = setup.plan(video(), context=context)
    (thrice,) = setup.plan(replace(video(), uses=3), context=context)
    assert 0 < 3 * (thrice.tokens or 0) <= context.left < 3 * (once.tokens or 0)


def test_an_earlier_grant_below_the_floor_takes_nothing_from_the_context(setup: Setup) -> None:
    context = ContextUse(length=8000, text=100, output=400)
    options = RequestOptions(floor=Floor(frames=8))
    setup.plan(video("a"), options=options, session="s", context=replace(context, length=2500))
    videos = [video("a"), video("b")]
    # Long sound, so that the floor is above what was granted.
    costs = RuleCosts([replace(videos[0], duration=4000.0), videos[1]], sound_rate=1)
    decisions = setup.plan(*videos, options=options, session="s", context=context, costs=costs)
    assert total(decisions) <= context.left


def test_a_second_video_leaves_the_first_as_it_is(setup: Setup) -> None:
    context = ContextUse(length=12_000, text=100, output=400)
    small = video("a", seconds=8)
    first = setup.plan(small, session="talk", context=context)
    both = setup.plan(small, video("b"), session="talk", context=context)
    assert both[0] == first[0]
    assert total(both) <= 0.8 * 12_000


def test_videos_whose_grants_leave_too_little_for_a_new_one_are_granted_anew(setup: Setup) -> None:
    context = ContextUse(length=4096, text=100, output=200)
    options = RequestOptions(floor=Floor(resolution=500))
    (before,) = setup.plan(video("a"), options=options, session="talk", context=context)
    videos = [video("a"), *(video(str(index)) for index in range(50))]
    after = setup.plan(*videos, options=options, session="talk", context=context)
    assert (after[0].tokens or 0) < (before.tokens or 0)
    assert total(after) <= context.left


# --- budgets --------------------------------------------------------------------------------------


def test_a_long_video_fits_a_small_context(setup: Setup) -> None:
    context = ContextUse(length=32_768, text=200, output=1000)
    options = RequestOptions(fps=1.0, max_frames=768)
    (decision,) = setup.plan(video(seconds=7200), options=options, context=context)
    assert decision.tokens is not None
    assert 0.7 * 0.8 * 32_768 <= decision.tokens <= 0.8 * 32_768
    assert decision.frames >= 64
    assert {one.why for one in decision.lowered} == {"context"}


def test_total_tokens_is_named_as_the_reason(setup: Setup) -> None:
    (decision,) = setup.plan(video(), options=RequestOptions(total_tokens=3000))
    assert (decision.tokens or 0) <= 3000
    assert {one.why for one in decision.lowered} == {"total_tokens"}


def test_the_servers_limit_holds_for_requests_that_set_none() -> None:
    setup = with_settings(bounds={"max_total_tokens": 2000})
    (decision,) = setup.plan(video())
    assert (decision.tokens or 0) <= 2000
    assert {one.why for one in decision.lowered} == {"limit"}


def test_one_item_fits_the_encoder_cache(setup: Setup) -> None:
    family = replace(FAMILY, max_item_tokens=1500)
    decisions = setup.plan(video("a"), video("b"), family=family)
    assert all((decision.tokens or 0) <= 1500 for decision in decisions)
    assert {one.why for decision in decisions for one in decision.lowered} == {"limit"}


def test_small_videos_are_left_alone_when_a_large_one_is_lowered(setup: Setup) -> None:
    context = ContextUse(length=10_000, text=100, output=400)
    small, large = setup.plan(video("s", seconds=5), video("l", seconds=600), context=context)
    assert small.lowered == ()
    assert large.lowered != ()


def test_below_the_floors_the_request_is_refused(setup: Setup) -> None:
    options = RequestOptions(floor=Floor(frames=60, resolution=800))
    narrow = ContextUse(length=1000, text=100, output=100)
    with pytest.raises(OverBudgetError, match="leaves 800"):
        setup.plan(video(), options=options, context=narrow)
    # A refusal leaves nothing behind.
    assert setup.plan(video(), options=options)[0].frames == 60


@settings(max_examples=60)
@given(
    seconds=st.lists(st.floats(1, 3600), min_size=1, max_size=4),
    length=st.sampled_from([4096, 32_768, 131_072]),
    kv=st.sampled_from([0.0, 0.85, 1.0]),
    options=st.builds(
        RequestOptions,
        fps=st.sampled_from([None, 0.5, 4.0]),
        max_frames=st.sampled_from([None, 32, 768]),
        total_tokens=st.none() | st.integers(500, 20_000),
        resolution=st.sampled_from([None, 224, 640]),
        reduction=st.sampled_from([None, Reduction(pool=2)]),
    ),
    turns=st.lists(st.integers(0, 3000), min_size=1, max_size=4),
)
def test_every_plan_of_a_conversation_fits_its_context(
    seconds: list[float],
    length: int,
    kv: float,
    options: RequestOptions,
    turns: list[int],
) -> None:
    setup = Setup()
    try:
        setup.busy(kv)
        videos = [video(str(index), length) for index, length in enumerate(seconds)]
        costs = RuleCosts(videos, rule=QWEN2_5_VL)
        text, tiers = 50, set()
        for turn in turns:
            text += turn
            context = ContextUse(length=length, text=text, output=200)
            try:
                decisions = setup.plan(
                    *videos, options=options, session="s", context=context, costs=costs
                )
            except OverBudgetError:
                continue
            assert total(decisions) <= min(context.left, options.total_tokens or context.left)
            tiers.add(tuple(decision.level for decision in decisions))
            setup.now += 5
            setup.busy(0.0)
            for index, decision in enumerate(decisions):
                frames = costs.frames(index, decision.fps, decision.min_frames, decision.max_frames)
                assert frames == decision.frames
                cost = costs.tokens(index, frames, decision.frame_pixels, decision.reduction)
                assert cost == decision.tokens
        assert len(tiers) <= 1
    finally:
        setup.state.close()
