"""The jobs of a decode pool, and the lanes in which they wait."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor

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


class Lane:
    """Jobs of one kind, and the threads on which they are done.

    Args:
        threads: Most jobs at a time.
        name: Name of the threads.
    """

    def __init__(self, threads: int, name: str) -> None:
        self.threads = ThreadPoolExecutor(threads, thread_name_prefix=name)
        self.jobs: list[tuple[Job, Future[DecodeResult]]] = []
