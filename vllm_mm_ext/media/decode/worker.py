"""A decode worker process: ``python -m vllm_mm_ext.media.decode.worker SOCKET_FD``.

It is started as a fresh interpreter, never forked or spawned from the server: neither torch
nor vLLM is loaded, and a crash of FFmpeg ends this process alone.

Messages, each a pickled object (see ``wire``):
    pool → worker  ``DecodeRequest`` with the media's descriptor
    worker → pool  ``Reserve`` before decoding; the pool answers ``True`` when there is room
    worker → pool  ``Done`` with the descriptors of the arrays, or a ``MediaError``
"""

from __future__ import annotations

import os
import resource
import select
import socket
import sys
import threading
import traceback
from dataclasses import replace

import numpy as np
import numpy.typing as npt

from vllm_mm_ext.errors import (
    InternalMediaError,
    MediaError,
    UnreadableMediaError,
    raising_package,
)
from vllm_mm_ext.media.decode import shared_array, wire
from vllm_mm_ext.media.decode.container import describe
from vllm_mm_ext.media.decode.job import run_job
from vllm_mm_ext.media.decode.wire import Done, Reserve, ShippedArray
from vllm_mm_ext.media.types import DecodeRequest

__all__ = ["main", "run_job"]

# The packages that decode.
_DECODERS = ("av", "decord")

# How often to look whether the parent still lives, should a fork of it keep the socket open.
_PARENT_CHECK_MS = 2000


class _SharedAllocator:
    """Allocates arrays in shared memory and remembers their descriptors."""

    def __init__(self) -> None:
        self._fds: dict[int, int] = {}  # address of the memory to descriptor

    def allocate(self, shape: tuple[int, ...], dtype: npt.DTypeLike) -> npt.NDArray[np.generic]:
        array, fd = shared_array.create(shape, dtype)
        self._fds[array.ctypes.data] = fd
        return array

    def fd_of(self, array: npt.NDArray[np.generic]) -> int:
        """Descriptor of the memory that ``array`` begins."""
        return self._fds[array.ctypes.data]

    def close(self) -> None:
        for fd in self._fds.values():
            os.close(fd)


def main(sock: socket.socket) -> None:
    """Serve jobs until the pool closes its end."""
    threading.Thread(target=_die_with_parent, args=(sock, os.getppid()), daemon=True).start()
    while True:
        try:
            request, (media,) = wire.receive(sock)
        except (EOFError, OSError):
            return
        try:
            _serve(sock, request, media)
        finally:
            os.close(media)


def _serve(sock: socket.socket, request: DecodeRequest, media: int) -> None:
    _, hard = resource.getrlimit(resource.RLIMIT_AS)
    ceiling = request.limits.memory_bytes
    resource.setrlimit(resource.RLIMIT_AS, (ceiling if hard < 0 else min(ceiling, hard), hard))
    memory = _SharedAllocator()

    def reserve(num_bytes: int) -> None:
        wire.send(sock, Reserve(num_bytes))
        wire.receive(sock)

    try:
        result = run_job(f"/proc/self/fd/{media}", request, memory.allocate, reserve)
        shipped, fds = [], []
        for array in (result.frames, result.audio):
            shipped.append(None if array is None else ShippedArray(array.shape, array.dtype.name))
            if array is not None:
                fds.append(memory.fd_of(array))
        result.frames = result.audio = None
        if not request.probe_only:
            # Per-packet tables grow with the file, not with what was asked for.
            result.info = replace(result.info, packets=None)
        if result.selection is not None:
            result.selection = replace(result.selection, profile=None)
        wire.send(sock, Done(result, *shipped), fds)
    except MediaError as error:
        wire.send(sock, error)
    except Exception as error:
        traceback.print_exc()
        wire.send(sock, _as_media_error(error))
    finally:
        memory.close()


def _as_media_error(error: Exception) -> MediaError:
    """A decoder that cannot cope with a file is the file's fault; an error of ours is not."""
    if raising_package(error, ("vllm_mm_ext", *_DECODERS)) in _DECODERS:
        return UnreadableMediaError(f"The media could not be decoded: {describe(error)}.")
    return InternalMediaError()


def _die_with_parent(sock: socket.socket, parent: int) -> None:
    """End the process, mid-decode too, when the pool is gone.

    Not ``PR_SET_PDEATHSIG``: that fires when the *thread* that started the worker ends.
    """
    poll = select.poll()
    poll.register(sock, select.POLLRDHUP)
    while not poll.poll(_PARENT_CHECK_MS) and os.getppid() == parent:
        pass
    os._exit(0)


if __name__ == "__main__":
    main(socket.socket(fileno=int(sys.argv[1])))
