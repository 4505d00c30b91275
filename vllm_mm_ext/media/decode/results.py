"""Results as workers send them: messages, and descriptors of shared memory."""

from __future__ import annotations

import os
from typing import TypeVar, cast

import numpy as np
import numpy.typing as npt

from vllm_mm_ext.media.decode import shared_array, wire
from vllm_mm_ext.media.decode.wire_checks import MalformedMessageError
from vllm_mm_ext.media.types import DecodeRequest, DecodeResult

T = TypeVar("T", np.uint8, np.float32)


def unpack(
    reply: wire.Probed | wire.Decoded, fds: list[int], request: DecodeRequest
) -> DecodeResult:
    """The result that a worker sent; closes the descriptors that came with it.

    Args:
        reply: What the worker said.
        fds: One for each array of the reply.
        request: What was asked of the worker.

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
        close_all(fds)
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
    except ValueError as error:
        raise MalformedMessageError(f"a worker sent memory that is not right: {error}") from error


def close_all(fds: list[int]) -> None:
    """Close descriptors."""
    for fd in fds:
        os.close(fd)
