"""Shares of a total, rounded."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from vllm_mm_ext.base.apportion import apportion

_LIMITS = st.dictionaries(st.sampled_from("abcde"), st.integers(0, 200))


@given(_LIMITS, st.data())
def test_numbers_add_up_and_exceed_no_limit_whatever_the_quotas(
    limits: dict[str, int], data: st.DataObject
) -> None:
    quotas = {name: data.draw(st.floats(0, 300)) for name in limits}
    total = data.draw(st.integers(0, 1000))
    found = apportion(total, quotas, limits)
    assert list(found) == list(limits)
    assert all(0 <= found[name] <= limit for name, limit in limits.items())
    assert sum(found.values()) == min(total, sum(limits.values()))


@given(_LIMITS, st.data())
def test_numbers_are_less_than_one_away_from_quotas_that_add_up(
    limits: dict[str, int], data: st.DataObject
) -> None:
    whole = sum(limits.values())
    total = data.draw(st.integers(0, whole))
    quotas = {name: count * total / max(1, whole) for name, count in limits.items()}
    found = apportion(total, quotas, limits)
    assert all(abs(found[name] - quota) < 1 for name, quota in quotas.items())
