"""What a request may not ask of a server or of its model is refused by name."""

from __future__ import annotations

import pytest

from vllm_mm_ext.config.options import (
    DEFAULT_OPTIONS,
    NO_REDUCTION,
    Reduction,
    RequestOptions,
    TrainedReductions,
)
from vllm_mm_ext.config.quality_settings import BoundSettings
from vllm_mm_ext.errors import OptionBoundError
from vllm_mm_ext.policies.quality.bounds import check_bounds, check_family
from vllm_mm_ext.policies.quality.videos import Family

BOUNDS = BoundSettings(max_total_tokens=4000, min_resolution=112)


@pytest.mark.parametrize(
    ("given", "named"),
    [
        ({"fps": 30.0}, "mm_ext.fps = 30.0: this server allows at most 8.0"),
        ({"max_frames": 800}, "mm_ext.max_frames = 800: .* at most 768"),
        ({"min_frames": 800}, "mm_ext.min_frames"),
        ({"floor": {"frames": 800}}, "mm_ext.floor.frames"),
        ({"floor": {"fps": 9.0}}, "mm_ext.floor.fps"),
        ({"long_video": {"fps": 9.0}}, "mm_ext.long_video.fps = 9.0: .* at most 8.0"),
        ({"resolution": 4096}, "mm_ext.resolution = 4096: .* at most 2048"),
        ({"resolution": 100}, "mm_ext.resolution = 100: .* at least 112"),
        ({"total_tokens": 5000}, "mm_ext.total_tokens = 5000: .* at most 4000"),
    ],
)
def test_options_past_the_servers_bounds_are_refused(given: dict[str, object], named: str) -> None:
    with pytest.raises(OptionBoundError, match=named):
        check_bounds(RequestOptions.model_validate(given), BOUNDS)


def test_options_within_the_bounds_pass() -> None:
    check_bounds(DEFAULT_OPTIONS, BOUNDS)
    check_bounds(RequestOptions(fps=8.0, max_frames=768, resolution=112), BOUNDS)
    check_bounds(RequestOptions(total_tokens=1 << 24), BoundSettings())


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (RequestOptions(reduction=Reduction(pool=2)), "mm_ext.reduction"),
        (RequestOptions(total_tokens=100), "mm_ext.total_tokens"),
    ],
)
def test_what_the_model_cannot_do_is_refused(options: RequestOptions, named: str) -> None:
    with pytest.raises(OptionBoundError, match=named):
        check_family(options, Family(resizable=True, reducible=False, countable=False))
    check_family(options, Family(resizable=True, reducible=True, countable=True))


def test_a_reduction_that_the_model_was_not_trained_for_is_refused_with_those_it_was() -> None:
    trained = TrainedReductions(((1, 1), (2, 4)))
    family = Family(resizable=False, reducible=True, countable=True, trained=trained)
    for right in (None, NO_REDUCTION, Reduction(pool=2, temporal=4)):
        check_family(RequestOptions(reduction=right), family)
    with pytest.raises(OptionBoundError, match="pool 1, temporal 1; pool 2, temporal 4") as caught:
        check_family(RequestOptions(reduction=Reduction(pool=2)), family)
    assert caught.value.parameter == "mm_ext.reduction"
