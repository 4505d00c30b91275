"""Which camera frames the model is shown: the most different of each slot, and no repeats."""

import numpy as np

from vllm_mm_ext.live.frame_choice import FrameSlots, PlacedSight
from vllm_mm_ext.live.thumbnails import THUMBNAIL_SIDE, change
from vllm_mm_ext.live.watching import Sight


def frame(time_s: float, level: int, *, noise: int = 0, size: int = 8) -> PlacedSight:
    """A grey frame at a time; ``noise`` seeds a camera's noise."""
    thumbnail = np.full((THUMBNAIL_SIDE, THUMBNAIL_SIDE), level, np.uint8)
    if noise:
        thumbnail += np.random.default_rng(noise).integers(0, 4, thumbnail.shape, np.uint8)
    pixels = np.full((size, size, 3), level, np.uint8)
    return PlacedSight(Sight(pixels, thumbnail, None), time_s)


def times(shown: list[PlacedSight]) -> list[float]:
    return [placed.time_s for placed in shown]


def test_the_frames_that_differ_most_from_those_before_are_shown() -> None:
    slots = FrameSlots(1.0)
    for time_s, level in [(0.1, 10), (1.1, 40), (1.5, 200), (1.9, 60), (2.2, 120)]:
        slots.add(frame(time_s, level))
    assert times(slots.shown_before(3.0, 3)) == [0.1, 1.5, 2.2]
    assert times(slots.shown_before(3.0, 1)) == [0.1]
    assert times(slots.take_before(3.0, 9)) == [0.1, 1.5, 2.2]
    assert len(slots) == 0


def test_of_what_stands_still_a_frame_is_shown_every_two_seconds() -> None:
    slots = FrameSlots(0.5)
    for half in range(14):
        slots.add(frame(half / 2, 100, noise=half + 1))
    assert times(slots.take_before(5.5, 11)) == [0.0, 2.0, 4.0]
    assert times(slots.take_before(6.0, 1)) == [5.5]
    slots.add(frame(7.2, 200))
    assert times(slots.take_before(9.0, 6)) == [7.2]


def test_a_small_thing_that_moves_is_a_change() -> None:
    before, after = frame(0, 100), frame(1, 100)
    after.sight.thumbnail[3, 4] = 140
    assert change(before.thumbnail, after.thumbnail) == 40


def test_frames_of_another_size_take_the_place_of_those_that_wait() -> None:
    slots = FrameSlots(1.0)
    slots.add(frame(0.1, 10))
    slots.add(frame(1.1, 90))
    slots.add(frame(1.2, 10, size=16))
    assert [placed.shape for placed in slots.take_before(2.0, 2)] == [(16, 16, 3)]


def test_frames_from_a_time_on_can_be_taken_and_put_back() -> None:
    slots = FrameSlots(0.5)
    for half in range(6):
        slots.add(frame(half / 2, 40 * half))
    later = slots.take_from(1.5)
    assert times(later) == [1.5, 2.0, 2.5]
    for placed in later:
        slots.add(placed)
    assert times(slots.take_before(9, 6)) == [half / 2 for half in range(6)]


def test_slots_are_counted_from_a_new_start_on() -> None:
    slots = FrameSlots(1.0)
    slots.add(frame(0.2, 10))
    slots.add(frame(1.4, 90))
    slots.begin(1.0)
    slots.add(frame(1.9, 30))
    assert slots.nbytes == 2 * 8 * 8 * 3
    assert times(slots.take_before(2.0, 2)) == [1.0]
    assert times(slots.take_before(3.0, 2)) == [1.9]
    assert slots.nbytes == 0


def test_a_camera_that_sends_a_frame_a_slot_may_be_early_or_late() -> None:
    slots = FrameSlots(1.0)
    for second, late in enumerate([0, 0.02, -0.02, 0.01, -0.04, -0.01, 0.02, 0.03]):
        slots.add(frame(0.5 + second + late, 20 * second))
    assert len(slots.take_before(8.0, 8)) == 8
    slots.begin(100.0)
    for second, late in enumerate([0, -0.02, -0.02, 0.01, -0.04, -0.01, 0.02, -0.03]):
        slots.add(frame(100 + second + late, 20 * second))
    assert len(slots.take_before(108.0, 8)) == 8
