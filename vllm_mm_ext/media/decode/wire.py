"""Messages between a decode pool and its workers: a pickled object and file descriptors."""

from __future__ import annotations

import os
import pickle
import socket
import struct
import time
from collections.abc import Sequence
from typing import Any, NamedTuple

from vllm_mm_ext.media.types import DecodeResult

_HEADER = struct.Struct("<QB")
_MAX_FDS = 4


class Reserve(NamedTuple):
    """The job wants to produce this many bytes."""

    num_bytes: int


class ShippedArray(NamedTuple):
    """An array in the descriptor that travels at this place; shape and dtype name."""

    shape: tuple[int, ...]
    dtype: str


class Done(NamedTuple):
    """The job's result without its arrays, which follow in descriptors in this order."""

    result: DecodeResult
    frames: ShippedArray | None
    audio: ShippedArray | None


def send(sock: socket.socket, message: Any, fds: Sequence[int] = ()) -> None:
    """Send ``message``; the receiver gets duplicates of ``fds`` (at most 4)."""
    payload = pickle.dumps(message, protocol=pickle.HIGHEST_PROTOCOL)
    sock.settimeout(None)
    socket.send_fds(sock, [_HEADER.pack(len(payload), len(fds))], list(fds))
    sock.sendall(payload)


def receive(sock: socket.socket, deadline: float | None = None) -> tuple[Any, list[int]]:
    """Next message and its descriptors, which the caller must close.

    Args:
        sock: Stream socket.
        deadline: ``time.monotonic()`` value to give up at.

    Raises:
        EOFError: The other side is gone.
        TimeoutError: The deadline passed.
    """
    _arm(sock, deadline)
    header, fds, _, _ = socket.recv_fds(sock, _HEADER.size, _MAX_FDS)
    try:
        while len(header) < _HEADER.size:
            header += _some(sock, _HEADER.size - len(header), deadline)
        length, _ = _HEADER.unpack(header)
        payload = bytearray(length)
        view, got = memoryview(payload), 0
        while got < length:
            _arm(sock, deadline)
            count = sock.recv_into(view[got:])
            if not count:
                raise EOFError
            got += count
        return pickle.loads(payload), fds
    except BaseException:
        for fd in fds:
            os.close(fd)
        raise


def _some(sock: socket.socket, count: int, deadline: float | None) -> bytes:
    _arm(sock, deadline)
    data = sock.recv(count)
    if not data:
        raise EOFError
    return data


def _arm(sock: socket.socket, deadline: float | None) -> None:
    if deadline is None:
        sock.settimeout(None)
        return
    left = deadline - time.monotonic()
    if left <= 0:
        raise TimeoutError
    sock.settimeout(left)
