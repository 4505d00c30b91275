"""The shared state of one service: the load of its engines, its load tier, its sticky decisions.

``engine_figures`` has what else engines tell of themselves, in the same file.

A service is the processes of one start of vLLM: its API servers and its engines on this machine.
All of them map one file of records, each written whole with a checksum:

- Readers take no lock. A record that is being written, or that a killed writer left half written,
  fails its checksum and counts as absent.
- The load of an engine has one writer: the engine if it runs the plugin's scheduler, else whichever
  API server vLLM gives the engine's statistics. All other records have several writers, which
  exclude each other by a lock. The kernel drops the lock if its holder dies. A writer that waits
  too long (the holder was stopped) gives up: a lost load or decision is made again.
- The file loses its name as soon as all API servers have opened it. Engines open it earlier, since
  an API server waits for its engines before it needs the state. So no file is left when the
  processes end, however they end. The file of a service that fails to start is removed by the
  service's last process, or when the next service starts.
"""

from __future__ import annotations

import contextlib
import fcntl
import math
import mmap
import multiprocessing
import os
import struct
import tempfile
import threading
import time
import uuid
import weakref
from collections.abc import Iterator
from dataclasses import dataclass, fields
from operator import attrgetter
from pathlib import Path
from typing import NamedTuple

from vllm_mm_ext.base import shared_file
from vllm_mm_ext.base.engine_figures import BOARD_BYTES, ENGINES
from vllm_mm_ext.base.shared_file import open_shared, remove_if_unused
from vllm_mm_ext.base.shared_records import Region

KEY_BYTES = 16
DECISIONS = 1 << 15
# A key's decision is at one of this many consecutive places of the table. With half of the table in
# use, all 8 places are taken about once in 60 times; then a new decision replaces the one that was
# used the longest time ago.
_WAYS = 8

_PREFIX = "mm_ext-state-"
_LOCK_WAIT_S = 0.05
_LOCK_POLL_S = 0.001
_COUNT = struct.Struct("<I")
_LOAD = struct.Struct("<9d")
_STATE = struct.Struct("<iidd")
_DECISION = struct.Struct(f"<{KEY_BYTES}siQdd")
# ``struct flock`` of 64-bit Linux; a length of 0 means the whole file.
_FLOCK = struct.Struct("hhqqi4x")


@dataclass(frozen=True, slots=True)
class EngineLoad:
    """How busy an engine is at the end of a step.

    Attributes:
        time: Seconds on the system's monotonic clock, which all processes of a machine share.
        kv_usage: Share of the KV blocks that requests use, 0 to 1; blocks that are only cached
            count as free.
        running: Requests that hold one of vLLM's request slots.
        waiting: Requests that hold none.
        slots: Requests that can run at once.
        kv_pressure: As ``kv_usage``, but blocks that the plugin's block pool keeps for later
            requests count as used. This attribute and those below are None where the engine does
            not publish its load itself.
        backlog_tokens: Encoder outputs (tokens) that requests still need.
        backlog_s: Seconds of encoding for these, at this engine's measured price; 0 until there is
            one.
        itl_s: Inter-token latency: average seconds of steps in which some request decodes.
    """

    time: float
    kv_usage: float
    running: float
    waiting: float
    slots: float
    kv_pressure: float | None = None
    backlog_tokens: float | None = None
    backlog_s: float | None = None
    itl_s: float | None = None

    @property
    def by_engine(self) -> bool:
        """Whether the engine itself publishes this load."""
        return self.backlog_tokens is not None


# ``dataclasses.astuple`` copies deeply, which is too slow for every step.
_figures = attrgetter(*(field.name for field in fields(EngineLoad)))


@dataclass(frozen=True)
class TierState:
    """The load tier of a service.

    Attributes:
        level: Current tier; 0 is full quality.
        rest: Tier to which the service may come down at the last load observed.
        calm_since: Since when ``rest`` has been below ``level``, in seconds of the monotonic clock;
            infinite if it is not below.
        seen: Time of the last load observed, in seconds of the monotonic clock.
    """

    level: int = 0
    rest: int = 0
    calm_since: float = math.inf
    seen: float = -math.inf


