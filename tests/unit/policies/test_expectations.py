"""No request waits for ever for an encoder elsewhere."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from vllm_mm_ext.policies.encoder_cache.expectations import Expectations

WAIT_S = 10.0
events = st.one_of(
    st.tuples(st.just("ask"), st.integers(0, 4)),
    st.tuples(st.just("over"), st.sampled_from(["mine", "other"])),
)


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


@given(st.lists(st.tuples(st.floats(0, 15), events), max_size=40))
def test_a_request_expects_until_its_job_is_over_or_nothing_comes(
    steps: list[tuple[float, tuple[str, str | int]]],
) -> None:
    clock = Clock()
    waiting = Expectations(WAIT_S, clock)
    assert waiting.expects("request", "mine", 0)
    last, furthest, over = 0.0, 0, False
    for passed, (event, name) in steps:
        clock.now += passed
        if event == "over":
            waiting.over(str(name))
            over |= name == "mine"
        else:
            index = int(name)
            if index > furthest and not over:
                # What it lacked before is there.
                furthest, last = index, clock.now
            expected = not over and clock.now - last < WAIT_S
            assert waiting.expects("request", "mine", index) == expected
            over |= not expected
    clock.now += WAIT_S + 1
    assert not waiting.expects("request", "mine", furthest)


def test_a_job_may_be_over_before_its_request_comes() -> None:
    waiting = Expectations(WAIT_S, Clock())
    waiting.over("job")
    assert not waiting.expects("request", "job", 0)
    assert waiting.timed_out == 0


def test_what_has_ended_is_forgotten() -> None:
    clock = Clock()
    waiting = Expectations(WAIT_S, clock)
    for number in range(10_000):
        waiting.expects(str(number), f"job {number}", 0)
        waiting.over(f"job {number}")
        waiting.forget(str(number))
    assert len(waiting) == 0
    assert len(waiting._over) <= 4096
