"""How busy engines are, from their processes to the API servers, through shared memory.

One file per service, a record per engine. Only the engine writes its record and nobody waits: a
record that is read while it is written fails its checksum and counts as absent.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import struct
import tempfile
import zlib
from collections.abc import Iterator
from dataclasses import astuple, dataclass
from pathlib import Path

import psutil  # type: ignore[import-untyped]

ENGINES = 256
_PREFIX = "mm_ext-load-"
_RECORD = struct.Struct("<9d")
_CRC = struct.Struct("<I")
_STRIDE = _RECORD.size + _CRC.size
_SIZE = ENGINES * _STRIDE


@dataclass(frozen=True, slots=True)
class EngineLoad:
    """One engine at the end of a step.

    Attributes:
        time: Seconds on the system's monotonic clock, which all processes of a machine share.
        kv_usage: Share of KV blocks that requests use, 0 to 1.
        kv_pressure: The same with blocks that are kept for later requests, where the block pool
            tells; else like ``kv_usage``.
        running: Requests that hold a slot.
        waiting: Requests that do not.
        slots: Requests that can run at once.
        backlog_tokens: Encoder outputs that requests still need.
        backlog_s: Seconds that takes, at what encoding costs here; 0 before that is known.
        itl_s: Average seconds of steps in which something decoded.
    """

    time: float
    kv_usage: float
    kv_pressure: float
    running: float
    waiting: float
    slots: float
    backlog_tokens: float
    backlog_s: float
    itl_s: float


def load_file(pid: int) -> Path:
    """The file of the service that a process started.

    Args:
        pid: The process that started its engines.
    """
    # The start time tells the service from an earlier one whose main process had the same id.
    started = psutil.Process(pid).create_time()
    memory = Path("/dev/shm")
    directory = memory if os.access(memory, os.W_OK) else Path(tempfile.gettempdir())
    return directory / f"{_PREFIX}{os.getuid()}-{pid}-{started:.2f}"


def remove_abandoned(directory: Path) -> None:
    """Remove what this user's services left that were killed."""
    for path in directory.glob(f"{_PREFIX}{os.getuid()}-*"):
        _, pid, started = path.name.removeprefix(_PREFIX).split("-")
        with contextlib.suppress(psutil.NoSuchProcess):
            if f"{psutil.Process(int(pid)).create_time():.2f}" == started:
                continue
        path.unlink(missing_ok=True)


class LoadWriter:
    """An engine's record.

    Args:
        path: The service's file, made if it is not there; only this user can read it.
        engine: Index of the engine.

    Raises:
        OSError: It cannot be made or mapped.
    """

    def __init__(self, path: Path, engine: int) -> None:
        self._path = path
        self._place = engine % ENGINES * _STRIDE
        flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW
        descriptor = os.open(path, flags, 0o600)
        try:
            if os.fstat(descriptor).st_uid != os.getuid():
                raise PermissionError(f"{path} belongs to another user")
            # Zeros are empty records. A full file system is an error here, not a SIGBUS later.
            os.posix_fallocate(descriptor, 0, _SIZE)
            self._view = mmap.mmap(descriptor, _SIZE)
        finally:
            os.close(descriptor)

    def write(self, load: EngineLoad) -> None:
        """Publish the engine's newest figures."""
        body = _RECORD.pack(*astuple(load))
        record = body + _CRC.pack(_checksum(body))
        self._view[self._place : self._place + _STRIDE] = record

    def close(self) -> None:
        """The engine ends. Readers keep what they have mapped, whose records grow old."""
        self._path.unlink(missing_ok=True)
        self._view.close()


class LoadReader:
    """The records of a service's engines.

    Args:
        path: The service's file, which may not be there yet.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._view: mmap.mmap | None = None

    def loads(self, engines: int) -> Iterator[tuple[int, EngineLoad]]:
        """Newest figures of the first ``engines`` engines that publish any, by index."""
        view = self._view or self._open()
        if view is None:
            return
        for engine in range(min(engines, ENGINES)):
            raw = view[engine * _STRIDE : (engine + 1) * _STRIDE]
            body = raw[: _RECORD.size]
            if _CRC.unpack(raw[_RECORD.size :])[0] == _checksum(body):
                yield engine, EngineLoad(*_RECORD.unpack(body))

    def _open(self) -> mmap.mmap | None:
        try:
            with open(self._path, "rb") as file:
                if os.fstat(file.fileno()).st_uid != os.getuid():
                    return None
                self._view = mmap.mmap(file.fileno(), _SIZE, access=mmap.ACCESS_READ)
        except (OSError, ValueError):
            # Not there yet, or not yet of its full size.
            return None
        return self._view


def _checksum(body: bytes) -> int:
    # Inverted, so that a record of zeros does not pass.
    return zlib.crc32(body) ^ 0xFFFFFFFF
