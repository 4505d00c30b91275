"""The API server's machine on a simulated clock: lanes of work that share its cores."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

Done = Callable[[], None]


@dataclass(slots=True, eq=False)
class _Job:
    left_s: float
    threads: float
    done: Done


@dataclass(slots=True)
class Lane:
    """Work of one kind: some at a time, the rest in the order of coming.

    Attributes:
        width: Jobs at a time.
        busy_s: Seconds of all its places that jobs have taken.
    """

    width: int
    busy_s: float = 0.0
    running: list[_Job] = field(default_factory=list)
    waiting: deque[_Job] = field(default_factory=deque)


class Host:
    """Jobs on lanes. While they want more cores than there are, all are slower alike.

    Args:
        cores: Cores of the machine.

    Attributes:
        now: The clock, in seconds.
    """

    def __init__(self, cores: int) -> None:
        self._cores = cores
        self._lanes: list[Lane] = []
        self.now = 0.0

    def lane(self, width: int) -> Lane:
        """A lane for jobs, ``width`` of them at a time."""
        self._lanes.append(Lane(width))
        return self._lanes[-1]

    def add(self, lane: Lane, seconds: float, done: Done, threads: float = 1.0) -> None:
        """Have a job done.

        Args:
            lane: Its lane.
            seconds: What it takes by itself.
            done: Is called at its end.
            threads: Cores that it keeps busy.
        """
        lane.waiting.append(_Job(seconds, threads, done))
        _start(lane)

    def run(self) -> bool:
        """Go on to the end of the job that ends next; returns whether there was one."""
        jobs = [job for lane in self._lanes for job in lane.running]
        if not jobs:
            return False
        speed = min(1.0, self._cores / sum(job.threads for job in jobs))
        seconds = min(job.left_s for job in jobs) / speed
        self.now += seconds
        ended: list[_Job] = []
        for lane in self._lanes:
            lane.busy_s += seconds * len(lane.running)
            for job in lane.running:
                job.left_s -= seconds * speed
            # A division rounds: what is left of a job that ends may not be exactly 0.
            over = [job for job in lane.running if job.left_s <= 1e-12]
            if over:
                lane.running = [job for job in lane.running if job.left_s > 1e-12]
                ended += over
                _start(lane)
        for job in ended:
            job.done()
        return True


def _start(lane: Lane) -> None:
    while lane.waiting and len(lane.running) < lane.width:
        lane.running.append(lane.waiting.popleft())


def share_busy(lane: Lane, seconds: float) -> float:
    """Share of a time that the places of a lane were taken, 0 to 1."""
    return min(1.0, lane.busy_s / (lane.width * seconds)) if seconds > 0 else math.nan
