"""Gives freed memory back to the system.

The C library keeps freed memory that lies between blocks still in use, in a heap for each group of
threads. Media are blocks of megabytes that one thread allocates and another frees. Without trimming
a process comes to hold twice the memory that it uses, and more with time (docs/benchmarks.md,
`soak`).
"""

from __future__ import annotations

import ctypes
import gc
import threading
import time
from collections.abc import Callable

PERIOD_S = 5.0
"""Least seconds between two trims of a process."""


class HeapTrim:
    """Trims the heaps of the process, at most once a period.

    A trim takes some 25 ms of one core where 600 to 800 MB of a heap are free.

    Args:
        period_s: Least seconds between two trims.
        clock: Returns seconds of a clock that never goes back.
    """

    def __init__(
        self, period_s: float = PERIOD_S, clock: Callable[[], float] = time.monotonic
    ) -> None:
        # A function of glibc; other C libraries have none, and nothing is trimmed.
        self._malloc_trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
        self._period_s = period_s
        self._clock = clock
        self._due_s = clock() + period_s

    def when_due(self) -> threading.Thread | None:
        """Trim in a thread of its own if a period has passed since the last trim.

        Returns:
            The thread, or None if no trim is due or no thread can be started.
        """
        now = self._clock()
        if self._malloc_trim is None or now < self._due_s:
            return None
        self._due_s = now + self._period_s
        thread = threading.Thread(
            target=self._malloc_trim, args=(0,), name="mm-ext-heap", daemon=True
        )
        try:
            thread.start()
        except RuntimeError:  # The system gives no thread; the next period tries again.
            return None
        return thread

    def now(self) -> None:
        """Trim, and return when it is done."""
        if self._malloc_trim is not None:
            self._malloc_trim(0)


_OF_THE_PROCESS = HeapTrim()


def trim_when_due() -> None:
    """Trim the heaps of this process in the background, at most once a period for all callers."""
    _OF_THE_PROCESS.when_due()


def trim_now() -> None:
    """Free what only reference cycles keep, and give all freed memory of the process back."""
    gc.collect()
    _OF_THE_PROCESS.now()
