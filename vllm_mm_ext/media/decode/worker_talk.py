"""What a decode pool and one of its workers say to each other about a job."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from typing import TypeVar, cast

import numpy as np
import numpy.typing as npt

from vllm_mm_ext.errors import InternalMediaError, no_room
from vllm_mm_ext.media.decode import shared_array, wire
from vllm_mm_ext.media.decode.wire_checks import MalformedMessageError, check_reservation
from vllm_mm_ext.media.decode.worker_process import WorkerProcess
from vllm_mm_ext.media.types import DecodeRequest, DecodeResult

logger = logging.getLogger("vllm.mm_ext")

T = TypeVar("T", np.uint8, np.float32)


class WorkerDiedError(Exception):
    """The worker ended in the middle of a job, or sent what no sound worker sends."""


def converse(
    worker: WorkerProcess,
    request: DecodeRequest,
    fd: int,
    deadline: float,
    sized: Callable[[int], None],
) -> DecodeResult:
    """Give a worker a job and take the result.

    Args:
        worker: An idle worker.
        request: The job.
        fd: Descriptor of the media.
        deadline: ``time.monotonic()`` value to give up at.
        sized: Called with the bytes that the worker is about to make, if it says so.

    Raises:
        TimeoutError: The deadline passed.
        WorkerDiedError: See there.
        InternalMediaError: The worker itself is at fault; the log says how.
        BusyError: The server is short of descriptors or memory for the result.
        MediaError: As ``run_job``.
    """
    try:
        wire.send(worker.sock, wire.Job(request), [fd], deadline)
        reply, fds = _reply(worker, request, deadline)
        if isinstance(reply, wire.Reserve):
            check_reservation(reply.num_bytes, request)
            sized(reply.num_bytes)
            reply, fds = _reply(worker, request, deadline)
        if isinstance(reply, wire.Probed | wire.Decoded):
            return _unpack(reply, fds, request)
        if isinstance(reply, wire.Reserve):
            raise MalformedMessageError("a worker reserved room twice")
    except TimeoutError:
        raise
    except (EOFError, OSError, MalformedMessageError) as error:
        why = str(error) if isinstance(error, MalformedMessageError) else ""
        raise WorkerDiedError(why or f"exit status {worker.wait()}") from error
    if isinstance(reply, wire.Failed):
        raise reply.error()
    logger.error("mm_ext: a decode worker failed: %s", reply.text)
    raise InternalMediaError


def _reply(
    worker: WorkerProcess, request: DecodeRequest, deadline: float
) -> tuple[wire.Reply, list[int]]:
    """The next message of a worker, with as many descriptors as belong to it."""
    most = wire.MAX_BYTES if request.probe_only else wire.MAX_RESULT_BYTES
    reply, fds = wire.receive(worker.sock, wire.decode_reply, deadline, most)
    if len(fds) != wire.num_arrays(reply):
        _close(fds)
        raise MalformedMessageError("a worker sent descriptors that belong to no array")
    return reply, fds


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
        audio_note=reply.audio_note,
        decoder_note=reply.decoder_note,
    )


def _adopt(fd: int, shape: tuple[int, ...], dtype: type[T]) -> npt.NDArray[T]:
    try:
        return cast("npt.NDArray[T]", shared_array.adopt(fd, shape, dtype))
    except MemoryError as error:
        raise no_room(str(error)) from None
    except ValueError as error:
        raise MalformedMessageError(f"a worker sent memory that is not right: {error}") from error


def _close(fds: list[int]) -> None:
    for fd in fds:
        os.close(fd)