class Decision(NamedTuple):
    """A sticky decision about a video.

    Attributes:
        level: Load tier at which the video is served.
        tokens: Prompt tokens granted to each use of the video; 0 for no grant.
        made: When the decision was made, in seconds.
        used: When the decision was last used, in seconds.
    """

    level: int
    tokens: int
    made: float
    used: float


_API_SERVERS = Region(_COUNT, 1, BOARD_BYTES)
_LOADS = Region(_LOAD, ENGINES, _API_SERVERS.end)
_TIER = Region(_STATE, 1, _LOADS.end)
_TABLE = Region(_DECISION, DECISIONS, _TIER.end)
SIZE = _TABLE.end


class SharedState:
    """The shared state of one service, mapped into this process.

    ``open_state``, ``join_state`` and ``private_state`` make it.

    Args:
        descriptor: The open file, which ``close`` closes, or the end of the last reference to the
            state.
        path: Path of the file; None if the file has no name.

    Raises:
        OSError: The file cannot be mapped.
    """

    def __init__(self, descriptor: int, path: Path | None = None) -> None:
        self.path = path
        self._thread_lock = threading.Lock()
        self._descriptor = descriptor
        self._view = mmap.mmap(descriptor, SIZE)
        self._finalizer = weakref.finalize(self, _close, self._view, descriptor, path)

    @property
    def view(self) -> mmap.mmap:
        """The mapped file."""
        return self._view

    def close(self) -> None:
        """Unmap the file, and remove it if no process uses it. The state cannot be used again."""
        self._finalizer()

    @contextlib.contextmanager
    def writing(self) -> Iterator[bool]:
        """Hold the writers' lock; yields False, without the lock, if another writer keeps it."""
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
        # A lock of the open file description: other than a lock of the process, it is not dropped
        # when another descriptor of the same file is closed.
        fcntl.fcntl(self._descriptor, fcntl.F_OFD_SETLK, _FLOCK.pack(kind, os.SEEK_SET, 0, 0, 0))

    def count_api_server(self) -> int:
        """Count one more API server that has opened the state; returns how many have so far."""
        with self.writing() as held:
            values = _API_SERVERS.read(self._view, 0)
            count = 1 if values is None else int(values[0]) + 1  # type: ignore[call-overload]
            if held:
                _API_SERVERS.write(self._view, 0, count)
            return count

    # --- load -------------------------------------------------------------------------------------

    def write_load(self, engine: int, load: EngineLoad) -> None:
        """Publish an engine's newest load.

        An engine writes without the lock, since no one else writes its record; API servers call
        this within ``writing``, and only for engines that do not publish their load themselves.

        Args:
            engine: Index of the engine; engines from index ``ENGINES`` on are ignored.
            load: How busy the engine is.
        """
        if engine < ENGINES:
            values = [math.nan if value is None else value for value in _figures(load)]
            _LOADS.write(self._view, engine, *values)

    def clear_load(self, engine: int) -> None:
        """Note that an engine has ended."""
        if engine < ENGINES:
            _LOADS.clear(self._view, engine)

    def load(self, engine: int) -> EngineLoad | None:
        """The newest load of an engine; None if none was published."""
        values = _LOADS.read(self._view, engine) if engine < ENGINES else None
        if values is None:
            return None
        return EngineLoad(*(None if math.isnan(value) else value for value in values))  # type: ignore[arg-type]

    def loads(self, engines: int) -> dict[int, EngineLoad]:
        """The newest loads of the first ``engines`` engines that have any, by index."""
        found = ((engine, self.load(engine)) for engine in range(min(engines, ENGINES)))
        return {engine: load for engine, load in found if load is not None}

    def write_tier(self, state: TierState) -> None:
        """Write the service's tier; to be called within ``writing``."""
        _TIER.write(self._view, 0, state.level, state.rest, state.calm_since, state.seen)

    def tier(self) -> TierState:
        """The service's tier as of the last load observed."""
        values = _TIER.read(self._view, 0)
        return TierState() if values is None else TierState(*values)  # type: ignore[arg-type]

    # --- decisions --------------------------------------------------------------------------------

    def find(self, key: bytes) -> Decision | None:
        """The decision kept for a key of ``KEY_BYTES`` bytes, however old; None if none is."""
        for place in _places(key):
            values = _TABLE.read(self._view, place)
            if values is not None and values[0] == key:
                return Decision(*values[1:])  # type: ignore[arg-type]
        return None

    def keep(self, key: bytes, decision: Decision) -> None:
        """Keep a decision; it replaces the key's earlier one, or one that is long unused."""
        with self.writing() as held:
            if held:
                _TABLE.write(self._view, self._place_for(key), key, *decision)

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


