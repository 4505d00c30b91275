"""Which of the jobs that wait for a decode worker is next: pure functions over plain values.

Jobs start in the order in which they came, but one about a span of a file that a worker has open
goes to that worker, as the worker reads on where the last span ended. While the worker is busy,
jobs behind pass; after ``PATIENCE_S`` any worker will do.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Collection, Sequence
from dataclasses import dataclass

from vllm_mm_ext.media.decode.open_files import KEEP_S, MOST_FILES

PATIENCE_S = 15.0
"""Seconds that a job waits for the busy worker that has its file open. Another worker would have to
be told the packet table, and to decode from a keyframe on."""

# A worker lets go of its files after ``KEEP_S``, by its own clock.
_TRUSTED_S = KEEP_S - 5.0


@dataclass
class Place:
    """A job in the queue.

    Attributes:
        file: ``open_files.file_key`` of the job; empty if any worker will do.
        start: Second at which its span begins.
        until: ``time.monotonic()`` value up to which the job waits for a busy worker; None before
            it has had to.
    """

    file: str = ""
    start: float = 0.0
    until: float | None = None


class HeldFiles:
    """The files that a worker has open, as far as its pool knows.

    A worker may have closed a file all the same: then it has to probe the file again.
    """

    def __init__(self) -> None:
        self._used: OrderedDict[str, tuple[float, float]] = OrderedDict()

    def any(self, now: float) -> bool:
        """Whether the worker has some file open at ``now``, a ``time.monotonic()`` value."""
        return any(self.holds(file, now) for file in self._used)

    def holds(self, file: str, now: float) -> bool:
        """Whether the worker has a file open at ``now``, a ``time.monotonic()`` value."""
        return file in self._used and now - self._used[file][0] < _TRUSTED_S

    def position(self, file: str) -> float:
        """Second at which the last span that was read of a file began."""
        return self._used[file][1]

    def use(self, place: Place, now: float) -> None:
        """Note that the worker begins or ends a job; ``now`` is a ``time.monotonic()`` value."""
        if place.file:
            self._used[place.file] = now, place.start
            self._used.move_to_end(place.file)
        while len(self._used) > MOST_FILES:
            self._used.popitem(last=False)

    def drop(self, file: str) -> None:
        """Note that the worker has closed a file."""
        self._used.pop(file, None)


def next_job(
    queue: Sequence[Place], workers: Collection[HeldFiles], idle: Collection[HeldFiles], now: float
) -> tuple[int, float | None]:
    """The job that starts next.

    Args:
        queue: The jobs that wait, in the order in which they came; ``until`` of those that have to
            wait for a busy worker is set.
        workers: What all workers have open.
        idle: What the idle ones among them have open.
        now: ``time.monotonic()``.

    Returns:
        Its position in ``queue``, or -1; and the seconds after which to ask again if nothing
        happens before, None where nothing can change by itself.
    """
    first: float | None = None
    for number, place in enumerate(queue):
        if not place.file or not any(held.holds(place.file, now) for held in workers):
            return number, 0.0
        if place.until is None:
            place.until = now + PATIENCE_S
        if place.until <= now:
            return number, 0.0
        for held in idle:
            if held.holds(place.file, now):
                return _in_order(queue, place.file, held.position(place.file)), 0.0
        first = place.until if first is None else min(first, place.until)
    return -1, None if first is None else first - now


def fitness(held: HeldFiles, has_gpu: bool, with_gpu: bool, now: float) -> tuple[bool, bool, bool]:
    """How well an idle worker fits a job whose file no worker has open; the greatest is the best.

    A worker with a GPU fits best the jobs that may use one, and others worst. Apart from that, one
    that has files open is spared: it may be wanted for them.

    Args:
        held: What the worker has open.
        has_gpu: The worker may use a GPU.
        with_gpu: The job may.
        now: ``time.monotonic()``.
    """
    return has_gpu and with_gpu, not held.any(now), not has_gpu


def _in_order(queue: Sequence[Place], file: str, position: float) -> int:
    """Of the jobs about one file, the one whose span comes next; then the rest from its start."""
    same = [number for number, place in enumerate(queue) if place.file == file]
    return min(same, key=lambda number: (queue[number].start < position, queue[number].start))
