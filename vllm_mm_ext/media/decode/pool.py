"""A pool of decode worker processes: parallel, bounded, and safe from what the media does."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from socket import socketpair
from typing import Any

import numpy as np
import numpy.typing as npt

from vllm_mm_ext.errors import DecodeCrashError, DecodeTimeoutError, MediaError
from vllm_mm_ext.media.decode import shared_array, wire
from vllm_mm_ext.media.decode.wire import Done, Reserve, ShippedArray
from vllm_mm_ext.media.types import DecodeRequest, DecodeResult

# Past this, more workers or threads gain little on one request and cost memory.
_MAX_DEFAULT = 8
_PACKAGE_ROOT = str(Path(__file__).parents[3])


@dataclass
class PoolStats:
    """Counters since the pool was made; ``busy`` is of this moment."""

    started: int = 0
    died: int = 0
    timed_out: int = 0
    cancelled: int = 0
    jobs: int = 0
    busy: int = 0


class DecodePool:
    """Runs decode jobs in worker processes.

    Workers start when first needed and are replaced when they die. Each job has a worker of
    its own; jobs past the number of workers wait their turn. Safe from any thread and any
    event loop.
    """

    def __init__(self, workers: int = 0, threads: int = 0) -> None:
        """Start nothing yet.

        Args:
            workers: Most processes; 0 for one per core, at most 8.
            threads: Decoding threads of a job whose request leaves them open; 0 likewise.
        """
        cores = min(len(os.sched_getaffinity(0)), _MAX_DEFAULT)
        self.workers = workers or cores
        self._threads = threads or cores
        self._idle: list[_Worker] = []
        self._live: set[_Worker] = set()
        self._stats = PoolStats()
        self._closed = False
        self._change = threading.Condition()
        # One thread per job that may run, for callers on an event loop.
        self._runners = ThreadPoolExecutor(self.workers, thread_name_prefix="decode-pool")

    async def run(
        self, fd: int, request: DecodeRequest, sized: Callable[[int], None] | None = None
    ) -> DecodeResult:
        """Decode the media in ``fd``.

        Cancelling the awaiting task takes the job out of the queue, or kills its worker.

        Args:
            fd: Readable descriptor of the whole encoded file. It is duplicated: the caller
                may close it at any time.
            request: What to do.
            sized: Called, in another thread, with the bytes of frames and audio that the job is
                about to make.

        Returns:
            The result, without packet table and activity profile (they grow with the file); its
            arrays live in shared memory until the last view of them is gone.

        Raises:
            DecodeTimeoutError: It took longer than ``limits.timeout_s`` (time in the queue does
                not count).
            DecodeCrashError: The worker died on it.
            MediaError: As ``run_job``.
        """
        job = _Job(os.dup(fd), request, sized)
        future = self._runners.submit(self._run, job)
        future.add_done_callback(job.release)
        try:
            return await asyncio.wrap_future(future)
        except asyncio.CancelledError:
            self._cancel(job)
            raise
        finally:
            del future  # It holds the error whose traceback holds this frame.

    def run_sync(self, fd: int, request: DecodeRequest) -> DecodeResult:
        """As ``run``, blocking the calling thread."""
        job = _Job(os.dup(fd), request)
        try:
            return self._run(job)
        finally:
            job.release()

    def stats(self) -> dict[str, int]:
        """``PoolStats`` as a dictionary."""
        with self._change:
            return asdict(self._stats)

    def worker_pids(self) -> list[int]:
        """Process ids of the live workers, for accounting of their memory."""
        with self._change:
            return [worker.pid for worker in self._live]

    def close(self) -> None:
        """Kill all workers. Jobs that run or wait fail with ``DecodeCrashError``."""
        with self._change:
            self._closed = True
            for worker in self._live:
                worker.kill()
            idle, self._idle = self._idle, []
            self._change.notify_all()
        for worker in idle:
            self._discard(worker)
        self._runners.shutdown(wait=False, cancel_futures=True)

    def _run(self, job: _Job) -> DecodeResult:
        worker = self._take_worker(job)
        healthy = reusable = False
        try:
            result = self._converse(worker, job)
            healthy = True
            return result
        except MediaError as error:
            # One that the worker reports leaves it in order; these two kill it.
            healthy = not isinstance(error, (DecodeCrashError, DecodeTimeoutError))
            raise
        finally:
            with self._change:
                self._stats.busy -= 1
                job.worker = None
                reusable = healthy and not job.cancelled and not self._closed
                if reusable:
                    self._idle.append(worker)
                self._change.notify_all()
            if not reusable:
                self._discard(worker)

    def _converse(self, worker: _Worker, job: _Job) -> DecodeResult:
        limits = job.request.limits
        request = replace(job.request, threads=job.request.threads or self._threads)
        deadline = time.monotonic() + limits.timeout_s
        try:
            wire.send(worker.sock, request, [job.fd])
            while True:
                message, fds = wire.receive(worker.sock, deadline)
                if not isinstance(message, Reserve):
                    break
                # No job waits for room in the media budget while it has a worker: the caller has
                # acquired the bytes, as far as they could be told.
                if job.sized is not None:
                    job.sized(message.num_bytes)
                wire.send(worker.sock, True)
        except TimeoutError as error:
            with self._change:
                self._stats.timed_out += 1
            raise DecodeTimeoutError(
                f"Decoding took longer than the limit of {limits.timeout_s:g} s and was stopped."
            ) from error
        except (EOFError, OSError) as error:
            with self._change:
                self._stats.died += not (job.cancelled or self._closed)
            raise DecodeCrashError(
                "The decoder process ended while it worked on the media "
                f"(exit status {worker.wait()})."
            ) from error
        if isinstance(message, MediaError):
            try:
                raise message
            finally:
                del message  # As in `run`.
        return _unpack(message, fds)

    def _take_worker(self, job: _Job) -> _Worker:
        with self._change:
            self._change.wait_for(
                lambda: (
                    self._idle or len(self._live) < self.workers or job.cancelled or self._closed
                )
            )
            self._check_wanted(job)
            # Prefer the worker used last: its memory is warm.
            while self._idle:
                worker = self._idle.pop()
                if worker.alive:
                    break
                self._stats.died += 1
                self._live.discard(worker)
                worker.dispose()
            else:
                worker = _Worker()
                self._live.add(worker)
                self._stats.started += 1
            self._stats.jobs += 1
            self._stats.busy += 1
            job.worker = worker
            return worker

    def _check_wanted(self, job: _Job) -> None:
        if self._closed:
            raise DecodeCrashError("The decode pool is closed.")
        if job.cancelled:
            raise DecodeCrashError("The decode job was cancelled.")

    def _cancel(self, job: _Job) -> None:
        with self._change:
            job.cancelled = True
            self._stats.cancelled += 1
            if job.worker is not None:
                job.worker.kill()
            self._change.notify_all()

    def _discard(self, worker: _Worker) -> None:
        worker.dispose()
        with self._change:
            self._live.discard(worker)
            self._change.notify_all()


class _Job:
    """One request on its way; owns a duplicate of the media's descriptor."""

    def __init__(
        self, fd: int, request: DecodeRequest, sized: Callable[[int], None] | None = None
    ) -> None:
        self.fd = fd
        self.request = request
        self.sized = sized
        self.cancelled = False
        self.worker: _Worker | None = None

    def release(self, _: Future[DecodeResult] | None = None) -> None:
        os.close(self.fd)


