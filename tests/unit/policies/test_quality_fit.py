"""Fit-to-budget: always within it, monotone in it, in the documented order, down to the floors."""

from __future__ import annotations

from dataclasses import replace
from operator import mul

import pytest
from hypothesis import given
from hypothesis import strategies as st
from quality_costs import FAMILY, FIXED, QWEN2_5_VL, QWEN3_VL, RuleCosts, video

from vllm_mm_ext.config.options import NO_REDUCTION, Reduction, TrainedReductions
from vllm_mm_ext.config.quality_settings import BudgetSettings
from vllm_mm_ext.policies.quality.fit import Ladder, Step, Target, over_budget, share, strongest
from vllm_mm_ext.policies.quality.videos import Family, VideoSource

REDUCTIONS = BudgetSettings().reductions
FLOOR_PIXELS = 224 * 224

sources = st.builds(
    video,
    seconds=st.floats(1, 7200),
    width=st.integers(64, 1920),
    height=st.integers(64, 1920),
)
rules = st.sampled_from([QWEN2_5_VL, QWEN3_VL, FIXED])
reductions = st.sampled_from([NO_REDUCTION, Reduction(pool=2), Reduction(static="prune", keep=0.6)])


def ladder(
    source: VideoSource | None = None,
    *,
    fps: float = 1.0,
    most: int = 768,
    cap: int = 0,
    rule: object = QWEN2_5_VL,
    reduction: Reduction = NO_REDUCTION,
    floor_frames: int = 4,
    family: Family = FAMILY,
) -> tuple[Ladder, RuleCosts]:
    source = source or video()
    costs = RuleCosts([source], rule=rule)  # type: ignore[arg-type]
    family = replace(family, resizable=family.resizable and rule is not FIXED)
    frames = costs.frames(0, fps, 4, most)
    target = Target(
        source,
        frames=frames,
        sparse_frames=32,
        floor_frames=min(frames, floor_frames),
        cap=cap,
        pixels=costs.pixels(0, frames, cap),
        floor_pixels=FLOOR_PIXELS,
        reduction=reduction,
        reductions=REDUCTIONS,
    )
    return Ladder(0, target, costs, family), costs


def is_no_better(later: Step, earlier: Step, target: Target) -> bool:
    ours, theirs = later.reduction, earlier.reduction
    return (
        later.frames <= earlier.frames
        and (later.cap or target.pixels) <= (earlier.cap or target.pixels)
        and ours.pool >= theirs.pool
        and ours.temporal >= theirs.temporal
        and ours.keep <= theirs.keep
    )


@given(sources, rules, reductions, st.floats(0.1, 8), st.integers(1, 768), st.integers(1, 64))
def test_each_step_lowers_and_never_raises_and_costs_no_more(
    source: VideoSource, rule: object, reduction: Reduction, fps: float, most: int, floor: int
) -> None:
    found, _ = ladder(
        source, fps=fps, most=most, rule=rule, reduction=reduction, floor_frames=floor
    )
    for place in range(1, len(found.steps)):
        assert is_no_better(found.steps[place], found.steps[place - 1], found.target)
        # A smaller frame may end in more cells that are pooled from less than a full one.
        slack = 1.0 if found.steps[place].reduction.pool == 1 else 1.1
        assert found.cost(place) <= slack * found.cost(place - 1)
    last = found.steps[-1]
    assert last.frames >= min(found.target.frames, floor)
    assert (last.cap or found.target.pixels) >= min(found.target.pixels, FLOOR_PIXELS)


@given(sources, rules, st.integers(1, 200_000), st.integers(0, 200_000))
def test_the_best_plan_is_within_the_budget_and_no_worse_for_a_larger_one(
    source: VideoSource, rule: object, budget: int, more: int
) -> None:
    found, costs = ladder(source, rule=rule)
    place = found.best(budget)
    if found.floor <= budget:
        assert found.cost(place) <= budget
        assert place == 0 or found.cost(place - 1) > budget
    assert found.best(budget + more) <= place
    assert found.best(budget) == place
    assert len(costs.calls) < 40


def test_frames_go_first_then_resolution_then_tokens_then_frames_again() -> None:
    found, _ = ladder(video(seconds=300), fps=2.0)
    target = found.target
    changes: list[str] = []
    for earlier, later in zip(found.steps, found.steps[1:], strict=False):
        if later.frames < earlier.frames:
            changed = "frames" if later.frames >= target.sparse_frames else "frames below sparse"
        elif later.reduction != earlier.reduction:
            changed = "reduction"
        else:
            changed = "resolution"
        if not changes or changes[-1] != changed:
            changes.append(changed)
    assert changes == ["frames", "resolution", "reduction", "frames below sparse"]
    assert found.steps[-1] == Step(4, FLOOR_PIXELS, REDUCTIONS[-1])


def test_frames_that_share_a_pixel_budget_do_not_grow_when_they_get_fewer() -> None:
    found, costs = ladder(video(seconds=600, width=1920, height=1080), rule=QWEN3_VL)
    wanted = costs.pixels(0, found.target.frames, 0)
    fewer = found.steps[40]
    assert costs.pixels(0, fewer.frames, 0) > wanted
    assert costs.pixels(0, fewer.frames, fewer.cap) <= wanted


