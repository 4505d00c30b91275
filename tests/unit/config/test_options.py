"""Options of a request: bounds, error messages a client can act on, and the generated page."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllm_mm_ext.adapters.serving.requests import OptionError, read_options, refuse_options
from vllm_mm_ext.config.options import DEFAULT_OPTIONS, Reduction, RequestOptions, TrainedReductions
from vllm_mm_ext.config.options_page import to_markdown
from vllm_mm_ext.config.quality_settings import BudgetSettings
from vllm_mm_ext.config.schema import describe_type, iter_fields

ROOT = Path(__file__).parents[3]


def test_no_block_asks_for_nothing() -> None:
    assert read_options(None) == read_options({}) == DEFAULT_OPTIONS == RequestOptions()


def test_a_block_is_read_as_sent() -> None:
    raw = {
        "fps": 2,
        "max_frames": 16,
        "total_tokens": 4096,
        "resolution": 336,
        "quality": "fixed",
        "reduction": {"pool": 2, "static": "merge", "keep": 0.5},
        "floor": {"frames": 4, "fps": 0.5, "resolution": 224},
    }
    assert read_options(raw).model_dump(exclude_unset=True) == raw


def test_null_means_left_out() -> None:
    assert read_options(dict.fromkeys(RequestOptions.model_fields)) == DEFAULT_OPTIONS


@pytest.mark.parametrize(
    ("raw", "key", "words"),
    [
        ({"reduction": {"pool": 9}}, "mm_ext.reduction.pool", ["9", "<= 8"]),
        ({"reduction": {"pol": 2}}, "mm_ext.reduction.pol", ["pool, temporal, static, keep"]),
        ({"reduction": {"static": "merge"}}, "mm_ext.reduction", ["go together"]),
        ({"reduction": "strong"}, "mm_ext.reduction", ["strong"]),
        ({"speed": 1}, "mm_ext.speed", ["unknown key", "total_tokens"]),
        ({"speed": None}, "mm_ext.speed", ["unknown key"]),
        ({"fps": 0}, "mm_ext.fps", ["> 0"]),
        ({"fps": "2"}, "mm_ext.fps", ["number"]),
        ({"fps": float("nan")}, "mm_ext.fps", ["nan"]),
        ({"fps": True}, "mm_ext.fps", ["number"]),
        ({"max_frames": 2.5}, "mm_ext.max_frames", ["integer"]),
        ({"quality": "best"}, "mm_ext.quality", ["'auto'", "'fixed'"]),
        ({"min_frames": 9, "max_frames": 3}, "mm_ext", ["min_frames (9)", "max_frames (3)"]),
        ({"fps": 1, "floor": {"fps": 2}}, "mm_ext", ["floor.fps (2.0)", "fps (1.0)"]),
        ({"floor": {"resolution": 448}, "resolution": 224}, "mm_ext", ["floor.resolution"]),
        ([], "mm_ext", ["object"]),
        ("fast", "mm_ext", ["object"]),
    ],
)
def test_a_wrong_option_names_its_key_and_what_is_valid(
    raw: Any, key: str, words: list[str]
) -> None:
    with pytest.raises(OptionError) as error:
        read_options(raw)
    assert error.value.parameter == key
    assert all(word in error.value.message for word in [key, *words])


@given(st.text(min_size=200), st.sampled_from(["fps", "quality", "unknown"]))
def test_messages_stay_short_whatever_was_sent(text: str, key: str) -> None:
    with pytest.raises(OptionError) as error:
        read_options({key: text * 50})
    assert len(error.value.message) < 500


def test_a_route_without_options_takes_no_block() -> None:
    refuse_options(None, "/v1/completions")
    with pytest.raises(OptionError, match="/v1/completions takes no mm_ext"):
        refuse_options({}, "/v1/completions")


def test_the_reference_page_is_current_and_names_every_option() -> None:
    page = (ROOT / "docs" / "options.md").read_text()
    assert page == to_markdown(), "run: python -m vllm_mm_ext.config.options_page > docs/options.md"
    for path, _, leaves in iter_fields(RequestOptions, "mm_ext"):
        assert f"## `{path}`" in page
        assert all(f"| `{name}` |" in page for name, _ in leaves)


grids = st.tuples(st.integers(1, 40), st.integers(1, 30), st.integers(1, 30))
plain = st.builds(Reduction, pool=st.integers(1, 8), temporal=st.integers(1, 8))
kept = st.builds(
    Reduction,
    pool=st.integers(1, 8),
    temporal=st.integers(1, 8),
    static=st.sampled_from(["merge", "prune"]),
    keep=st.floats(0.01, 0.99),
)


@given(grids, st.one_of(plain, kept))
def test_a_reduction_never_adds_tokens_and_leaves_at_least_one(
    grid: tuple[int, int, int], reduction: Reduction
) -> None:
    count = reduction.count(*grid)
    assert 1 <= count <= grid[0] * grid[1] * grid[2]
    if reduction.is_identity:
        assert count == grid[0] * grid[1] * grid[2]


@given(plain, plain, st.lists(st.tuples(st.integers(1, 8), st.integers(1, 8)), max_size=5))
def test_a_model_is_only_reduced_as_it_was_trained_and_never_past_the_bound(
    start: Reduction, more: Reduction, pairs: list[tuple[int, int]]
) -> None:
    trained = TrainedReductions(((1, 1), (start.pool, start.temporal), *pairs))
    bound = Reduction(
        pool=max(start.pool, more.pool),
        temporal=max(start.temporal, more.temporal),
        static="merge",
        keep=0.5,
    )
    found = trained.towards(start, bound)
    assert trained.allow(found)
    assert start.pool <= found.pool <= bound.pool
    assert start.temporal <= found.temporal <= bound.temporal
    assert trained.towards(found, bound).count(64, 8, 8) <= found.count(64, 8, 8)


def test_static_tokens_of_a_trained_model_are_reduced_where_its_own_grid_is_left() -> None:
    trained = TrainedReductions(((1, 1), (2, 4)))
    merged = Reduction(static="merge", keep=0.5)
    assert trained.allow(merged)
    assert not trained.allow(Reduction(pool=2, temporal=4, static="merge", keep=0.5))
    assert trained.towards(merged, Reduction(pool=8, temporal=8)) == merged
    assert str(trained) == "pool 1, temporal 1; pool 2, temporal 4"


@given(kept)
def test_nothing_is_left_of_nothing(reduction: Reduction) -> None:
    assert reduction.count(0, 4, 4) == 0


def test_every_route_takes_a_route_key_which_changes_no_option() -> None:
    assert read_options({"key": "asset 7", "fps": 2}) == read_options({"fps": 2})
    refuse_options({"key": "asset 7"}, "/v1/completions")
    with pytest.raises(OptionError, match=r"mm_ext\.key"):
        refuse_options({"key": ""}, "/v1/completions")
    with pytest.raises(OptionError, match="takes no mm_ext"):
        refuse_options({"key": "asset 7", "fps": 2}, "/v1/completions")


@pytest.mark.parametrize("bad", ["", "a" * 257])
def test_how_long_a_text_may_be_is_told(bad: str) -> None:
    with pytest.raises(OptionError, match=r"valid: str \| null \(1 to 256 characters\)"):
        read_options({"key": bad})


def test_how_long_a_list_may_be_is_told() -> None:
    reductions = BudgetSettings.model_fields["reductions"]
    assert describe_type(reductions) == "list of Reduction (at most 16 values)"
