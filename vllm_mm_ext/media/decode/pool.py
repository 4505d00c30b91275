"""A pool of decode worker processes: parallel, bounded, and safe from what the media does."""

from __future__ import annotations

import asyncio
import logging
import os
import threading
import time
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import TypeVar, cast

import numpy as np
import numpy.typing as npt

from vllm_mm_ext.errors import (
    BusyError,
    DecodeCrashError,
    DecodeTimeoutError,
    InternalMediaError,
    MediaError,
)
from vllm_mm_ext.media.decode import shared_array, wire
from vllm_mm_ext.media.decode.fifo_capacity import FifoCapacity, Share
from vllm_mm_ext.media.decode.wire_checks import MalformedMessageError, check_reservation
from vllm_mm_ext.media.decode.worker_process import WorkerProcess
from vllm_mm_ext.media.types import DecodeRequest, DecodeResult

logger = logging.getLogger("vllm.mm_ext")

T = TypeVar("T", np.uint8, np.float32)

# Past this, more workers or threads gain little on one request and cost memory.
_MAX_DEFAULT = 8


class _WorkerDiedError(Exception):
    """The worker ended in the middle of a job, or sent what no sound worker sends."""


@dataclass
class PoolStats:
    """Counters since the pool was made, and three values of this moment.

    Attributes:
        started: Worker processes started.
        died: Workers that ended by themselves or sent what no sound worker sends.
        timed_out: Jobs stopped at their time limit.
        cancelled: Jobs that their caller gave up.
        jobs: Jobs that got a worker.
        busy: Jobs that have a worker now.
        waiting: Jobs that wait for a worker, or with one for room, now.
        bytes_in_flight: Bytes of frames and sound that jobs have room for now.
    """

    started: int = 0
    died: int = 0
    timed_out: int = 0
    cancelled: int = 0
    jobs: int = 0
    busy: int = 0
    waiting: int = 0
    bytes_in_flight: int = 0


