"""Which encoder outputs a request waits for, because an encoder elsewhere was asked for them."""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass

# Jobs that are remembered as over; their requests may not have come yet.
_MOST_OVER = 4096


@dataclass
class _Waiting:
    job: str
    since: float
    index: int


class Expectations:
    """Requests that expect outputs from elsewhere, each by a *job*: what an encoder was asked for.

    A request expects every output that it lacks until its job is over, or until nothing of it has
    arrived for a while: the output that it lacks first has stayed the same. So no request waits for
    ever, whoever dies.

    Args:
        wait_s: Seconds without an arrival after which a request expects nothing more.
        clock: Seconds.

    Attributes:
        timed_out: Requests that stopped waiting since the start.
    """

    def __init__(self, wait_s: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._wait_s = wait_s
        self._clock = clock
        self._waiting: dict[str, _Waiting] = {}
        self._over: OrderedDict[str, None] = OrderedDict()
        self.timed_out = 0

    def expects(self, request: str, job: str, index: int) -> bool:
        """Whether a request expects the outputs that it lacks.

        Args:
            request: Its id. Its time begins when this is first asked.
            job: The job that it belongs to.
            index: The place in the request of the first output that it lacks.
        """
        if job in self._over:
            return False
        now = self._clock()
        waiting = self._waiting.setdefault(request, _Waiting(job, now, index))
        if index > waiting.index:
            # What came before is there, whether or not the engine has got round to it.
            waiting.index, waiting.since = index, now
        if now - waiting.since < self._wait_s:
            return True
        self.timed_out += 1
        self.over(job)
        return False

    def over(self, job: str) -> None:
        """Note that nothing more comes of a job, whether it succeeded or failed."""
        self._over[job] = None
        if len(self._over) > _MOST_OVER:
            self._over.popitem(last=False)

    def forget(self, request: str) -> None:
        """Note that a request has ended."""
        self._waiting.pop(request, None)

    def __len__(self) -> int:
        return len(self._waiting)
