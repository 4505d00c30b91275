"""How busy engines are, from their processes to the API servers, through shared memory.

One file per service, a record per engine. Only the engine writes its record and nobody waits: a
record that is read while it is written fails its checksum and counts as absent. The file goes with
the last engine that writes it.
"""

from __future__ import annotations

import mmap
import os
import struct
import tempfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, fields
from operator import attrgetter
from pathlib import Path

import psutil  # type: ignore[import-untyped]

from vllm_mm_ext.base import shared_file
from vllm_mm_ext.base.shared_file import open_shared, remove_if_unused

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


# ``dataclasses.astuple`` copies deeply, which is too slow for every step.
_figures = attrgetter(*(field.name for field in fields(EngineLoad)))


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
    shared_file.remove_abandoned(directory, f"{_PREFIX}{os.getuid()}-")


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
        # Zeros are empty records.
        self._descriptor = open_shared(path, _SIZE)
        try:
            self._view = mmap.mmap(self._descriptor, _SIZE)
        except BaseException:
            os.close(self._descriptor)
            raise

    def write(self, load: EngineLoad) -> None:
        """Publish the engine's newest figures."""
        body = _RECORD.pack(*_figures(load))
        record = body + _CRC.pack(_checksum(body))
        self._view[self._place : self._place + _STRIDE] = record

    def close(self) -> None:
        """The engine ends."""
        self._view[self._place : self._place + _STRIDE] = bytes(_STRIDE)
        self._view.close()
        remove_if_unused(self._path, self._descriptor)
        os.close(self._descriptor)


class LoadReader:
    """The records of a service's engines.

    Args:
        path: The service's file, which may not be there yet, or be another one later: of engines
            that were started after the first ones had ended.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        # What is mapped, and which file that is.
        self._mapped: tuple[mmap.mmap, os.stat_result] | None = None

    def loads(self, engines: int) -> Iterator[tuple[int, EngineLoad]]:
        """Newest figures of the first ``engines`` engines that publish any, by index."""
        view = self._current()
        if view is None:
            return
        for engine in range(min(engines, ENGINES)):
            raw = view[engine * _STRIDE : (engine + 1) * _STRIDE]
            body = raw[: _RECORD.size]
            if _CRC.unpack(raw[_RECORD.size :])[0] == _checksum(body):
                yield engine, EngineLoad(*_RECORD.unpack(body))

    def _current(self) -> mmap.mmap | None:
        try:
            there = self._path.stat()
            if self._mapped is None or not os.path.samestat(self._mapped[1], there):
                self._mapped = self._map()
        except (OSError, ValueError):
            # Not there, or not yet of its full size.
            self._mapped = None
        return self._mapped[0] if self._mapped is not None else None

    def _map(self) -> tuple[mmap.mmap, os.stat_result] | None:
        with open(self._path, "rb") as file:
            found = os.fstat(file.fileno())
            if found.st_uid != os.getuid():
                return None
            return mmap.mmap(file.fileno(), _SIZE, access=mmap.ACCESS_READ), found


def _checksum(body: bytes) -> int:
    # Inverted, so that a record of zeros does not pass.
    return zlib.crc32(body) ^ 0xFFFFFFFF
