"""Freed memory goes back to the system.

The C library keeps what is freed between blocks still in use, in a heap for each group of threads.
Media are megabytes that one thread allocates and another one frees: without help a process comes to
hold twice what it uses, and more with time (docs/benchmarks.md, `soak`).
"""

from __future__ import annotations

import ctypes
import threading
import time
from collections.abc import Callable

_PERIOD_S = 5.0


class HeapTrim:
    """Trims the heaps of the process at most once a period, while there is work.

    A trim takes some 25 ms of one core where 600 to 800 MB of a heap are free.

    Args:
        period_s: Seconds between two trims at least.
        clock: Seconds, ascending.
    """

    def __init__(
        self, period_s: float = _PERIOD_S, clock: Callable[[], float] = time.monotonic
    ) -> None:
        # glibc's; what another C library or allocator keeps is its own affair.
        self._malloc_trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
        self._period_s = period_s
        self._clock = clock
        self._due_s = clock() + period_s

    def when_due(self) -> threading.Thread | None:
        """Trim beside the caller if a period has passed; returns the thread that does it."""
        now = self._clock()
        if self._malloc_trim is None or now < self._due_s:
            return None
        self._due_s = now + self._period_s
        thread = threading.Thread(
            target=self._malloc_trim, args=(0,), name="mm-ext-heap", daemon=True
        )
        try:
            thread.start()
        except RuntimeError:  # No thread to be had; the next period will do.
            return None
        return thread


_OF_THE_PROCESS = HeapTrim()


def trim_when_due() -> None:
    """Trim the heaps of this process beside the caller, once a period whoever asks how often."""
    _OF_THE_PROCESS.when_due()
