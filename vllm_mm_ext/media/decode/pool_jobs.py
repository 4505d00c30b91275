"""The jobs of a decode pool, and the lanes in which they wait."""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

from vllm_mm_ext.errors import BusyError, DecodeTimeoutError, MediaError, no_room
from vllm_mm_ext.media.decode.open_files import file_key
from vllm_mm_ext.media.decode.pool_queue import Place
from vllm_mm_ext.media.decode.worker_process import WorkerProcess
from vllm_mm_ext.media.types import DecodeRequest, DecodeResult


class Job:
    """One request on its way through the pool.

    Attributes:
        fd: Descriptor of the encoded media, owned by the job.
        request: What to do.
        sized: See ``DecodePool.run``.
        queued: It waits for a worker.
        deadline: ``time.monotonic()`` value at which the job is stopped, once it runs.
        worker: Who works on it.
        cancelled: Nobody waits for the result any more.
        place: Its place in the queue.
        known: The worker has the file open, with its packet table.
        threads: Decoding threads.
        alone: Decoding threads that it would have without other jobs.
    """

    def __init__(
        self, fd: int, request: DecodeRequest, sized: Callable[[int], None] | None
    ) -> None:
        self.fd = fd
        self.request = request
        self.sized = sized
        self.queued = True
        self.deadline = 0.0
        self.worker: WorkerProcess | None = None
        self.cancelled = False
        span = request.sampling.span if request.sampling else None
        self.place = Place(file_key(request), span[0] if span else 0.0)
        self.known = False
        self.threads = 0
        self.alone = 0

    def out_of_time(self) -> MediaError:
        """What a client is told of a job that was stopped at its time limit.

        A job that shared the threads with others may have time enough when there are fewer.
        """
        limit = f"Decoding took longer than the limit of {self.request.limits.timeout_s:g} s"
        if self.threads < self.alone:
            return BusyError(f"{limit}, beside that of other media. Try again later.")
        return DecodeTimeoutError(f"{limit} and was stopped.")


class Lane:
    """Jobs of one kind, and the threads on which they are done.

    Args:
        threads: Most jobs at a time.
        name: Name of the threads.
    """

    def __init__(self, threads: int, name: str) -> None:
        self.threads = ThreadPoolExecutor(threads, thread_name_prefix=name)
        self.jobs: list[tuple[Job, Future[DecodeResult]]] = []

    def add(self, job: Job, future: Future[DecodeResult], run_next: Callable[[Lane], None]) -> None:
        """Append a job, and have a thread call ``run_next``.

        Raises:
            BusyError: No thread can start. ``run_next`` may be called all the same.
        """
        self.jobs.append((job, future))
        try:
            self.threads.submit(run_next, self)
        except RuntimeError:
            self.jobs.remove((job, future))
            os.close(job.fd)
            raise no_room("no thread can start") from None


@dataclass
class PoolStats:
    """Counters since the pool was made, and two values of this moment.

    Attributes:
        started: Worker processes started.
        died: Workers that ended by themselves or sent what no sound worker sends.
        timed_out: Jobs stopped at their time limit.
        cancelled: Jobs that their caller gave up.
        jobs: Jobs that got a worker.
        busy: Jobs that have a worker now.
        waiting: Jobs that wait for a worker now.
    """

    started: int = 0
    died: int = 0
    timed_out: int = 0
    cancelled: int = 0
    jobs: int = 0
    busy: int = 0
    waiting: int = 0
