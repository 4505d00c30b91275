"""A thread in place of a decode worker process, for what no real worker does on demand."""

from __future__ import annotations

import os
import socket
import threading

from vllm_mm_ext.media.decode import wire
from vllm_mm_ext.media.decode.pool_queue import HeldFiles
from vllm_mm_ext.media.types import DecodeRequest


class FakeWorker:
    """Stands in for ``WorkerProcess``; ``talk`` says what the worker does with a job."""

    def __init__(self, seat: object = None) -> None:
        self.seat = seat
        self.sock, self._theirs = socket.socketpair()
        self.pid = id(self)
        self.files = HeldFiles()
        self.alive = True
        self.retired = False
        self._thread = threading.Thread(target=self._work, daemon=True)
        self._thread.start()

    def talk(self, sock: socket.socket, request: DecodeRequest) -> None:
        """Answer a job on the worker's end of the socket."""
        raise NotImplementedError

    def _work(self) -> None:
        with self._theirs:
            try:
                while True:
                    job, (media,) = wire.receive(self._theirs, wire.decode_job)
                    os.close(media)
                    self.talk(self._theirs, job.request)
            except (EOFError, OSError, ValueError):
                return

    def kill(self) -> None:
        """End the conversation."""
        self.sock.shutdown(socket.SHUT_RDWR)

    def wait(self) -> int:
        """As of a process that was killed."""
        return -9

    def dispose(self) -> None:
        """End the thread."""
        self.kill()
        self._thread.join()
        self.sock.close()
