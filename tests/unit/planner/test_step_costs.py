"""Costs of steps, fitted to measured ones."""

from __future__ import annotations

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vllm_mm_ext.planner.step_contents import StepContents
from vllm_mm_ext.planner.step_costs import StepCosts, fit, non_negative

PRICES = st.builds(
    StepCosts,
    step=st.floats(1e-3, 1e-2),
    decodes=st.floats(0, 1e-3),
    decode_context=st.floats(0, 1e-6),
    prompts=st.floats(0, 5e-3),
    prefill=st.floats(1e-5, 1e-3),
    pairs=st.floats(0, 1e-7),
    encodes=st.floats(0, 5e-3),
    items=st.floats(0, 5e-3),
    vision=st.floats(1e-6, 1e-4),
    vision_pairs=st.floats(0, 1e-8),
    audio=st.floats(1e-6, 1e-4),
)


def random_steps(rng: np.random.Generator, count: int) -> list[StepContents]:
    steps = []
    for _ in range(count):
        decodes = int(rng.integers(0, 16))
        prefill = int(rng.integers(1, 2000)) * int(rng.integers(0, 2))
        items = int(rng.integers(1, 5)) * int(rng.integers(0, 2))
        vision = items * int(rng.integers(100, 4000)) * int(rng.integers(0, 2))
        steps.append(
            StepContents(
                decodes,
                decodes * int(rng.integers(50, 4000)),
                int(prefill > 0),
                prefill,
                prefill * float(rng.integers(1, 4000)),
                int(items > 0),
                items,
                vision,
                float(vision * int(rng.integers(100, 1500))),
                items * int(rng.integers(0, 2)) * int(rng.integers(50, 750)),
            )
        )
    return steps


@given(PRICES, st.integers(0, 2**32 - 1))
@settings(max_examples=25)
def test_costs_that_made_the_steps_are_found_again(costs: StepCosts, seed: int) -> None:
    rng = np.random.default_rng(seed)
    steps = [(one, costs.seconds(one)) for one in random_steps(rng, 200)]
    found = fit(steps)
    assert found.error < 0.01
    fresh = random_steps(rng, 50)
    for one in fresh:
        assert found.costs.seconds(one) == pytest.approx(costs.seconds(one), rel=0.05)


def test_steps_that_something_else_held_up_do_not_count() -> None:
    rng = np.random.default_rng(1)
    costs = StepCosts(0.01, 1e-3, 1e-7, 2e-3, 1e-4, 1e-8, 1e-3, 1e-3, 1e-5, 1e-9, 1e-5)
    steps = [(one, costs.seconds(one)) for one in random_steps(rng, 200)]
    for place in range(0, 200, 20):
        steps[place] = (steps[place][0], 5 * steps[place][1])
    found = fit(steps).costs
    for one in random_steps(rng, 50):
        assert found.seconds(one) == pytest.approx(costs.seconds(one), rel=0.1)


@given(st.integers(0, 2**32 - 1))
@settings(max_examples=50)
def test_no_cost_is_negative_and_none_that_is_left_out_would_help(seed: int) -> None:
    rng = np.random.default_rng(seed)
    rows, wanted = rng.normal(size=(30, 6)), rng.normal(size=30)
    found = non_negative(rows, wanted)
    assert (found >= 0).all()
    slope = rows.T @ (wanted - rows @ found)
    assert (slope[found == 0] <= 1e-6).all()
    assert slope[found > 0] == pytest.approx(0, abs=1e-6)


def test_fewer_steps_than_costs_are_an_error() -> None:
    with pytest.raises(ValueError, match="3 steps cannot tell"):
        fit([(StepContents(), 1.0)] * 3)


def test_costs_and_contents_have_the_same_parts_in_the_same_order() -> None:
    assert StepCosts.__struct_fields__ == ("step", *StepContents.__struct_fields__)
    assert msgspec.structs.astuple(StepContents(decodes=1))[0] == 1