class DecodePool:
    """Runs decode jobs in worker processes.

    Workers start when first needed and are replaced when they die. Each job has a worker of its
    own. Jobs start in the order in which they came, in two lanes: decodes, and probes, which are
    short and so never wait behind decodes. Safe from any thread and any event loop.
    """

    def __init__(
        self, workers: int = 0, threads: int = 0, max_in_flight_bytes: int = 1 << 30
    ) -> None:
        """Start nothing yet.

        Args:
            workers: Most decodes at a time, and most probes beside them; 0 for one per core, at
                most 8.
            threads: Decoding threads of a job whose request leaves them open; 0 likewise.
            max_in_flight_bytes: Bound on the frames and sound of all jobs between the start of
                decoding and the return of ``run``. A job waits for room before it decodes, behind
                the jobs that asked for room earlier; one that is larger than the bound runs alone.
        """
        cores = min(len(os.sched_getaffinity(0)), _MAX_DEFAULT)
        self.workers = workers or cores
        self._threads = threads or cores
        self._probes, self._decodes = _Lane(self.workers, "probe"), _Lane(self.workers, "decode")
        self._room = FifoCapacity(max_in_flight_bytes)
        self._idle: list[WorkerProcess] = []
        self._live: set[WorkerProcess] = set()
        self._stats = PoolStats()
        self._closed = False
        # Guards all of the above; notified whenever a job that waits may go on.
        self._change = threading.Condition()

    async def run(self, fd: int, request: DecodeRequest) -> DecodeResult:
        """Decode the media in ``fd``.

        A job whose worker dies is tried once more in a fresh worker. Cancelling the awaiting task
        takes the job out of the queue, or kills its worker.

        Args:
            fd: Readable descriptor of the whole encoded file. The pool duplicates it: the caller
                may close it at any time.
            request: What to do.

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
        with self._change:
            self._check_open()
            # Together, so that the threads of the lane take up the jobs in the order of the slots.
            job = _Job(os.dup(fd), request, lane, lane.slots.ask(1))
            future = lane.threads.submit(self._run, job)
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
        with self._change:
            queues = (self._probes.slots, self._decodes.slots, self._room)
            self._stats.waiting = sum(queue.waiting for queue in queues)
            self._stats.bytes_in_flight = self._room.used
            return asdict(self._stats)

    def worker_pids(self) -> list[int]:
        """Process ids of the live workers, for accounting of their memory."""
        with self._change:
            return [worker.pid for worker in self._live]

    def close(self) -> None:
        """Kill all workers. Jobs that run or wait fail with ``BusyError``."""
        with self._change:
            self._closed = True
            for worker in self._live:
                worker.kill()
            idle, self._idle = self._idle, []
            self._change.notify_all()
        for worker in idle:
            self._discard(worker)
        for lane in (self._probes, self._decodes):
            lane.threads.shutdown(wait=False)

    # --- one job, on a thread of its lane ---------------------------------------------------------

    def _run(self, job: _Job) -> DecodeResult:
        with self._change:
            self._wait_for(job.slot, job)
            self._stats.jobs += 1
            self._stats.busy += 1
        job.deadline = time.monotonic() + job.request.limits.timeout_s
        try:
            try:
                return self._attempt(job, self._idle_worker() or self._new_worker())
            except _WorkerDiedError:
                # That may be the machine's doing, or a rare fault: once more, in a fresh process.
                self._check_wanted(job)
            try:
                return self._attempt(job, self._new_worker())
            except _WorkerDiedError as error:
                self._check_wanted(job)
                raise DecodeCrashError(
                    f"Two decoder processes ended while they worked on the media ({error})."
                ) from error
        finally:
            with self._change:
                self._stats.busy -= 1

    def _attempt(self, job: _Job, worker: WorkerProcess) -> DecodeResult:
        """Have a worker do a job; the worker is idle again afterwards, or gone."""
        with self._change:
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
            with self._change:
                job.worker = None
                self._give_back_room(job)
                reusable = reusable and not job.cancelled and not self._closed
                if reusable:
                    self._idle.append(worker)
            if not reusable:
                self._discard(worker)

    def _converse(self, job: _Job, worker: WorkerProcess) -> DecodeResult:
        """Give a worker its job, find room for the result, and take the result."""
        request = replace(job.request, threads=job.request.threads or self._threads)
        try:
            wire.send(worker.sock, wire.Job(request), [job.fd], job.deadline)
            reply, fds = self._reply(job, worker)
            if isinstance(reply, wire.Reserve):
                check_reservation(reply.num_bytes, request)
                self._wait_for_room(reply.num_bytes, job)
                wire.send(worker.sock, wire.Proceed(), (), job.deadline)
                reply, fds = self._reply(job, worker)
            if isinstance(reply, wire.Probed | wire.Decoded):
                return _unpack(reply, fds, request)
            if isinstance(reply, wire.Reserve):
                raise MalformedMessageError("a worker reserved room twice")
        except TimeoutError as error:
            with self._change:
                self._stats.timed_out += 1
            raise DecodeTimeoutError(
                f"Decoding took longer than the limit of {request.limits.timeout_s:g} s "
                "and was stopped."
            ) from error
        except (EOFError, OSError, MalformedMessageError) as error:
            with self._change:
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
            _close(fds)
            raise MalformedMessageError("a worker sent descriptors that belong to no array")
        return reply, fds

    # --- shared state -----------------------------------------------------------------------------

    def _wait_for(self, share: Share, job: _Job) -> None:
        """Wait until a share is granted; call with the lock held."""
        self._change.wait_for(lambda: share.granted or job.cancelled or self._closed)
        self._check_wanted(job)

    def _wait_for_room(self, num_bytes: int, job: _Job) -> None:
        """Wait for room for a result; the time does not count for the job."""
        started = time.monotonic()
        with self._change:
            job.room = self._room.ask(num_bytes)
            self._wait_for(job.room, job)
        job.deadline += time.monotonic() - started

    def _give_back_room(self, job: _Job) -> None:
        """Call with the lock held."""
        if job.room is not None:
            self._room.give_back(job.room)
            job.room = None
            self._change.notify_all()

    def _release(self, job: _Job, _: Future[DecodeResult]) -> None:
        """Let go what a job held, when its future is done or cancelled."""
        os.close(job.fd)
        with self._change:
            job.lane.slots.give_back(job.slot)
            self._change.notify_all()

    def _check_open(self) -> None:
        if self._closed:
            raise BusyError("The server stops: it decodes no more media.")

    def _check_wanted(self, job: _Job) -> None:
        self._check_open()
        if job.cancelled:
            raise CancelledError

    def _cancel(self, job: _Job) -> None:
        with self._change:
            job.cancelled = True
            self._stats.cancelled += 1
            if job.worker is not None:
                job.worker.kill()
            self._change.notify_all()

    def _idle_worker(self) -> WorkerProcess | None:
        """The worker used last, as its memory is warm; None if there is none."""
        with self._change:
            while self._idle:
                worker = self._idle.pop()
                if worker.alive:
                    return worker
                self._stats.died += 1
                self._live.discard(worker)
                worker.dispose()
        return None

    def _new_worker(self) -> WorkerProcess:
        worker = WorkerProcess()  # Without the lock: an event loop may wait for that one.
        with self._change:
            self._live.add(worker)
            self._stats.started += 1
        return worker

    def _discard(self, worker: WorkerProcess) -> None:
        worker.dispose()
        with self._change:
            self._live.discard(worker)


class _Lane:
    """Jobs of one kind: so many at a time, in the order in which they came."""

    def __init__(self, width: int, name: str) -> None:
        self.slots = FifoCapacity(width)
        self.threads = ThreadPoolExecutor(width, thread_name_prefix=f"{name}-pool")


class _Job:
    """One request on its way through the pool.

    Attributes:
        fd: Descriptor of the encoded media, owned by the job.
        request: What to do.
        lane: Where the job waits.
        slot: The job's share of the lane.
        room: The job's share of the bytes in flight, once it asked for it.
        deadline: ``time.monotonic()`` value at which the job is stopped, once it runs.
        worker: Who works on it.
        cancelled: Nobody waits for the result any more.
    """

    def __init__(self, fd: int, request: DecodeRequest, lane: _Lane, slot: Share) -> None:
        self.fd = fd
        self.request = request
        self.lane = lane
        self.slot = slot
        self.room: Share | None = None
        self.deadline = 0.0
        self.worker: WorkerProcess | None = None
        self.cancelled = False


def _unpack(
    reply: wire.Probed | wire.Decoded, fds: list[int], request: DecodeRequest
) -> DecodeResult:
    """The result that a worker sent; closes the descriptors that came with it.

    Raises:
        MalformedMessageError: It is no answer to the request, or its arrays are not there.
    """
    try:
        wire.check_result(reply, request)
        if isinstance(reply, wire.Probed):
            return DecodeResult(info=reply.info, timings=reply.timings)
        left = iter(fds)
        frames = None if reply.frames is None else _adopt(next(left), reply.frames, np.uint8)
        audio = None if reply.samples is None else _adopt(next(left), (reply.samples,), np.float32)
    finally:
        _close(fds)
    return DecodeResult(
        info=reply.info,
        selection=reply.selection,
        frames=frames,
        audio=audio,
        audio_rate=reply.audio_rate,
        decoder=reply.decoder,
        timings=reply.timings,
    )


def _adopt(fd: int, shape: tuple[int, ...], dtype: type[T]) -> npt.NDArray[T]:
    try:
        return cast("npt.NDArray[T]", shared_array.adopt(fd, shape, dtype))
    except ValueError as error:
        raise MalformedMessageError(f"a worker sent memory that is not right: {error}") from error


def _close(fds: list[int]) -> None:
    for fd in fds:
        os.close(fd)