def test_a_family_is_only_lowered_in_what_it_can_do() -> None:
    plain = replace(FAMILY, resizable=False, reducible=False)
    found, _ = ladder(family=plain)
    assert {(step.cap, step.reduction) for step in found.steps} == {(0, NO_REDUCTION)}


@given(
    st.lists(st.tuples(st.integers(1, 4), st.integers(1, 4)), max_size=4), st.integers(0, 10_000)
)
def test_a_trained_model_is_lowered_by_what_it_knows(
    pairs: list[tuple[int, int]], budget: int
) -> None:
    trained = TrainedReductions(((1, 1), *pairs))
    found, _ = ladder(family=replace(FAMILY, trained=trained))
    assert all(trained.allow(step.reduction) for step in found.steps)
    assert found.cost(found.best(budget)) <= max(budget, found.floor)
    last = found.steps[-1].reduction
    assert trained.towards(last, REDUCTIONS[-1]) == last


def test_a_reduction_asked_for_is_only_made_stronger() -> None:
    asked = Reduction(pool=3, static="prune", keep=0.6)
    assert strongest(asked, REDUCTIONS[0]) == asked
    assert strongest(asked, REDUCTIONS[-1]) == Reduction(
        pool=3, temporal=2, static="prune", keep=0.5
    )


demands = st.lists(
    st.tuples(st.integers(0, 5000), st.integers(0, 5000), st.integers(1, 4)), min_size=1, max_size=8
)


@given(demands, st.integers(0, 50_000), st.integers(0, 5000))
def test_shares_respect_floors_and_the_budget_and_grow_with_it(
    pairs: list[tuple[int, int, int]], extra: int, more: int
) -> None:
    wanted, floors = [a + b for a, b, _ in pairs], [b for _, b, _ in pairs]
    uses = [c for _, _, c in pairs]
    budget = sum(map(mul, uses, floors)) + extra
    shares = share(wanted, floors, uses, budget)
    assert sum(map(mul, uses, shares)) <= budget
    assert all(f <= s <= w for f, s, w in zip(floors, shares, wanted, strict=True))
    larger = share(wanted, floors, uses, budget + more)
    assert all(a <= b for a, b in zip(shares, larger, strict=True))
    if sum(map(mul, uses, wanted)) <= budget:
        assert shares == wanted
    else:
        # Nobody is held below what a lucky one gets above its floor.
        top = max((s for s, f in zip(shares, floors, strict=True) if s > f), default=0)
        assert all(s >= top - 1 or s == w for s, w in zip(shares, wanted, strict=True))


def test_small_videos_get_all_they_want_and_large_ones_the_same() -> None:
    assert share([100, 5000, 9000], [10, 10, 10], [1, 1, 1], 2100) == [100, 1000, 1000]
    assert share([100, 5000, 9000], [10, 10, 10], [2, 3, 1], 4200) == [100, 1000, 1000]


def test_what_does_not_fit_is_refused_with_what_would() -> None:
    found, costs = ladder(video(seconds=600), floor_frames=300)
    error = over_budget([found], 500, costs, "the context of 1000 tokens")
    assert error.code == "over_budget"
    assert str(found.floor) in error.message
    assert "leaves 500" in error.message
    assert "lower floor.frames" in error.message
    frames = int(error.message.split("at most ")[-1].split()[0])
    lowest = found.steps[-1]
    assert costs.tokens(0, frames, lowest.cap, lowest.reduction) <= 500
    assert costs.tokens(0, frames + 2, lowest.cap, lowest.reduction) > 500


def test_too_many_videos_are_refused_with_how_many_would_fit() -> None:
    videos = [video(str(index)) for index in range(5)]
    costs = RuleCosts(videos)
    ladders = [
        Ladder(index, replace(ladder()[0].target, source=source), costs, FAMILY)
        for index, source in enumerate(videos)
    ]
    error = over_budget(ladders, 3 * ladders[0].floor, costs, "total_tokens")
    assert "3 of the videos" in error.message


def test_a_video_shown_several_times_counts_as_several_videos() -> None:
    source = replace(video(), uses=3)
    costs = RuleCosts([source])
    found = Ladder(0, replace(ladder()[0].target, source=source), costs, FAMILY)
    error = over_budget([found], 2 * found.floor, costs, "total_tokens")
    assert f"The 3 videos of this request need {3 * found.floor} tokens" in error.message
    assert "2 of the videos" in error.message


@pytest.mark.parametrize("seconds", [600.0, 7200.0])
def test_sound_that_fills_the_budget_is_refused_with_what_would_fit(seconds: float) -> None:
    source = video(seconds=seconds)
    costs = RuleCosts([source], sound_rate=25)
    frames = costs.frames(0, 1.0, 4, 64)
    target = replace(ladder()[0].target, source=source, frames=frames)
    found = Ladder(0, target, costs, FAMILY)
    cure = "total_tokens of at least {needed}, {missing} more"
    error = over_budget([found], 1000, costs, "total_tokens", cure)
    assert "a shorter video or" in error.message
    assert f"total_tokens of at least {found.floor}, {found.floor - 1000} more" in error.message