class _Worker:
    """One worker process and our end of its socket."""

    def __init__(self) -> None:
        self.sock, theirs = socketpair()
        with theirs:
            self._process = subprocess.Popen(
                # -P: no modules from the directory the server happens to run in.
                [
                    sys.executable,
                    "-P",
                    "-m",
                    "vllm_mm_ext.media.decode.worker",
                    str(theirs.fileno()),
                ],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                env=_environment(),
            )

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def alive(self) -> bool:
        return self._process.poll() is None

    def kill(self) -> None:
        """End the process; whoever waits for it sees the end of its socket."""
        self._process.kill()

    def wait(self) -> int:
        self._process.kill()
        return self._process.wait()

    def dispose(self) -> None:
        self.wait()
        self.sock.close()


def _environment() -> dict[str, str]:
    paths = [_PACKAGE_ROOT, *filter(None, [os.environ.get("PYTHONPATH")])]
    return {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(paths),
        # Each malloc arena takes 64 MB of address space, which the memory limit counts.
        "MALLOC_ARENA_MAX": "2",
    }


def _unpack(done: Done, fds: list[int]) -> DecodeResult:
    result = done.result
    left = list(fds)
    try:
        result.frames = _adopt(done.frames, left)
        result.audio = _adopt(done.audio, left)
    finally:
        for fd in left:
            os.close(fd)
    return result


def _adopt(shipped: ShippedArray | None, fds: list[int]) -> npt.NDArray[Any] | None:
    """The shipped array, its descriptor taken from the front of ``fds`` and closed."""
    if shipped is None:
        return None
    fd = fds.pop(0)
    try:
        return shared_array.adopt(fd, shipped.shape, np.dtype(shipped.dtype))
    finally:
        os.close(fd)
