"""Where speech starts and stops, by the probabilities of windows."""

from hypothesis import given
from hypothesis import strategies as st

from vllm_mm_ext.live.turn_detector import (
    DetectorOptions,
    SpeechStarted,
    SpeechStopped,
    TurnDetector,
)

RATE = 16_000
WINDOW = 512


def turns(
    probabilities: list[float], options: DetectorOptions | None = None
) -> list[SpeechStarted | SpeechStopped]:
    detector = TurnDetector(RATE, options or DetectorOptions())
    found = []
    for number, probability in enumerate(probabilities):
        turn = detector.step(number * WINDOW, (number + 1) * WINDOW, probability)
        found += [turn] if turn is not None else []
    return found


def test_speech_begins_before_its_first_window_and_ends_after_the_silence() -> None:
    found = turns([0.0] * 20 + [0.9] * 10 + [0.0] * 20)
    assert found == [
        SpeechStarted(20 * WINDOW - 300 * RATE // 1000),
        SpeechStopped(30 * WINDOW + 500 * RATE // 1000),
    ]


def test_speech_at_the_very_start_begins_at_zero() -> None:
    assert turns([0.9, 0.9]) == [SpeechStarted(0)]


def test_a_single_window_is_not_speech() -> None:
    assert turns([0.0, 0.9, 0.0, 0.9, 0.0]) == []


def test_padding_does_not_reach_into_the_turn_before() -> None:
    options = DetectorOptions(prefix_padding_ms=2000, silence_duration_ms=100)
    first, stop, second = turns([0.9] * 4 + [0.0] * 6 + [0.9] * 4, options)
    assert first == SpeechStarted(0)
    assert isinstance(stop, SpeechStopped)
    assert second == SpeechStarted(stop.position)


def test_a_pause_shorter_than_the_silence_is_part_of_the_speech() -> None:
    assert turns([0.9] * 4 + [0.0] * 10 + [0.9] * 4 + [0.0] * 10) == [SpeechStarted(0)]


def test_doubtful_windows_neither_begin_nor_end_a_silence() -> None:
    doubtful = 0.4
    assert turns([doubtful] * 30) == []
    assert turns([0.9] * 2 + [doubtful] * 100) == [SpeechStarted(0)]
    found = turns([0.9] * 2 + [0.0] + [doubtful] * 20)
    assert found == [SpeechStarted(0), SpeechStopped(2 * WINDOW + 500 * RATE // 1000)]


def test_a_low_threshold_still_finds_silence() -> None:
    found = turns([0.2] * 4 + [0.0] * 20, DetectorOptions(threshold=0.1))
    assert [type(turn) for turn in found] == [SpeechStarted, SpeechStopped]


def test_without_a_duration_no_silence_ends_speech_but_it_is_measured() -> None:
    detector = TurnDetector(RATE, DetectorOptions(silence_duration_ms=None))
    for number in range(4):
        detector.step(number * WINDOW, (number + 1) * WINDOW, 0.9)
    assert detector.silence(4 * WINDOW) == 0
    for number in range(4, 400):
        assert detector.step(number * WINDOW, (number + 1) * WINDOW, 0.0) is None
    assert detector.silence(400 * WINDOW) == 396 * WINDOW
    detector.end(400 * WINDOW)
    assert not detector.speaking
    assert detector.silence(401 * WINDOW) == 0


@given(
    probabilities=st.lists(st.floats(0, 1), max_size=200),
    threshold=st.floats(0, 1),
    padding=st.integers(0, 2000),
    silence=st.integers(0, 2000),
)
def test_starts_and_stops_take_turns_in_the_order_of_their_positions(
    probabilities: list[float], threshold: float, padding: int, silence: int
) -> None:
    found = turns(probabilities, DetectorOptions(threshold, padding, silence))
    for number, turn in enumerate(found):
        assert isinstance(turn, SpeechStopped if number % 2 else SpeechStarted)
        assert 0 <= turn.position <= len(probabilities) * WINDOW
    positions = [turn.position for turn in found]
    assert positions == sorted(positions)
