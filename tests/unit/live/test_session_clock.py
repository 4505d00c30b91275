"""One clock for sound and frames, however a client sends them."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllm_mm_ext.live.session_clock import SessionClock

RATE = 16_000


def test_without_sound_it_is_the_time_that_passes() -> None:
    clock = SessionClock(RATE, 100.0)
    assert clock.time(103.5) == 3.5
    assert clock.place(None, 104.0) == 4.0
    assert clock.when(6.0) == 106.0


def test_with_sound_it_is_the_count_of_samples_at_any_speed() -> None:
    for speed in (0.8, 1.0, 10.0):
        clock = SessionClock(RATE, 0.0)
        for tenth in range(1, 101):
            clock.hear(tenth * RATE // 10, tenth * 0.1 / speed)
        begin = clock.of_sample(0)
        assert clock.of_sample(RATE * 10) - begin == pytest.approx(10)
        assert clock.place(None, 10 / speed) - begin == pytest.approx(10)


def test_frames_between_appends_are_placed_between_them() -> None:
    clock = SessionClock(RATE, 0.0)
    clock.hear(RATE, 1.0)
    assert clock.place(None, 1.25) == pytest.approx(1.25)


def test_a_clients_times_keep_their_distances() -> None:
    clock = SessionClock(RATE, 0.0)
    assert clock.place(1000.0, 1.0) == 1.0
    # The network was slow, then fast.
    assert clock.place(1001.0, 2.7) == 2.0
    assert clock.place(1002.0, 2.8) == 3.0


def test_a_stall_of_the_network_moves_neither_sound_nor_frames() -> None:
    clock = SessionClock(RATE, 0.0)
    for second in range(1, 4):
        clock.hear(second * RATE, float(second))
        clock.place(50.0 + second, float(second))
    clock.hear(4 * RATE, 9.0)
    assert clock.of_sample(4 * RATE) == pytest.approx(4.0)
    assert clock.place(54.0, 9.0) == pytest.approx(4.0)


def test_sound_that_comes_after_frames_alone_begins_after_them() -> None:
    clock = SessionClock(RATE, 0.0)
    clock.hear(RATE, 1.0)
    for second in range(2, 11):
        clock.place(None, float(second))
    clock.hear(RATE + RATE // 10, 10.1)
    assert clock.of_sample(RATE) == pytest.approx(10.0)
    # A frame is placed where the sound is from then on.
    clock.hear(2 * RATE, 11.0)
    assert clock.place(None, 11.0) == pytest.approx(11.0)


def test_a_muted_microphone_without_a_camera_leaves_no_gap() -> None:
    clock = SessionClock(RATE, 0.0)
    clock.hear(RATE, 1.0)
    clock.hear(2 * RATE, 60.0)
    assert clock.of_sample(2 * RATE) == pytest.approx(2.0)


def test_a_camera_ahead_of_a_slow_microphone_is_placed_anew() -> None:
    clock = SessionClock(RATE, 0.0)
    received = 0.0
    for second in range(1, 3601):
        received += 0.99
        clock.hear(round(received * RATE), float(second))
        place = clock.place(float(second), float(second))
        assert place - clock.sound_end <= 2.001


def test_a_clients_clock_that_was_set_back_is_placed_anew() -> None:
    clock = SessionClock(RATE, 0.0)
    clock.hear(RATE, 1.0)
    clock.place(40.0, 1.0)
    clock.hear(2 * RATE, 2.0)
    assert clock.place(42.5, 2.0) == pytest.approx(3.5)
    # By less than what would be placed anew for lagging behind the sound.
    for second in (3.0, 4.0, 5.0):
        clock.hear(round(second * RATE), second)
        assert clock.place(second + 9.2, second) == pytest.approx(max(second, 3.5))


def test_a_clients_clock_is_placed_anew_after_it_was_forgotten() -> None:
    clock = SessionClock(RATE, 0.0)
    for second in range(1, 21):
        clock.place(float(second), float(second))
    clock.forget_client()
    assert clock.place(0.5, 21.0) == 21.0
    assert clock.place(1.5, 22.0) == 22.0


@given(
    steps=st.lists(
        st.tuples(
            st.floats(0, 20),
            st.one_of(st.none(), st.floats(-1e4, 1e4)),
            st.integers(0, 4 * RATE),
        ),
        max_size=60,
    )
)
def test_it_never_goes_back(steps: list[tuple[float, float | None, int]]) -> None:
    clock = SessionClock(RATE, 0.0)
    now, received, last, sound = 0.0, 0, 0.0, 0.0
    for wait, time_s, samples in steps:
        now += wait
        received += samples
        clock.hear(received, now)
        assert clock.sound_end >= sound
        sound = clock.sound_end
        place = clock.place(time_s, now)
        assert place >= last
        last = place
