"""A decode worker as its pool sees it: a process, and the pool's end of its socket."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from socket import socketpair

from vllm_mm_ext.media.decode.pool_queue import HeldFiles

_PACKAGE_ROOT = str(Path(__file__).parents[3])
# What a worker gets of the server's environment: what programs and Python are found by, language,
# place of temporary files, and what sets the number of threads and the use of memory. Nothing else:
# a hostile file that takes a worker over must find no credentials there.
_PASSED = frozenset(
    {"PATH", "HOME", "LANG", "LANGUAGE", "TZ", "TMPDIR", "LD_LIBRARY_PATH", "LD_PRELOAD"}
)
_PASSED_PREFIXES = ("LC_", "PYTHON", "OMP_", "GOMP_", "KMP_", "MKL_", "OPENBLAS_", "MALLOC_")


class WorkerProcess:
    """One worker process; making the object starts the process.

    Attributes:
        sock: The pool's end of the socket, for ``wire``.
        files: The files that the worker keeps open; the pool's lock guards them.
    """

    def __init__(self) -> None:
        self.sock, theirs = socketpair()
        self.files = HeldFiles()
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
                env=worker_environment(os.environ),
            )

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

    def wait(self) -> int:
        """End the process, unless it has ended.

        Returns:
            The exit status; a signal is negative.
        """
        self._process.kill()
        return self._process.wait()

    def dispose(self) -> None:
        """End the process and close the socket."""
        self.wait()
        self.sock.close()


def worker_environment(server: Mapping[str, str]) -> dict[str, str]:
    """The environment of a worker.

    Args:
        server: The environment of the server.
    """
    passed = {
        name: value
        for name, value in server.items()
        if name in _PASSED or name.startswith(_PASSED_PREFIXES)
    }
    paths = [_PACKAGE_ROOT, *filter(None, [server.get("PYTHONPATH")])]
    # Each malloc arena takes 64 MB of address space, which the memory limit counts.
    return {**passed, "PYTHONPATH": os.pathsep.join(paths), "MALLOC_ARENA_MAX": "2"}
