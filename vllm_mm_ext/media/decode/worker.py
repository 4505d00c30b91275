"""A decode worker process: ``python -m vllm_mm_ext.media.decode.worker SOCKET_FD``.

The decode pool starts a worker as a fresh interpreter, never by a fork of the server: a worker
loads neither torch nor vLLM, and a crash of FFmpeg ends the worker alone. A worker does one job at
a time:

    pool → worker  ``Job`` with the descriptor of the media
    worker → pool  ``Reserve`` before it decodes
    worker → pool  ``Probed``, or ``Decoded`` with the descriptors of the arrays; ``Failed`` if the
                   media cannot be served, ``Broken`` if the worker itself is at fault

The messages are those of ``wire``.
"""

from __future__ import annotations

import os
import resource
import select
import socket
import sys
import threading
import time
import traceback
from dataclasses import replace
from pathlib import Path

import av
import numpy as np
import numpy.typing as npt

from vllm_mm_ext.base.heap import PERIOD_S, trim_when_due
from vllm_mm_ext.errors import (
    MediaError,
    MediaTooLargeError,
    UnreadableMediaError,
    by_decoder,
)
from vllm_mm_ext.media.decode import shared_array, wire
from vllm_mm_ext.media.decode.container import describe
from vllm_mm_ext.media.decode.decoders import nvdec_device
from vllm_mm_ext.media.decode.job import run_job
from vllm_mm_ext.media.decode.open_files import KEEP_S, OpenFiles
from vllm_mm_ext.media.types import DecodeRequest, DecodeResult

# The share of its memory limit from which on a worker keeps no files open.
_CROWDED = 0.7
# How often to look whether the parent still lives, should a fork of it keep the socket open.
_PARENT_CHECK_MS = 2000


class _SharedAllocator:
    """Allocates arrays in shared memory and remembers the descriptors of the memory."""

    def __init__(self) -> None:
        self._fds: dict[int, int] = {}  # address of the memory to descriptor

    def allocate(self, shape: tuple[int, ...], dtype: npt.DTypeLike) -> npt.NDArray[np.generic]:
        """As ``shared_array.create``; this object owns the descriptor."""
        array, fd = shared_array.create(shape, dtype)
        address = array.ctypes.data
        if address in self._fds:
            # Of an array that is gone: the job began again.
            os.close(self._fds[address])
        self._fds[address] = fd
        return array

    def fd_of(self, array: npt.NDArray[np.generic]) -> int:
        """Descriptor of the memory that ``array`` begins."""
        return self._fds[array.ctypes.data]

    def close(self) -> None:
        """Close all descriptors."""
        for fd in self._fds.values():
            os.close(fd)


def main(sock: socket.socket) -> None:
    """Do jobs until the pool closes its end of the socket."""
    nvdec_device.expendable = True
    threading.Thread(target=_die_with_parent, args=(sock, os.getppid()), daemon=True).start()
    files = OpenFiles()
    while True:
        if not _waits(sock, PERIOD_S):
            trim_when_due()
            if len(files) and not _waits(sock, KEEP_S - PERIOD_S):
                files.close()
                trim_when_due()
        try:
            job, (media,) = wire.receive(sock, wire.decode_job)
        except (EOFError, OSError):
            return
        try:
            _serve(sock, job.request, media, files)
        finally:
            os.close(media)
        taken = _address_space() - nvdec_device.address_space()
        if taken > _CROWDED * job.request.limits.memory_bytes:
            files.close()
        files.close_unused(job.request, time.monotonic())
        # Probes and decodes leave tens of megabytes behind, more for longer files.
        trim_when_due()


def _waits(sock: socket.socket, seconds: float) -> bool:
    """Whether something can be read from a socket within so many seconds."""
    poll = select.poll()
    poll.register(sock, select.POLLIN)
    return bool(poll.poll(1e3 * seconds))


def _address_space() -> int:
    """Bytes of address space of this process, which its memory limit counts."""
    pages, _, _ = Path("/proc/self/statm").read_text().partition(" ")
    return int(pages) * resource.getpagesize()


def _serve(sock: socket.socket, request: DecodeRequest, media: int, files: OpenFiles) -> None:
    """Do one job and send the answer."""
    _, hard = resource.getrlimit(resource.RLIMIT_AS)
    limit = request.limits.memory_bytes
    ceiling = limit + nvdec_device.address_space()
    resource.setrlimit(resource.RLIMIT_AS, (ceiling if hard < 0 else min(ceiling, hard), hard))
    memory = _SharedAllocator()

    def reserve(num_bytes: int) -> None:
        wire.send(sock, wire.Reserve(num_bytes))

    try:
        kept = files.of(request, media)
        path = f"/proc/self/fd/{media}" if kept is None else kept.path
        try:
            result = run_job(path, request, memory.allocate, reserve, kept)
        except BaseException:
            files.drop(request)
            raise
        _answer(sock, request, result, memory)
    except MediaError as error:
        wire.send(sock, wire.Failed.of(error))
    except MemoryError as error:
        # Also of FFmpeg, whose MemoryError is an error of both kinds.
        too_large = MediaTooLargeError(
            f"Decoding the media needs more memory than the limit of {limit} bytes."
        )
        too_large.__cause__ = error
        wire.send(sock, wire.Failed.of(too_large))
    except av.FFmpegError as error:
        unreadable = UnreadableMediaError(f"The media could not be decoded: {describe(error)}.")
        wire.send(sock, wire.Failed.of(unreadable))
    except Exception as error:
        traceback.print_exc()
        wire.send(sock, _as_reply(error))
    finally:
        memory.close()


def _as_reply(error: Exception) -> wire.Failed | wire.Broken:
    """A decoder that cannot cope with a file is the file's fault; an error of ours is not."""
    if by_decoder(error):
        why = f"The media could not be decoded: {describe(error)}."
        return wire.Failed.of(UnreadableMediaError(why))
    return wire.Broken(f"{type(error).__name__}: {error}"[:1000])


def _answer(
    sock: socket.socket, request: DecodeRequest, result: DecodeResult, memory: _SharedAllocator
) -> None:
    """Send a result; its arrays lie in ``memory``."""
    if request.probe_only:
        wire.send(sock, wire.Probed(result.info, result.timings))
        return
    frames, audio, selection = result.frames, result.audio, result.selection
    if selection is not None and selection.profile is not None:
        selection = replace(selection, profile=None, activity=selection.profile.mean())
    message = wire.Decoded(
        # What grows with the file and not with the request stays here.
        info=replace(result.info, packets=None),
        selection=selection,
        frames=None if frames is None else frames.shape,
        samples=None if audio is None else len(audio),
        audio_rate=result.audio_rate,
        decoder=result.decoder,
        timings=result.timings,
        audio_note=result.audio_note,
        decoder_note=result.decoder_note,
    )
    arrays = [array for array in (frames, audio) if array is not None]
    wire.send(sock, message, [memory.fd_of(array) for array in arrays])


def _die_with_parent(sock: socket.socket, parent: int) -> None:
    """End this process, in the middle of a job too, when the pool's process is gone.

    ``PR_SET_PDEATHSIG`` would not do: the kernel sends that signal already when the *thread* ends
    that started the worker.
    """
    poll = select.poll()
    poll.register(sock, select.POLLRDHUP)
    while not poll.poll(_PARENT_CHECK_MS) and os.getppid() == parent:
        pass
    os._exit(0)


if __name__ == "__main__":
    main(socket.socket(fileno=int(sys.argv[1])))
