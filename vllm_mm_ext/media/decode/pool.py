"""A pool of decode worker processes: parallel, bounded, and safe from what the media does."""

from __future__ import annotations

import asyncio
import math
import os
import threading
import time
from collections.abc import Callable
from concurrent.futures import CancelledError, Future
from dataclasses import asdict, replace
from functools import partial

from vllm_mm_ext.errors import BusyError, DecodeCrashError, MediaError, busy_if_short
from vllm_mm_ext.media.decode.gpu_seats import GpuSeats
from vllm_mm_ext.media.decode.pool_jobs import Job, Lane, PoolStats
from vllm_mm_ext.media.decode.pool_queue import HeldFiles, fitness, next_job
from vllm_mm_ext.media.decode.worker_process import WorkerProcess
from vllm_mm_ext.media.decode.worker_talk import WorkerDiedError, converse
from vllm_mm_ext.media.types import DecodeRequest, DecodeResult

# Past this, more workers or threads gain little on one request and cost memory.
MAX_DEFAULT_WORKERS = 8


class DecodePool:
    """Runs decode jobs in worker processes.

    Workers start when first needed (``warm`` starts one) and are replaced when they die. Each job
    has a worker of its own. Jobs start in the order in which they came, in two lanes: decodes, and
    probes, which are short and so never wait behind decodes. Jobs about spans of one file go to the
    worker that has the file open (``pool_queue``). Safe from any thread and any event loop.
    """

    def __init__(self, workers: int = 0, threads: int = 0, gpu_sessions: int = 0) -> None:
        """Start nothing yet.

        Args:
            workers: Most decodes at a time, and most probes beside them; 0 for one per core, at
                most 8.
            threads: Decoding threads of a job whose request leaves them open; 0: one per core, at
                most 8, shared by the jobs that there are when it begins, as more take more CPU.
            gpu_sessions: Workers that may use a GPU, for each GPU that the server sees.
        """
        cores = min(len(os.sched_getaffinity(0)), MAX_DEFAULT_WORKERS)
        self.workers = workers or cores
        self._threads, self._shared_threads = threads, cores
        self._probes = Lane(self.workers, "probe-pool")
        self._decodes = Lane(self.workers, "decode-pool")
        self._seats = GpuSeats.of_server(gpu_sessions)
        self._idle: list[WorkerProcess] = []
        self._live: set[WorkerProcess] = set()
        # What the workers will have open that the jobs taken out of the queue are about to get.
        self._opening: dict[Job, HeldFiles] = {}
        self._stats = PoolStats()
        self._closed = False
        self._lock = threading.Lock()  # Guards all of the above.
        self._changed = threading.Condition(self._lock)  # Of workers, and of jobs that wait.

    def warm(self) -> None:
        """Start one worker in the background, so that the first job need not wait for its start.

        A start takes some 0.3 s of a core, and 60 MB stay taken. The worker of a file's probe
        decodes the file too, so a single client needs no other one.
        """
        with self._lock:
            if not self._closed and not self._live:
                self._probes.threads.submit(self._start_idle)

    async def run(
        self, fd: int, request: DecodeRequest, sized: Callable[[int], None] | None = None
    ) -> DecodeResult:
        """Decode the media in ``fd``.

        A job whose worker dies, or has no memory left for it, is tried once more in a fresh worker.
        Cancelling the awaiting task takes the job out of the queue, or kills its worker.

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
                count) with all the threads that it can have.
            DecodeCrashError: Two workers died on it.
            BusyError: The pool is closed, processes, memory or descriptors are short, or the job
                took too long while others had some of the threads.
            InternalMediaError: The decoder itself is at fault; the log says how.
            MediaError: As ``run_job``.
        """
        lane = self._probes if request.probe_only else self._decodes
        with self._lock:
            self._check_open()
            with busy_if_short():
                job, future = Job(os.dup(fd), request, sized), Future[DecodeResult]()
            lane.add(job, future, self._run_next)
            self._stats.waiting += 1
            self._changed.notify_all()
        future.add_done_callback(partial(self._release, job))
        try:
            return await asyncio.wrap_future(future)
        except asyncio.CancelledError:
            self._cancel(job)
            raise
        finally:
            del future  # It holds the error whose traceback holds this frame.

    def stats(self) -> dict[str, int]:
        """``PoolStats`` as a dictionary, with what GPUs did."""
        with self._lock:
            return {**asdict(self._stats), **self._seats.stats()}

    def worker_pids(self) -> list[int]:
        """Process ids of the live workers, for accounting of their memory."""
        with self._lock:
            return [worker.pid for worker in self._live]

    def renew(self) -> None:
        """End all workers, with what their memory holds; jobs under way begin again in fresh ones.

        The processes are gone when this returns, but for one that does not end though it was
        killed: it does nothing more with what it holds.
        """
        with self._lock:
            idle, self._idle = self._idle, []
            busy = self._live.difference(idle)
            for worker in self._live:
                worker.retired = True
        for worker in idle:
            self._discard(worker)
        for worker in busy:
            # The thread that works with it disposes of it.
            worker.wait()

    def close(self) -> None:
        """Kill all workers. Jobs that run or wait fail with ``BusyError``."""
        with self._lock:
            self._closed = True
            for worker in self._live:
                worker.kill()
            idle, self._idle = self._idle, []
            self._changed.notify_all()
        for worker in idle:
            self._discard(worker)
        for lane in (self._probes, self._decodes):
            lane.threads.shutdown(wait=False)

    # --- one job, on a thread of its lane ---------------------------------------------------------

    def _run_next(self, lane: Lane) -> None:
        """Do one of the jobs that wait: there is a call of this for each."""
        taken = self._next(lane)
        if taken is None:
            return
        job, future, worker = taken
        try:
            result = self._run(job, worker)
        except BaseException as error:
            future.set_exception(error)
        else:
            future.set_result(result)
        finally:
            with self._changed:
                if self._opening.pop(job, None) is not None:
                    self._changed.notify_all()
            # The error's traceback holds this frame.
            del taken, future

    def _next(self, lane: Lane) -> tuple[Job, Future[DecodeResult], WorkerProcess | None] | None:
        """Wait until a job of the lane can start and take it out of the queue.

        Returns:
            The job, and the idle worker that has its file open, if there is one; None for a job
            that was given up or could not be taken in.
        """
        with self._changed:
            while True:
                if not lane.jobs:
                    return None
                number, seconds = self._choose(lane)
                if number >= 0:
                    break
                self._changed.wait(seconds)
            job, future = lane.jobs.pop(number)
            if not future.set_running_or_notify_cancel():
                return None
            self._leave_queue(job)
            self._opening[job] = files = HeldFiles()
            files.use(job.place, time.monotonic())
            return job, future, self._holder(job)

    def _choose(self, lane: Lane) -> tuple[int, float | None]:
        """As ``next_job``, of the jobs of a lane. Call with the lock held."""
        for number, (_, future) in enumerate(lane.jobs):
            if self._closed or future.cancelled():
                return number, 0.0
        return next_job(
            [job.place for job, _ in lane.jobs],
            [*(worker.files for worker in self._live), *self._opening.values()],
            [worker.files for worker in self._idle],
            time.monotonic(),
        )

    def _holder(self, job: Job) -> WorkerProcess | None:
        """The idle worker that has a job's file open. Call with the lock held."""
        for worker in self._idle:
            if worker.files.holds(job.place.file, time.monotonic()) and worker.alive:
                self._idle.remove(worker)
                return worker
        return None

    def _run(self, job: Job, holder: WorkerProcess | None) -> DecodeResult:
        try:
            with self._lock:
                self._check_wanted(job)
                self._stats.jobs += 1
                self._stats.busy += 1
        except (BusyError, CancelledError):
            if holder is not None:
                self._let_go(holder, reusable=True)
            raise
        try:
            job.deadline = time.monotonic() + job.request.limits.timeout_s
            used, died = holder or self._idle_worker(job.request.may_use_gpu), 0
            worker = used or self._new_worker()
            while True:
                try:
                    return self._attempt(job, worker)
                except MediaError as error:
                    # Earlier jobs may have left the worker too little memory.
                    if worker is not used or not isinstance(error.__cause__, MemoryError):
                        raise
                except WorkerDiedError as error:
                    self._check_wanted(job)
                    died += not worker.retired
                    if died > 1:
                        raise DecodeCrashError(
                            f"Two decoder processes ended while they worked on the media ({error})."
                        ) from error
                    # That may be the machine's doing, or a rare fault: once more, in a fresh
                    # process, and without a GPU.
                    if died and job.request.may_use_gpu:
                        job.request = replace(job.request, decoder="pyav")
                if worker.retired:
                    job.deadline = time.monotonic() + job.request.limits.timeout_s
                worker = self._new_worker()
        finally:
            with self._lock:
                self._stats.busy -= 1

    def _attempt(self, job: Job, worker: WorkerProcess) -> DecodeResult:
        """Have a worker do a job; the worker is idle again afterwards, or gone."""
        file = job.place.file
        with self._lock:
            self._opening.pop(job, None)
            job.worker = worker
            job.known = worker.files.holds(file, time.monotonic())
            worker.files.use(job.place, time.monotonic())
            # The spans of a file are read by one worker, which the others wait for.
            jobs = 1 if file else self._stats.busy + self._stats.waiting
            job.alone = job.request.threads or self._threads or self._shared_threads
            share = math.ceil(self._shared_threads / jobs)
            job.threads = job.request.threads or self._threads or share
            if job.cancelled or self._closed:
                worker.kill()
        reusable = False
        try:
            result = self._converse(job, worker)
            reusable = True
            with self._lock:
                worker.files.use(job.place, time.monotonic())
            return result
        except MediaError as error:
            with self._lock:
                worker.files.drop(file)
            # A worker that reports an error is in order; one out of time or memory is not.
            reusable = not isinstance(error.__cause__, TimeoutError | MemoryError)
            raise
        finally:
            with self._lock:
                job.worker = None
            self._let_go(worker, reusable=reusable and not job.cancelled)

    def _converse(self, job: Job, worker: WorkerProcess) -> DecodeResult:
        """Give a worker its job, hand on what it says of the result's size, take the result."""
        request = replace(job.request, threads=job.threads)
        if job.known:
            # The worker has the packet table: megabytes for hours of video.
            request = replace(request, info=None)
        try:
            sized = partial(self._tell_size, job)
            result = converse(worker, request, job.fd, job.deadline, sized)
            self._seats.count(result)
            return result
        except TimeoutError as error:
            with self._lock:
                self._stats.timed_out += 1
            raise job.out_of_time() from error
        except WorkerDiedError:
            with self._lock:
                self._stats.died += not (job.cancelled or self._closed or worker.retired)
            raise

    # --- shared state -----------------------------------------------------------------------------

    def _tell_size(self, job: Job, num_bytes: int) -> None:
        """Tell the caller the size of the result, unless the caller has given the job up.

        No job waits for the media budget while it has a worker: the caller has the bytes already,
        as far as they could be told before.
        """
        with self._lock:
            if job.sized is not None and not job.cancelled:
                job.sized(num_bytes)

    def _leave_queue(self, job: Job) -> None:
        """Call with the lock held."""
        self._stats.waiting -= job.queued
        job.queued = False

    def _release(self, job: Job, _: Future[DecodeResult]) -> None:
        """Let go what a job held, when its future is done or cancelled."""
        os.close(job.fd)
        with self._lock:
            self._leave_queue(job)
            self._changed.notify_all()

    def _check_open(self) -> None:
        if self._closed:
            raise BusyError("The server stops: it decodes no more media.")

    def _check_wanted(self, job: Job) -> None:
        self._check_open()
        if job.cancelled:
            raise CancelledError

    def _cancel(self, job: Job) -> None:
        with self._lock:
            job.cancelled = True
            self._stats.cancelled += 1
            if job.worker is not None:
                job.worker.kill()

    def _idle_worker(self, with_gpu: bool) -> WorkerProcess | None:
        """The worker used last, as its memory is warm; None if there is none.

        See ``pool_queue.fitness`` for those that come first whenever they were used.
        """
        with self._lock:
            now = time.monotonic()
            while self._idle:
                # Of workers that are alike, `max` takes the first.
                worker = max(
                    reversed(self._idle),
                    key=lambda one: fitness(one.files, one.seat is not None, with_gpu, now),
                )
                self._idle.remove(worker)
                if worker.alive:
                    return worker
                self._stats.died += 1
                self._live.discard(worker)
                worker.dispose()
        return None

    def _start_idle(self) -> None:
        self._let_go(self._new_worker(), reusable=True)

    def _new_worker(self) -> WorkerProcess:
        # Without the lock: an event loop may wait for that one.
        with busy_if_short():
            worker = WorkerProcess(self._seats.take())
        with self._lock:
            self._live.add(worker)
            self._stats.started += 1
        return worker

    def _let_go(self, worker: WorkerProcess, *, reusable: bool) -> None:
        """Make a worker idle that can take a job and still may; dispose of another one."""
        with self._lock:
            reusable = reusable and not (self._closed or worker.retired)
            if reusable:
                self._idle.append(worker)
                self._changed.notify_all()
        if not reusable:
            self._discard(worker)

    def _discard(self, worker: WorkerProcess) -> None:
        worker.dispose()
        with self._changed:
            self._live.discard(worker)
            self._changed.notify_all()
