"""A decode worker as its pool sees it: a process, and the pool's end of its socket."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
import threading
from collections.abc import Mapping
from pathlib import Path
from socket import socket, socketpair

from vllm_mm_ext.media.decode.decoders.nvdec_device import VISIBLE_DEVICES
from vllm_mm_ext.media.decode.gpu_seats import Seat
from vllm_mm_ext.media.decode.pool_queue import HeldFiles

logger = logging.getLogger("vllm.mm_ext")

# Seconds that a killed process has to end. One that waits in the kernel, as for a GPU whose driver
# hangs, does not end before the kernel lets it.
_END_S = 5.0
_PACKAGE_ROOT = str(Path(__file__).parents[3])
# What a worker gets of the server's environment: what programs and Python are found by, language,
# place of temporary files, and what sets the number of threads and the use of memory. Nothing else:
# a hostile file that takes a worker over must find no credentials there.
_PASSED = frozenset(
    {"PATH", "HOME", "LANG", "LANGUAGE", "TZ", "TMPDIR", "LD_LIBRARY_PATH", "LD_PRELOAD"}
)
# What decides which GPU a number names, and whether processes share it through a daemon.
_PASSED_WITH_GPU = frozenset({"CUDA_DEVICE_ORDER", "CUDA_MPS_PIPE_DIRECTORY"})
_PASSED_PREFIXES = ("LC_", "PYTHON", "OMP_", "GOMP_", "KMP_", "MKL_", "OPENBLAS_", "MALLOC_")
# Each malloc arena takes 64 MB of address space, which the memory limit counts. Freed pictures stay
# in the heap, until the worker trims it: the first touch of a new page costs some 2 us, 60 ms for
# the pictures of one job.
_MALLOC = {
    "MALLOC_ARENA_MAX": "2",
    "MALLOC_MMAP_THRESHOLD_": str(32 << 20),
    "MALLOC_TRIM_THRESHOLD_": str(1 << 30),
}


class WorkerProcess:
    """One worker process; making the object starts the process.

    Args:
        seat: The GPU that the worker may use; None for none.

    Attributes:
        sock: The pool's end of the socket, for ``wire``.
        seat: As given; given back when the worker is disposed of and its process has ended, or if
            the process cannot be started.
        files: The files that the worker keeps open; the pool's lock guards them.
        retired: The pool has ended the worker, which is not the fault of its job.

    Raises:
        OSError: The process cannot be started.
    """

    def __init__(self, seat: Seat | None = None) -> None:
        self.seat = seat
        self.files = HeldFiles()
        self.retired = False
        try:
            self.sock, self._process = self._started()
        except BaseException:
            if seat is not None:
                seat.release()
            raise

    def _started(self) -> tuple[socket, subprocess.Popen[bytes]]:
        ours, theirs = socketpair()
        try:
            with theirs:
                # -P: no modules from the directory the server happens to run in.
                module = [sys.executable, "-P", "-m", "vllm_mm_ext.media.decode.worker"]
                return ours, subprocess.Popen(
                    [*module, str(theirs.fileno())],
                    pass_fds=[theirs.fileno()],
                    stdin=subprocess.DEVNULL,
                    env=worker_environment(os.environ, self.seat.device if self.seat else None),
                )
        except BaseException:
            ours.close()
            raise

    @property
    def pid(self) -> int:
        """Id of the process."""
        return self._process.pid

    @property
    def alive(self) -> bool:
        """Whether the process has not ended."""
        return self._process.poll() is None

    def kill(self) -> None:
        """End the process; whoever waits for the worker sees the end of its socket."""
        self._process.kill()

    def wait(self) -> int | None:
        """End the process, unless it has ended; this takes a few seconds at most.

        Returns:
            The exit status; a signal is negative. None for a process that was killed and is still
            there.
        """
        self._process.kill()
        try:
            return self._process.wait(_END_S)
        except subprocess.TimeoutExpired:
            return None

    def dispose(self) -> None:
        """End the process and close the socket."""
        self.sock.close()
        if self.wait() is None:
            logger.error("mm_ext: decode worker %d was killed and does not end", self.pid)
            threading.Thread(target=self._reap, name="decode-reaper", daemon=True).start()
        else:
            self._reap()

    def _reap(self) -> None:
        """Wait for the end of the process, however long that takes, and give its seat back."""
        self._process.wait()
        if self.seat is not None:
            self.seat.release()


def worker_environment(server: Mapping[str, str], gpu: str | None = None) -> dict[str, str]:
    """The environment of a worker.

    Args:
        server: The environment of the server.
        gpu: The GPU that the worker may use, as ``CUDA_VISIBLE_DEVICES`` names it.
    """
    passed = {
        name: value
        for name, value in server.items()
        if name in _PASSED or name.startswith(_PASSED_PREFIXES)
    }
    if gpu is not None:
        passed |= {name: server[name] for name in _PASSED_WITH_GPU & server.keys()}
        passed[VISIBLE_DEVICES] = gpu
    paths = [_PACKAGE_ROOT, *filter(None, [server.get("PYTHONPATH")])]
    return {**passed, **_MALLOC, "PYTHONPATH": os.pathsep.join(paths)}
