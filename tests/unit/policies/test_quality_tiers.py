"""Load tiers: thresholds, hysteresis, silence."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from vllm_mm_ext.base.shared_state import EngineLoad, TierState
from vllm_mm_ext.config.quality_settings import BudgetSettings, QualitySettings, TierSettings
from vllm_mm_ext.policies.quality.tiers import LoadTiers, mean_of

SETTINGS = TierSettings()
HOLD = SETTINGS.hold_s
TIERS = LoadTiers(SETTINGS)

samples = st.builds(
    EngineLoad,
    time=st.just(0.0),
    kv_usage=st.floats(0, 1),
    running=st.integers(0, 128),
    waiting=st.integers(0, 128),
    slots=st.sampled_from([16, 64, 256]),
    backlog_s=st.none() | st.floats(0, 20),
)
gaps = st.floats(0, 40)
histories = st.lists(st.tuples(gaps, samples), min_size=1, max_size=20)


def load(
    kv: float = 0.0, running: int = 0, time: float = 0.0, slots: int = 1000, waiting: int = 0
) -> EngineLoad:
    return EngineLoad(time, kv, running, waiting, slots)


def run(history: list[tuple[float, EngineLoad]]) -> list[tuple[float, TierState]]:
    state, now, seen = TierState(), 0.0, []
    for gap, sample in history:
        now += gap
        state = TIERS.observe(state, replace(sample, time=now))
        seen.append((now, state))
    return seen


@pytest.mark.parametrize(
    ("sample", "level"),
    [
        (load(kv=0.79), 0),
        (load(kv=0.8), 1),
        (load(kv=0.9), 2),
        (load(running=31), 0),
        (load(running=32), 1),
        (load(running=30, waiting=34), 2),
        (load(running=5, slots=10), 0),
        (load(running=6, slots=10), 1),
        (load(running=4, waiting=4, slots=10), 2),
    ],
)
def test_any_signal_at_its_threshold_raises_the_tier_at_once(
    sample: EngineLoad, level: int
) -> None:
    assert TIERS.observe(TierState(), sample).level == level


def test_comes_down_one_tier_at_a_time_each_after_the_hold() -> None:
    state = TIERS.observe(TierState(), load(kv=1.0))
    state = TIERS.observe(state, load(time=5.0))
    levels = [TIERS.settle(state, 5.0 + k * HOLD / 2).level for k in range(6)]
    assert levels == [2, 2, 1, 1, 0, 0]


def test_a_tier_is_kept_within_the_margin() -> None:
    state = TIERS.observe(TierState(), load(kv=0.8))
    for second in range(1, 50):
        state = TIERS.observe(state, load(kv=0.75, time=float(second)))
    assert state.level == 1
    for second in range(50, 62):
        state = TIERS.observe(state, load(kv=0.71, time=float(second)))
    assert state.level == 0


def test_a_single_busy_sample_starts_the_hold_again() -> None:
    state = TIERS.observe(TierState(), load(kv=0.8))
    state = TIERS.observe(state, load(time=1.0))
    state = TIERS.observe(state, load(kv=0.79, time=HOLD))
    assert TIERS.settle(state, 3 * HOLD).level == 1


def test_a_silent_engine_counts_as_busy_until_its_sample_is_stale() -> None:
    state = TIERS.observe(TierState(), load(kv=1.0))
    stale = SETTINGS.stale_s
    assert TIERS.settle(state, stale + HOLD - 0.1).level == 2
    assert TIERS.settle(state, stale + HOLD).level == 1
    assert TIERS.settle(state, stale + 2 * HOLD).level == 0


@given(histories)
def test_never_comes_down_faster_than_the_hold(history: list[tuple[float, EngineLoad]]) -> None:
    changed, level = -1e9, 0
    for now, state in run(history):
        if state.level < level:
            steps = level - state.level
            assert now - changed >= steps * HOLD - 1e-6
        if state.level != level:
            # A fall may have happened any time before it was looked at.
            changed = (
                now if state.level > level else min(now, changed + (level - state.level) * HOLD)
            )
            level = state.level


@given(histories)
def test_ends_at_the_top_without_load(history: list[tuple[float, EngineLoad]]) -> None:
    now, state = run(history)[-1]
    idle = TIERS.observe(state, load(time=now + 1))
    assert TIERS.settle(idle, now + 1 + HOLD * SETTINGS.levels).level == 0
    silent = now + SETTINGS.stale_s + HOLD * SETTINGS.levels
    assert TIERS.settle(state, silent).level == 0


@given(histories, st.lists(st.tuples(st.floats(0, 1), st.integers(0, 64)), max_size=20))
def test_more_load_never_gives_a_better_tier(
    history: list[tuple[float, EngineLoad]], more: list[tuple[float, int]]
) -> None:
    more = more + [(0.0, 0)] * (len(history) - len(more))
    heavier = [
        (gap, replace(s, kv_usage=min(1.0, s.kv_usage + kv), running=s.running + running))
        for (gap, s), (kv, running) in zip(history, more, strict=False)
    ]
    for (now, light), (_, heavy) in zip(run(history), run(heavier), strict=True):
        assert heavy.level >= light.level
        later = now + 25.0
        assert TIERS.settle(heavy, later).level >= TIERS.settle(light, later).level


@given(histories, gaps, gaps)
def test_looking_in_between_changes_nothing(
    history: list[tuple[float, EngineLoad]], first: float, second: float
) -> None:
    now, state = run(history)[-1]
    glimpsed = TIERS.settle(state, now + first)
    at = now + first + second
    assert TIERS.settle(glimpsed, at).level == TIERS.settle(state, at).level


def test_the_load_of_a_service_is_the_mean_of_its_engines() -> None:
    busy, idle = load(0.9, 40, 10.0, 64, waiting=2), load(0.1, 0, 9.0, 64)
    assert mean_of([busy, idle], 60.0) == replace(load(0.5, 20, 10.0, 64, 1), backlog_s=0.0)
    # The first engine has been silent for too long.
    later = replace(idle, time=71.0)
    assert mean_of([busy, later], 60.0) == replace(load(0.05, 0, 71.0, 64), backlog_s=0.0)


@pytest.mark.parametrize(
    ("given", "named"),
    [
        ({"kv": (0.9, 0.8)}, "kv"),
        ({"load": (0.5,)}, "load"),
        ({"batch": (0, 5)}, "batch"),
        ({"frame_rate": (1.0, 0.5)}, "frame_rate"),
        ({"frame_rate": (0.9, 0.5, 0.4)}, "frame_rate"),
        ({"resolution": (224, 336, 448)}, "resolution"),
        ({"resolution": ()}, "resolution"),
        ({"margin": 1.0}, "margin"),
    ],
)
def test_inconsistent_tiers_are_refused_by_name(given: dict[str, object], named: str) -> None:
    with pytest.raises(ValidationError, match=named):
        TierSettings.model_validate(given)


def test_reductions_for_fitting_must_get_stronger() -> None:
    with pytest.raises(ValidationError, match="at least as strong"):
        BudgetSettings.model_validate({"reductions": [{"pool": 3}, {"pool": 2}]})


def test_settings_can_be_read_from_json() -> None:
    read = QualitySettings.model_validate_json(QualitySettings().model_dump_json())
    assert read == QualitySettings()
    assert hash(read) == hash(QualitySettings())
