"""What the API servers of one service share: the load of its engines, and standing decisions.

One file, mapped by every process. Its records are written whole, each with a checksum:

- Readers take no lock. A record that is being written, or that a killed writer left half written,
  fails its checksum and counts as absent.
- Writers exclude each other by a lock that the kernel drops with its holder. A writer that waits
  too long (its holder was stopped) gives up: a lost sample or decision is made again.
- The file loses its name as soon as all processes of the service have it. So nothing is left when
  they end, however that happens. What a service leaves that failed to start is removed when the
  next one does.
"""

from __future__ import annotations

import contextlib
import fcntl
import mmap
import os
import struct
import tempfile
import threading
import time
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from vllm_mm_ext.base import shared_file
from vllm_mm_ext.base.shared_file import open_shared
from vllm_mm_ext.policies.quality.tiers import LoadSample, TierState

KEY_BYTES = 16
ENGINES = 256
DECISIONS = 1 << 15
# Places a key may be at, in one stretch. With half the table in use a stretch of 8 is full about
# once in 60 times, and then its oldest decision makes way.
_WAYS = 8

_PREFIX = "mm_ext-board-"
_LOCK_WAIT_S = 0.05
_LOCK_POLL_S = 0.001
_CRC = struct.Struct("<I")
_COUNT = struct.Struct("<I")
_SAMPLE = struct.Struct("<6d")
_STATE = struct.Struct("<iidd")
_DECISION = struct.Struct(f"<{KEY_BYTES}si?Qdd")
# struct flock of 64-bit Linux; len 0 is the whole file.
_FLOCK = struct.Struct("hhqqi4x")


@dataclass(frozen=True)
class Decision:
    """What was decided for a video.

    Attributes:
        level: Load tier.
        lowered: Something is lower than asked.
        tokens: Prompt tokens granted to each use of it, 0 where they were not counted.
        made: When it was decided, in seconds.
        used: When it was last used.
    """

    level: int
    lowered: bool
    tokens: int
    made: float
    used: float


class _Region:
    """Consecutive records of one layout, each followed by its checksum; all zero is empty."""

    def __init__(self, layout: struct.Struct, count: int, start: int) -> None:
        self._layout = layout
        self._stride = layout.size + _CRC.size
        self._start = start
        self.end = start + count * self._stride

    def read(self, view: mmap.mmap, place: int) -> tuple[object, ...] | None:
        """The record's values; None if it is empty or torn."""
        begin = self._start + place * self._stride
        raw = view[begin : begin + self._stride]
        body, checksum = raw[: self._layout.size], raw[self._layout.size :]
        if _CRC.unpack(checksum)[0] != _checksum(body):
            return None
        return self._layout.unpack(body)

    def write(self, view: mmap.mmap, place: int, *values: object) -> None:
        body = self._layout.pack(*values)
        begin = self._start + place * self._stride
        view[begin : begin + self._stride] = body + _CRC.pack(_checksum(body))


def _checksum(body: bytes) -> int:
    # Inverted, so that a record of zeros does not pass.
    return zlib.crc32(body) ^ 0xFFFFFFFF


_JOINED = _Region(_COUNT, 1, 0)
_ENGINES = _Region(_SAMPLE, ENGINES, _JOINED.end)
_TIER = _Region(_STATE, 1, _ENGINES.end)
_TABLE = _Region(_DECISION, DECISIONS, _TIER.end)


