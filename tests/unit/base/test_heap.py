"""Freed memory goes back to the system while there is work, and not more often than that."""

from __future__ import annotations

import ctypes
import subprocess
import sys

import pytest

from vllm_mm_ext.base.heap import HeapTrim

pytestmark = pytest.mark.skipif(
    not hasattr(ctypes.CDLL(None), "malloc_trim"), reason="another C library than glibc"
)

# Every other block is freed, so that no heap ends in free memory; blocks are below the size that
# glibc maps one by one.
FREES_HALF = """
import sys
import psutil
from vllm_mm_ext.base.heap import HeapTrim

blocks = [bytearray(b"x" * 65_536) for _ in range(4_096)]
del blocks[::2]
before = psutil.Process().memory_info().rss
thread = HeapTrim(period_s=0.0).when_due()
thread.join()
print(before - psutil.Process().memory_info().rss)
"""


def test_what_was_freed_between_blocks_in_use_goes_back() -> None:
    freed = int(subprocess.check_output([sys.executable, "-c", FREES_HALF]))
    # 2,048 blocks of 16 pages, of which those at the ends are shared with the neighbours.
    assert freed > 2_048 * 14 * 4_096 * 0.9


def test_heaps_are_trimmed_once_a_period_at_most() -> None:
    made, *asked = 0.0, 0.0, 4.9, 5.0, 5.1, 9.9, 30.0, 34.9
    times = iter([made, *asked])
    heap = HeapTrim(period_s=5.0, clock=lambda: next(times))
    trims = [heap.when_due() is not None for _ in asked]
    assert trims == [False, False, True, False, False, True, False]


def test_another_c_library_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ctypes, "CDLL", lambda _: object())
    assert HeapTrim(period_s=0.0).when_due() is None