def _close(view: mmap.mmap, descriptor: int, path: Path | None) -> None:
    view.close()
    if path is not None:
        remove_if_unused(path, descriptor)
    os.close(descriptor)


# --- which file, and its life ---------------------------------------------------------------------


def service_name(api_servers: int, api_server: int) -> str:
    """A name that all processes of this service compute alike, and no other service has.

    Args:
        api_servers: Number of API servers of the service. A single one makes a random name, which
            its engines get with its configuration. Of several, each makes a configuration of its
            own, so they use the name of the process that started them.
        api_server: Index of this API server; -1 for the process that starts them all.
    """
    if api_servers == 1:
        return uuid.uuid4().hex
    parent = multiprocessing.parent_process()
    main = parent.pid if parent is not None and api_server >= 0 else os.getpid()
    # The start makes a difference to an earlier service whose main process had the same id. It is
    # counted in ticks since the machine started, which no step of the clock changes.
    # Behind the name of the program, which may hold anything.
    fields = Path(f"/proc/{main}/stat").read_text(errors="replace").rpartition(")")[2].split()
    return f"{main}-{fields[19]}"


def file_name(service: str) -> str:
    """File name of the shared state of a service of this user."""
    return f"{_PREFIX}{os.getuid()}-{service}"


def open_state(service: str, directories: list[Path] | None = None) -> SharedState:
    """Open the shared state of a service, or create it if this is the service's first process.

    Args:
        service: Name of the service.
        directories: Directories for the file, best first; by default one in memory, then one on
            disk.

    Raises:
        OSError: The file can be created in none of the directories.
    """
    failures = []
    for directory in directories or _directories():
        remove_abandoned(directory)
        path = directory / file_name(service)
        try:
            # Zeros are empty records.
            descriptor = open_shared(path, SIZE)
            try:
                return SharedState(descriptor, path)
            except BaseException:
                os.close(descriptor)
                raise
        except OSError as error:
            failures.append(f"{directory}: {error}")
    raise OSError(f"no file for what a service shares ({'; '.join(failures)})")


def join_state(
    service: str, api_servers: int, directories: list[Path] | None = None
) -> SharedState:
    """As ``open_state``, for an API server; the last API server to join removes the file's name.

    Args:
        service: Name of the service.
        api_servers: Number of API servers of the service.
        directories: As for ``open_state``.

    Raises:
        OSError: See ``open_state``.
    """
    state = open_state(service, directories)
    if state.count_api_server() >= api_servers and state.path is not None:
        state.path.unlink(missing_ok=True)
    return state


def private_state() -> SharedState:
    """A state that this process shares with no other process."""
    descriptor = os.memfd_create("mm_ext-state", os.MFD_CLOEXEC)
    os.ftruncate(descriptor, SIZE)
    return SharedState(descriptor)


def remove_abandoned(directory: Path) -> None:
    """Remove the files of this user's services that were killed."""
    shared_file.remove_abandoned(directory, f"{_PREFIX}{os.getuid()}-")


def _directories() -> list[Path]:
    memory = Path("/dev/shm")
    usable = memory.is_dir() and os.access(memory, os.W_OK)
    return [*([memory] if usable else []), Path(tempfile.gettempdir())]