class Board:
    """One service's shared file, as ``join`` opens it.

    Args:
        descriptor: The open file, which the board closes.

    Raises:
        OSError: It cannot be mapped.
    """

    def __init__(self, descriptor: int) -> None:
        self._thread_lock = threading.Lock()
        self._descriptor = descriptor
        self._view = mmap.mmap(descriptor, _TABLE.end)

    def close(self) -> None:
        """Leave the board, which must not be used any more."""
        self._view.close()
        os.close(self._descriptor)

    @contextlib.contextmanager
    def writing(self) -> Iterator[bool]:
        """Hold the writers' lock; yields False if another writer keeps it too long."""
        with self._thread_lock:
            held = self._lock()
            try:
                yield held
            finally:
                if held:
                    self._set_lock(fcntl.F_UNLCK)

    def _lock(self) -> bool:
        deadline = time.monotonic() + _LOCK_WAIT_S
        while True:
            try:
                self._set_lock(fcntl.F_WRLCK)
            except BlockingIOError:
                if time.monotonic() >= deadline:
                    return False
                time.sleep(_LOCK_POLL_S)
            else:
                return True

    def _set_lock(self, kind: int) -> None:
        # Of the open file description: unlike a process's own locks it does not end when another
        # descriptor of the file is closed.
        fcntl.fcntl(self._descriptor, fcntl.F_OFD_SETLK, _FLOCK.pack(kind, os.SEEK_SET, 0, 0, 0))

    def count_user(self) -> int:
        """Count one more process that uses the board, and return how many do so far."""
        with self.writing() as held:
            values = _JOINED.read(self._view, 0)
            count = 1 if values is None else int(values[0]) + 1  # type: ignore[call-overload]
            if held:
                _JOINED.write(self._view, 0, count)
            return count

    # --- load -------------------------------------------------------------------------------------

    def write_sample(self, engine: int, sample: LoadSample) -> None:
        """Keep an engine's newest sample (call within ``writing``)."""
        values = (
            sample.kv_usage,
            sample.running,
            sample.waiting,
            sample.capacity,
            sample.time,
            sample.backlog_s,
        )
        _ENGINES.write(self._view, engine % ENGINES, *values)

    def samples(self, engines: range) -> list[LoadSample]:
        """The newest sample of each engine that sent one."""
        found = (_ENGINES.read(self._view, engine % ENGINES) for engine in engines)
        return [LoadSample(*values) for values in found if values is not None]  # type: ignore[arg-type]

    def write_tier(self, state: TierState) -> None:
        """Keep the service's tier (call within ``writing``)."""
        _TIER.write(self._view, 0, state.level, state.rest, state.calm_since, state.seen)

    def tier(self) -> TierState:
        """The service's tier as of its last sample."""
        values = _TIER.read(self._view, 0)
        return TierState() if values is None else TierState(*values)  # type: ignore[arg-type]

    # --- decisions --------------------------------------------------------------------------------

    def find(self, key: bytes) -> Decision | None:
        """The decision kept for a key of ``KEY_BYTES``, however old."""
        for place in _places(key):
            values = _TABLE.read(self._view, place)
            if values is not None and values[0] == key:
                return Decision(*values[1:])  # type: ignore[arg-type]
        return None

    def keep(self, key: bytes, decision: Decision) -> None:
        """Keep a decision, in place of the key's earlier one or of the one longest unused."""
        with self.writing() as held:
            if not held:
                return
            place = self._place_for(key)
            values = (decision.level, decision.lowered, decision.tokens)
            _TABLE.write(self._view, place, key, *values, decision.made, decision.used)

    def _place_for(self, key: bytes) -> int:
        oldest, oldest_used = -1, float("inf")
        for place in _places(key):
            values = _TABLE.read(self._view, place)
            if values is not None and values[0] == key:
                return place
            used = float("-inf") if values is None else values[-1]
            if used < oldest_used:  # type: ignore[operator]
                oldest, oldest_used = place, used  # type: ignore[assignment]
        return oldest


def _places(key: bytes) -> list[int]:
    first = int.from_bytes(key[:8], "little")
    return [(first + step) % DECISIONS for step in range(_WAYS)]


# --- the file's life ------------------------------------------------------------------------------


def directories() -> list[Path]:
    """Where boards can be, best first: in memory if the system has a place for that."""
    memory = Path("/dev/shm")
    usable = memory.is_dir() and os.access(memory, os.W_OK)
    return [*([memory] if usable else []), Path(tempfile.gettempdir())]


def file_name(service: str) -> str:
    """Name of a service's board.

    Args:
        service: Text that all processes of the service, and no other service, agree on.
    """
    return f"{_PREFIX}{os.getuid()}-{service}"


def join(path: Path, users: int) -> Board:
    """Open the board of a service, or make it if this is the first process to ask.

    Args:
        path: Where the service has it; only this user can read it.
        users: Processes of the service. The last of them to join removes the name.

    Raises:
        OSError: It cannot be made or mapped.
    """
    # Zeros are empty records.
    descriptor = open_shared(path, _TABLE.end)
    try:
        board = Board(descriptor)
    except BaseException:
        os.close(descriptor)
        raise
    if board.count_user() >= users:
        path.unlink(missing_ok=True)
    return board


def private() -> Board:
    """A board for this process alone."""
    descriptor = os.memfd_create("mm_ext-board", os.MFD_CLOEXEC)
    os.ftruncate(descriptor, _TABLE.end)
    return Board(descriptor)


def remove_abandoned(directory: Path) -> None:
    """Remove the boards of this user's services that ended before all their processes had one."""
    shared_file.remove_abandoned(directory, f"{_PREFIX}{os.getuid()}-")
