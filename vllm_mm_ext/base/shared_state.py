"""What the processes of one service share: the load of its engines, its load tier, its decisions.

A service is what one start of vLLM makes: its API servers and its engines on this machine. All of
them map one file. Its records are written whole, each with a checksum:

- Readers take no lock. A record that is being written, or that a killed writer left half written,
  fails its checksum and counts as absent.
- An engine's record has one writer: the engine, if it runs the plugin's scheduler, else whichever
  API server vLLM gives the engine's statistics. All other records have several writers, which
  exclude each other by a lock that the kernel drops with its holder. A writer that waits too long
  (the holder was stopped) gives up: a lost sample or decision is made again.
- The file loses its name as soon as all API servers have it; engines have it earlier, since an API
  server waits for its engines before it needs the state. So nothing is left when the processes
  end, however that happens. What a service leaves that failed to start is removed by its last
  process, or when the next service starts.
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

import psutil  # type: ignore[import-untyped]

from vllm_mm_ext.base import shared_file
from vllm_mm_ext.base.shared_file import open_shared, remove_if_unused
from vllm_mm_ext.base.shared_records import Region

KEY_BYTES = 16
ENGINES = 256
DECISIONS = 1 << 15
# Places a key may be at, in one stretch. With half the table in use a stretch of 8 is full about
# once in 60 times, and then the stretch's oldest decision makes way.
_WAYS = 8

_PREFIX = "mm_ext-state-"
_LOCK_WAIT_S = 0.05
_LOCK_POLL_S = 0.001
_COUNT = struct.Struct("<I")
_LOAD = struct.Struct("<9d")
_STATE = struct.Struct("<iidd")
_DECISION = struct.Struct(f"<{KEY_BYTES}siQdd")
# struct flock of 64-bit Linux; len 0 is the whole file.
_FLOCK = struct.Struct("hhqqi4x")


@dataclass(frozen=True, slots=True)
class EngineLoad:
    """How busy an engine is at the end of a step.

    Attributes:
        time: Seconds on the system's monotonic clock, which all processes of a machine share.
        kv_usage: Share of the KV blocks that requests use, 0 to 1; blocks that are only cached
            count as free.
        running: Requests that hold a slot.
        waiting: Requests that do not.
        slots: Requests that can run at once.
        kv_pressure: Like ``kv_usage``, with the blocks that the plugin's block pool keeps for later
            requests. This and what follows is None where the engine does not publish its load
            itself.
        backlog_tokens: Encoder outputs that requests still need.
        backlog_s: Seconds that encoding those takes, at what encoding costs here; 0 before that is
            known.
        itl_s: Average seconds of steps in which something was decoded.
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
        level: Current tier.
        rest: Tier that the last load observed allows the service to come down to.
        calm_since: Since when ``rest`` has been below ``level``, in seconds; infinite if it is not.
        seen: Time of the last load observed.
    """

    level: int = 0
    rest: int = 0
    calm_since: float = math.inf
    seen: float = -math.inf


class Decision(NamedTuple):
    """What was decided about a video.

    Attributes:
        level: Load tier.
        tokens: Prompt tokens granted to each use of the video, 0 for no grant.
        made: When it was decided, in seconds.
        used: When it was last used.
    """

    level: int
    tokens: int
    made: float
    used: float


_API_SERVERS = Region(_COUNT, 1, 0)
_LOADS = Region(_LOAD, ENGINES, _API_SERVERS.end)
_TIER = Region(_STATE, 1, _LOADS.end)
_TABLE = Region(_DECISION, DECISIONS, _TIER.end)
SIZE = _TABLE.end


class SharedState:
    """One service's file, mapped; ``open_state`` and ``private_state`` make it.

    Args:
        descriptor: The open file. It is closed with the state, by ``close`` or when nobody refers
            to the state any more.
        path: Where the file is; None if it has no name.

    Raises:
        OSError: The file cannot be mapped.
    """

    def __init__(self, descriptor: int, path: Path | None = None) -> None:
        self.path = path
        self._thread_lock = threading.Lock()
        self._descriptor = descriptor
        self._view = mmap.mmap(descriptor, SIZE)
        self._finalizer = weakref.finalize(self, _close, self._view, descriptor, path)

    def close(self) -> None:
        """Leave the file, and remove it if no process uses it now; the state is of no more use."""
        self._finalizer()

    @contextlib.contextmanager
    def writing(self) -> Iterator[bool]:
        """Hold the lock of writers; yields False if another writer keeps it too long."""
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

    def count_api_server(self) -> int:
        """Count one more API server that has the state, and return how many have it so far."""
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
            engine: Index of the engine; those past ``ENGINES`` are left out.
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
        """The newest load of an engine; None before there is any."""
        values = _LOADS.read(self._view, engine) if engine < ENGINES else None
        if values is None:
            return None
        return EngineLoad(*(None if math.isnan(value) else value for value in values))  # type: ignore[arg-type]

    def loads(self, engines: int) -> dict[int, EngineLoad]:
        """The newest load of those of the first ``engines`` engines that have any, by index."""
        found = ((engine, self.load(engine)) for engine in range(min(engines, ENGINES)))
        return {engine: load for engine, load in found if load is not None}

    def write_tier(self, state: TierState) -> None:
        """Keep the service's tier (call within ``writing``)."""
        _TIER.write(self._view, 0, state.level, state.rest, state.calm_since, state.seen)

    def tier(self) -> TierState:
        """The service's tier as of the last load observed."""
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
    """A name that the processes of the service have in common, and no other service has.

    Args:
        api_servers: API servers of the service. A single one hands its configuration on to the
            engines; several make their configurations each by itself.
        api_server: Which one of them this process is; -1 for the process that starts them all.
    """
    if api_servers == 1:
        return uuid.uuid4().hex
    parent = multiprocessing.parent_process()
    main = parent.pid if parent is not None and api_server >= 0 else os.getpid()
    # The start time tells the service from an earlier one whose main process had the same id.
    return f"{main}-{psutil.Process(main).create_time():.2f}"


def file_name(service: str) -> str:
    """Name of the file of a service of this user."""
    return f"{_PREFIX}{os.getuid()}-{service}"


def open_state(service: str, directories: list[Path] | None = None) -> SharedState:
    """Open the shared state of a service, or make it if this is the first process to ask.

    Args:
        service: Name of the service.
        directories: Where the file can be, best first; by default in memory, else on disk.

    Raises:
        OSError: It can be made in none of them.
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
    """As ``open_state``, for an API server; the last one to join removes the name of the file.

    Args:
        service: Name of the service.
        api_servers: API servers of the service.
        directories: As for ``open_state``.

    Raises:
        OSError: See ``open_state``.
    """
    state = open_state(service, directories)
    if state.count_api_server() >= api_servers and state.path is not None:
        state.path.unlink(missing_ok=True)
    return state


def private_state() -> SharedState:
    """A state that this process shares with none."""
    descriptor = os.memfd_create("mm_ext-state", os.MFD_CLOEXEC)
    os.ftruncate(descriptor, SIZE)
    return SharedState(descriptor)


def remove_abandoned(directory: Path) -> None:
    """Remove the files that this user's services left that were killed."""
    shared_file.remove_abandoned(directory, f"{_PREFIX}{os.getuid()}-")


def _directories() -> list[Path]:
    memory = Path("/dev/shm")
    usable = memory.is_dir() and os.access(memory, os.W_OK)
    return [*([memory] if usable else []), Path(tempfile.gettempdir())]
