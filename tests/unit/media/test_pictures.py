"""Packets are told apart by their first bytes, and arithmetic on clocks is exact."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest

from vllm_mm_ext.media.decode.clock import NO_TICKS, on_grid, read_clock
from vllm_mm_ext.media.decode.pictures import HIDDEN, PICTURE, reader_for
from vllm_mm_ext.media.sampling.timeline import rounding, shown_at
from vllm_mm_ext.media.types import PacketTable

# First bytes of VP9 pictures of profile 0: frame marker, profile, show_existing_frame, frame_type,
# show_frame, error_resilient_mode.
SHOWN, UNSHOWN, EXISTING = 0b1000_0110, 0b1000_0100, 0b1000_1000


def superframe(*pictures: bytes) -> bytes:
    """Pictures and the index of their sizes, of one byte each (annex B)."""
    marker = bytes([0b1100_0000 | len(pictures) - 1])
    return b"".join(pictures) + marker + bytes(len(p) for p in pictures) + marker


@pytest.mark.parametrize(
    ("data", "kind"),
    [
        (bytes([SHOWN, 1, 2]), PICTURE),
        (bytes([UNSHOWN, 1, 2]), HIDDEN),
        (bytes([EXISTING]), PICTURE),
        (superframe(bytes([UNSHOWN, 1, 2]), bytes([SHOWN, 3])), PICTURE),
        (superframe(bytes([UNSHOWN, 1, 2]), bytes([UNSHOWN, 3])), HIDDEN),
        (bytes([SHOWN, 0b1100_0001]), PICTURE),  # The mark of an index, without an index.
    ],
)
def test_a_packet_of_vp9_is_a_picture_if_one_of_its_pictures_is_shown(data, kind):
    reader = reader_for("vp9", None)
    assert reader is not None
    assert reader(memoryview(data)) == kind


@pytest.mark.parametrize("codec", ["vp8", "vp9", "mpeg4", "h264"])
def test_no_bytes_stop_a_reader(codec):
    rng = np.random.default_rng(0)
    for number in range(300):
        extradata = rng.integers(0, 4 if number % 2 else 256, 40, np.uint8).tobytes()
        reader = reader_for(codec, (b"\1" if number % 3 == 0 else b"\0\0\1\x67") + extradata)
        for size in (1, 2, 7, 60, 600):
            data = rng.integers(0, 4 if number % 2 else 256, size, np.uint8).tobytes()
            if reader is not None:
                reader(memoryview(data))


def test_progressive_h264_needs_no_reader():
    extradata = bytes.fromhex("0000000167640028acb200f0044fcb80000000010068ebc3cb22c0")
    assert reader_for("h264", extradata) is None
    assert reader_for("hevc", None) is None


def clock(pts: list[int], dts: list[int] | None = None, may_jump: bool = True):
    columns = np.array(pts, np.int64), np.array(pts if dts is None else dts, np.int64)
    return read_clock(*columns, 0.04, 25.0, [], from_key=True, may_jump=may_jump)


def test_repeated_timestamps_keep_decoding_order_and_share_the_time():
    read = clock([0, 1, 1, 2, 3])
    assert read.order.tolist() == [0, 1, 2, 3, 4]
    np.testing.assert_allclose(read.time / 0.04, [0, 1, 1.5, 2, 3])
    assert not read.exact


def test_pictures_without_timestamps_follow_their_decoding_times():
    read = clock([NO_TICKS] * 4, [0, 1, 3, 4])
    np.testing.assert_allclose(read.time / 0.04, [0, 1, 3, 4])
    assert not read.exact


def test_pictures_shown_before_the_first_keyframe_are_left_out_and_those_after_a_jump_are_not():
    read = clock([100, 98, 99, 101, 0, 1], [90, 91, 92, 93, 0, 1])
    assert read.order.tolist() == [0, 3, 4, 5]
    np.testing.assert_allclose(read.time / 0.04, [0, 1, 2, 3])


def test_a_picture_missing_from_the_grid_leaves_a_gap():
    place = np.array([0, 1, 2, 5, 6, 9])
    rounded = np.round(place / 30, 3)
    found = on_grid(rounded, 0.001, [Fraction(25), Fraction(30)])
    np.testing.assert_allclose(found, place / 30)
    uneven = rounded + np.array([0, 0.004, 0, 0.009, 0, 0])
    assert on_grid(uneven, 0.001, [Fraction(30)]) is uneven


@pytest.mark.parametrize(("time_base", "found"), [(0.001, 2), (1 / 90_000, 1)])
def test_the_frame_on_screen_is_found_within_half_a_unit(time_base, found):
    time = np.array([0, 0.1, 0.667, 0.9])
    columns = np.zeros(4, np.int64), time, np.ones(4, np.int32), np.ones(4, np.bool_)
    table = PacketTable(*columns, time_base=time_base)
    assert shown_at(time, np.array([2 / 3]), rounding(table)).tolist() == [found]
