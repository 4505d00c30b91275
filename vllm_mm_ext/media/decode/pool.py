"""A pool of decode worker processes: parallel, bounded, and safe from what the media does."""

from __future__ import annotations

import asyncio
import logging
import os
import threading
import time
from collections.abc import Callable
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from functools import partial

from vllm_mm_ext.errors import (
    BusyError,
    DecodeCrashError,
    DecodeTimeoutError,
    InternalMediaError,
    MediaError,
)
from vllm_mm_ext.media.decode import wire
from vllm_mm_ext.media.decode.gpu_seats import GpuSeats, visible_devices
from vllm_mm_ext.media.decode.results import close_all, unpack
from vllm_mm_ext.media.decode.wire_checks import MalformedMessageError, check_reservation
from vllm_mm_ext.media.decode.worker_process import WorkerProcess
from vllm_mm_ext.media.types import DecodeRequest, DecodeResult

logger = logging.getLogger("vllm.mm_ext")

# Past this, more workers or threads gain little on one request and cost memory.
_MAX_DEFAULT = 8


class _WorkerDiedError(Exception):
    """The worker ended in the middle of a job, or sent what no sound worker sends."""


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
        on_gpu: Jobs whose frames a GPU decoded.
        gpu_fallbacks: Jobs of the CPU because there was no GPU, or an error of it.
    """

    started: int = 0
    died: int = 0
    timed_out: int = 0
    cancelled: int = 0
    jobs: int = 0
    busy: int = 0
    waiting: int = 0
    on_gpu: int = 0
    gpu_fallbacks: int = 0


class DecodePool:
    """Runs decode jobs in worker processes.

    Workers start when first needed (``warm`` starts one) and are replaced when they die. Each job
    has a worker of its own. Jobs start in the order in which they came, in two lanes: decodes, and
    probes, which are short and so never wait behind decodes. Safe from any thread and any event
    loop.
    """

    def __init__(self, workers: int = 0, threads: int = 0, gpu_sessions: int = 0) -> None:
        """Start nothing yet.

        Args:
            workers: Most decodes at a time, and most probes beside them; 0 for one per core, at
                most 8.
            threads: Decoding threads of a job whose request leaves them open; 0 likewise.
            gpu_sessions: Workers that may use a GPU, for each GPU that the server sees.
        """
        cores = min(len(os.sched_getaffinity(0)), _MAX_DEFAULT)
        self.workers = workers or cores
        self._threads = threads or cores
        # Executors take up what was submitted in that order.
        self._probes = ThreadPoolExecutor(self.workers, thread_name_prefix="probe-pool")
        self._decodes = ThreadPoolExecutor(self.workers, thread_name_prefix="decode-pool")
        devices = visible_devices(os.environ) if gpu_sessions else ()
        if gpu_sessions and not devices:
            logger.warning("mm_ext: CUDA_VISIBLE_DEVICES names no GPU: the CPU decodes all videos.")
        self._seats = GpuSeats(devices, gpu_sessions)
        self._idle: list[WorkerProcess] = []
        self._live: set[WorkerProcess] = set()
        self._stats = PoolStats()
        self._closed = False
        self._lock = threading.Lock()  # Guards all of the above.

    def warm(self) -> None:
        """Start one worker in the background, so that the first job need not wait for its start.

        A start takes some 0.3 s of a core, and 60 MB stay taken. The worker of a file's probe
        decodes the file too, so a single client needs no other one.
        """
        with self._lock:
            if not self._closed and not self._live:
                self._probes.submit(self._start_idle)

    async def run(
        self, fd: int, request: DecodeRequest, sized: Callable[[int], None] | None = None
    ) -> DecodeResult:
        """Decode the media in ``fd``.

        A job whose worker dies is tried once more in a fresh worker. Cancelling the awaiting task
        takes the job out of the queue, or kills its worker.

        Args:
            fd: Readable descriptor of the whole encoded file. The pool duplicates it: the caller
                may close it at any time.
            request: What to do.
            sized: Called, in another thread and once per worker that works on the job, with the
                bytes of frames and sound that the job is about to make. It must not block. It is
                not called once the awaiting task was cancelled or ``run`` has returned.

        Returns:
            The result; except for a probe, without packet table and activity profile (they grow
            with the file). Its arrays live in shared memory until the last view of them is gone.

        Raises:
            DecodeTimeoutError: It took longer than ``limits.timeout_s`` (time in queues does not
                count).
            DecodeCrashError: Two workers died on it.
            BusyError: The pool is closed.
            InternalMediaError: The decoder itself is at fault; the log says how.
            MediaError: As ``run_job``.
        """
        lane = self._probes if request.probe_only else self._decodes
        with self._lock:
            self._check_open()
            job = _Job(os.dup(fd), request, sized)
            future = lane.submit(self._run, job)
            self._stats.waiting += 1
        future.add_done_callback(partial(self._release, job))
        try:
            return await asyncio.wrap_future(future)
        except asyncio.CancelledError:
            self._cancel(job)
            raise
        finally:
            del future  # It holds the error whose traceback holds this frame.

    def stats(self) -> dict[str, int]:
        """``PoolStats`` as a dictionary."""
        with self._lock:
            return asdict(self._stats)

    def worker_pids(self) -> list[int]:
        """Process ids of the live workers, for accounting of their memory."""
        with self._lock:
            return [worker.pid for worker in self._live]

    def close(self) -> None:
        """Kill all workers. Jobs that run or wait fail with ``BusyError``."""
        with self._lock:
            self._closed = True
            for worker in self._live:
                worker.kill()
            idle, self._idle = self._idle, []
        for worker in idle:
            self._discard(worker)
        for lane in (self._probes, self._decodes):
            lane.shutdown(wait=False)

    # --- one job, on a thread of its lane ---------------------------------------------------------

    def _run(self, job: _Job) -> DecodeResult:
        with self._lock:
            self._leave_queue(job)
            self._check_wanted(job)
            self._stats.jobs += 1
            self._stats.busy += 1
        job.deadline = time.monotonic() + job.request.limits.timeout_s
        try:
            try:
                worker = self._idle_worker(job.request.may_use_gpu) or self._new_worker()
                return self._attempt(job, worker)
            except _WorkerDiedError:
                # That may be the machine's doing, or a rare fault: once more, in a fresh process,
                # and without a GPU.
                self._check_wanted(job)
                if job.request.may_use_gpu:
                    job.request = replace(job.request, decoder="pyav")
            try:
                return self._attempt(job, self._new_worker())
            except _WorkerDiedError as error:
                self._check_wanted(job)
                raise DecodeCrashError(
                    f"Two decoder processes ended while they worked on the media ({error})."
                ) from error
        finally:
            with self._lock:
                self._stats.busy -= 1

    def _attempt(self, job: _Job, worker: WorkerProcess) -> DecodeResult:
        """Have a worker do a job; the worker is idle again afterwards, or gone."""
        with self._lock:
            job.worker = worker
            if job.cancelled or self._closed:
                worker.kill()
        reusable = False
        try:
            result = self._converse(job, worker)
            reusable = True
            return result
        except MediaError as error:
            # A worker that reports an error is in order; one that ran out of time is not.
            reusable = not isinstance(error, DecodeTimeoutError)
            raise
        finally:
            with self._lock:
                job.worker = None
                reusable = reusable and not job.cancelled and not self._closed
                if reusable:
                    self._idle.append(worker)
            if not reusable:
                self._discard(worker)

    def _converse(self, job: _Job, worker: WorkerProcess) -> DecodeResult:
        """Give a worker its job, hand on what it says of the result's size, take the result."""
        request = replace(job.request, threads=job.request.threads or self._threads)
        try:
            wire.send(worker.sock, wire.Job(request), [job.fd], job.deadline)
            reply, fds = self._reply(job, worker)
            if isinstance(reply, wire.Reserve):
                check_reservation(reply.num_bytes, request)
                self._tell_size(job, reply.num_bytes)
                reply, fds = self._reply(job, worker)
            if isinstance(reply, wire.Probed | wire.Decoded):
                result = unpack(reply, fds, request)
                self._count_gpu(result)
                return result
            if isinstance(reply, wire.Reserve):
                raise MalformedMessageError("a worker reserved room twice")
        except TimeoutError as error:
            with self._lock:
                self._stats.timed_out += 1
            raise DecodeTimeoutError(
                f"Decoding took longer than the limit of {request.limits.timeout_s:g} s "
                "and was stopped."
            ) from error
        except (EOFError, OSError, MalformedMessageError) as error:
            with self._lock:
                self._stats.died += not (job.cancelled or self._closed)
            why = str(error) if isinstance(error, MalformedMessageError) else ""
            raise _WorkerDiedError(why or f"exit status {worker.wait()}") from error
        if isinstance(reply, wire.Failed):
            raise reply.error()
        logger.error("mm_ext: a decode worker failed: %s", reply.text)
        raise InternalMediaError

    def _reply(self, job: _Job, worker: WorkerProcess) -> tuple[wire.Reply, list[int]]:
        """The next message of a worker, with as many descriptors as belong to it."""
        most = wire.MAX_BYTES if job.request.probe_only else wire.MAX_RESULT_BYTES
        reply, fds = wire.receive(worker.sock, wire.decode_reply, job.deadline, most)
        if len(fds) != wire.num_arrays(reply):
            close_all(fds)
            raise MalformedMessageError("a worker sent descriptors that belong to no array")
        return reply, fds

    def _count_gpu(self, result: DecodeResult) -> None:
        """Count what a GPU did or did not do; the first failure is logged, as for the rest."""
        with self._lock:
            self._stats.on_gpu += result.decoder == "nvdec"
            self._stats.gpu_fallbacks += bool(result.decoder_note)
            first = bool(result.decoder_note) and self._stats.gpu_fallbacks == 1
        if first:
            logger.warning(
                "mm_ext: a video was decoded on the CPU instead of the GPU: %r. Further ones are "
                "counted in /mm_ext/stats (gpu_fallbacks); `vllm-mm doctor` says what GPUs can do.",
                result.decoder_note,
            )

    # --- shared state -----------------------------------------------------------------------------

    def _tell_size(self, job: _Job, num_bytes: int) -> None:
        """Tell the caller the size of the result, unless the caller has given the job up.

        No job waits for the media budget while it has a worker: the caller has the bytes already,
        as far as they could be told before.
        """
        with self._lock:
            if job.sized is not None and not job.cancelled:
                job.sized(num_bytes)

    def _leave_queue(self, job: _Job) -> None:
        """Call with the lock held."""
        self._stats.waiting -= job.queued
        job.queued = False

    def _release(self, job: _Job, _: Future[DecodeResult]) -> None:
        """Let go what a job held, when its future is done or cancelled."""
        os.close(job.fd)
        with self._lock:
            self._leave_queue(job)

    def _check_open(self) -> None:
        if self._closed:
            raise BusyError("The server stops: it decodes no more media.")

    def _check_wanted(self, job: _Job) -> None:
        self._check_open()
        if job.cancelled:
            raise CancelledError

    def _cancel(self, job: _Job) -> None:
        with self._lock:
            job.cancelled = True
            self._stats.cancelled += 1
            if job.worker is not None:
                job.worker.kill()

    def _idle_worker(self, with_gpu: bool) -> WorkerProcess | None:
        """The worker used last, as its memory is warm; None if there is none.

        Args:
            with_gpu: Whether one with a GPU comes first, or one without.
        """
        with self._lock:
            while self._idle:
                # The last one of the sort wanted; of two alike, `max` returns the first.
                last = max(
                    reversed(range(len(self._idle))),
                    key=lambda i: (self._idle[i].seat is not None) == with_gpu,
                )
                worker = self._idle.pop(last)
                if worker.alive:
                    return worker
                self._stats.died += 1
                self._live.discard(worker)
                worker.dispose()
        return None

    def _start_idle(self) -> None:
        worker = self._new_worker()
        with self._lock:
            closed = self._closed
            if not closed:
                self._idle.append(worker)
        if closed:
            self._discard(worker)

    def _new_worker(self) -> WorkerProcess:
        worker = WorkerProcess(
            self._seats.take()
        )  # Without the lock: an event loop may wait for that one.
        with self._lock:
            self._live.add(worker)
            self._stats.started += 1
        return worker

    def _discard(self, worker: WorkerProcess) -> None:
        worker.dispose()
        with self._lock:
            self._live.discard(worker)


class _Job:
    """One request on its way through the pool.

    Attributes:
        fd: Descriptor of the encoded media, owned by the job.
        request: What to do.
        sized: See ``DecodePool.run``.
        queued: It waits for a worker.
        deadline: ``time.monotonic()`` value at which the job is stopped, once it runs.
        worker: Who works on it.
        cancelled: Nobody waits for the result any more.
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
