"""What is put into shared memory through its file is what a reader of the memory sees."""

from __future__ import annotations

import os

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from vllm_mm_ext.media.decode import shared_array


@given(st.lists(st.tuples(st.integers(0, 4), st.booleans()), max_size=8))
def test_parts_that_are_put_are_seen_by_both_processes(parts: list[tuple[int, bool]]) -> None:
    array, fd = shared_array.create((5, 40, 30, 3), np.uint8)
    try:
        wanted = np.zeros(array.shape, np.uint8)
        other = shared_array.adopt(fd, array.shape, np.uint8)
        for value, (row, turned) in enumerate(parts, 1):
            shape = (30, 40, 3) if turned else (40, 30, 3)
            values = np.arange(np.prod(shape)).reshape(shape).astype(np.uint8) + value
            for target in (array[row], wanted[row]):
                view = np.rot90(target) if turned else target
                # Of a picture that is cut out of a wider one, rows do not follow each other.
                shared_array.put(view, np.pad(values, ((0, 0), (0, 2), (0, 0)))[:, :-2])
        np.testing.assert_array_equal(array, wanted)
        np.testing.assert_array_equal(other, wanted)
    finally:
        os.close(fd)


def test_an_array_outlives_its_descriptor() -> None:
    array, fd = shared_array.create((4, 5), np.float32)
    shared_array.put(array, np.ones((4, 5), np.float32))
    os.close(fd)
    assert array.sum() == 20
    array[...] = 2
    assert (array + 0).sum() == 40
