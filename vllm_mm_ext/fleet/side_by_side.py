"""The same requests through the same fleet with several routers, each in a process of its own."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from vllm_mm_ext.fleet.simulation import Failure, Fleet, simulate
from vllm_mm_ext.fleet.tally import Tally
from vllm_mm_ext.fleet.traffic import Ask
from vllm_mm_ext.fleet.traffic_file import read_trace

_POLL_S = 0.2


class Source(Protocol):
    """Where requests come from."""

    def asks(self) -> Iterator[Ask]:
        """The requests, in order of time; the same each time."""


@dataclass(frozen=True)
class TraceFile:
    """Requests in a file.

    Attributes:
        file: The file.
        kinds: How many kinds of media there are.
    """

    file: Path
    kinds: int

    def asks(self) -> Iterator[Ask]:
        """As of ``read_trace``."""
        return read_trace(self.file, self.kinds)


@dataclass(frozen=True)
class Study:
    """What is simulated.

    Attributes:
        fleet: The fleet.
        source: The requests.
        failures: Replicas that die.
        unmeasured: The first requests, which count for nothing.
        seed: Of random choices.
    """

    fleet: Fleet
    source: Source
    failures: tuple[Failure, ...] = ()
    unmeasured: int = 0
    seed: int = 0

    def run(self, routing: str, progress: Callable[[int], None] = lambda _: None) -> Tally:
        """Simulate one routing; as of ``simulate``."""
        return simulate(
            self.fleet,
            self.source.asks(),
            routing,
            failures=self.failures,
            unmeasured=self.unmeasured,
            seed=self.seed,
            progress=progress,
        )


def side_by_side(
    study: Study, routings: Sequence[str], progress: Callable[[Sequence[int]], None]
) -> list[Tally]:
    """Simulate several routings at a time, as many as there are cores.

    Args:
        study: What is simulated.
        routings: Names of ``ROUTERS``.
        progress: Is called now and then with the number of requests sent so far, by routing.

    Returns:
        What came of each, in the order of the routings.

    Raises:
        OSError: The source is a file that cannot be read.
        TraceError: The same, of its content.
    """
    # A process that is made by copying this one would have its threads' locks.
    context = multiprocessing.get_context("spawn")
    sent = context.Array("Q", len(routings), lock=False)
    workers = max(1, min(len(routings), len(os.sched_getaffinity(0))))
    with ProcessPoolExecutor(workers, context, _begin, (sent,)) as pool:
        running = [
            pool.submit(_run, study, routing, number) for number, routing in enumerate(routings)
        ]
        left: set[Future[Tally]] = set(running)
        while left:
            ended, left = wait(left, timeout=_POLL_S)
            progress(list(sent))
            for each in ended:
                if (error := each.exception()) is not None:
                    pool.shutdown(wait=False, cancel_futures=True)
                    raise error
        return [each.result() for each in running]


_sent: Any = None


def _begin(sent: Any) -> None:
    global _sent
    _sent = sent


def _run(study: Study, routing: str, number: int) -> Tally:
    def progress(count: int) -> None:
        _sent[number] = count

    return study.run(routing, progress)
