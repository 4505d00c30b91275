"""Sharing a capacity: in the order of asking, never past the bound but for one that runs alone."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from vllm_mm_ext.media.decode.fifo_capacity import FifoCapacity, Share


def granted(shares: list[Share]) -> list[bool]:
    return [share.granted for share in shares]


def test_a_share_that_does_not_fit_makes_later_ones_wait() -> None:
    capacity = FifoCapacity(10)
    shares = [capacity.ask(amount) for amount in (6, 8, 1)]
    assert granted(shares) == [True, False, False]
    capacity.give_back(shares[0])
    assert granted(shares[1:]) == [True, True]
    assert capacity.used == 9


def test_a_share_larger_than_the_capacity_is_granted_alone() -> None:
    capacity = FifoCapacity(10)
    small, large, later = (capacity.ask(amount) for amount in (1, 50, 1))
    assert granted([large, later]) == [False, False]
    capacity.give_back(small)
    assert granted([large, later]) == [True, False]
    capacity.give_back(large)
    assert later.granted


def test_one_that_waits_no_longer_lets_the_next_through() -> None:
    capacity = FifoCapacity(10)
    _, large, later = (capacity.ask(amount) for amount in (6, 8, 4))
    capacity.give_back(large)
    assert later.granted
    assert capacity.used == 10


@given(st.integers(1, 20), st.lists(st.tuples(st.booleans(), st.integers(0, 30)), max_size=60))
def test_whoever_came_first_goes_first_and_nobody_waits_without_need(
    bound: int, steps: list[tuple[bool, int]]
) -> None:
    capacity = FifoCapacity(bound)
    held: list[Share] = []  # In the order of asking.
    for gives_back, number in steps:
        if gives_back and held:
            capacity.give_back(held.pop(number % len(held)))
        else:
            held.append(capacity.ask(number))
        inside = [share.amount for share in held if share.granted]
        assert granted(held) == [True] * len(inside) + [False] * (len(held) - len(inside))
        assert capacity.used == sum(inside)
        assert capacity.used <= max(bound, *inside, 0)
        if len(held) > len(inside):
            assert capacity.used > 0
            assert capacity.used + held[len(inside)].amount > bound
