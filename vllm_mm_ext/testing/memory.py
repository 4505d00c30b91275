"""Memory and CPU time of a server's processes, by role."""

from __future__ import annotations

import threading
from collections import defaultdict
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from types import TracebackType
from typing import Literal, Self

import psutil  # type: ignore[import-untyped]

Role = Literal["api", "engine", "decode", "other"]


@dataclass(frozen=True)
class ProcessMemory:
    """One process. ``pss`` splits shared pages among the processes that map them, so it can be
    summed; ``uss`` is what would be freed if the process ended. Bytes."""

    pid: int
    role: Role
    name: str
    pss: int
    uss: int
    rss: int


def snapshot(pid: int) -> list[ProcessMemory]:
    """Memory of ``pid`` (role ``api``) and all its descendants; vanished processes are skipped."""
    found = []
    for process, role, name in _processes(pid):
        with suppress(psutil.NoSuchProcess, psutil.AccessDenied):
            info = process.memory_full_info()
            found.append(ProcessMemory(process.pid, role, name, info.pss, info.uss, info.rss))
    return found


def cpu_seconds(pid: int) -> dict[Role, float]:
    """CPU seconds so far of ``pid`` (role ``api``) and all its descendants, by role.

    Those of processes that have ended do not count.
    """
    total: dict[Role, float] = {"api": 0.0, "engine": 0.0, "decode": 0.0, "other": 0.0}
    for process, role, _ in _processes(pid):
        with suppress(psutil.NoSuchProcess, psutil.AccessDenied):
            times = process.cpu_times()
            total[role] += times.user + times.system
    return total


def _processes(pid: int) -> Iterator[tuple[psutil.Process, Role, str]]:
    """A process and its descendants with role and command line."""
    try:
        root = psutil.Process(pid)
        processes = [root, *root.children(recursive=True)]
    except psutil.NoSuchProcess:
        return
    for process in processes:
        try:
            name = " ".join(process.cmdline())[:200] or process.name()
        except (psutil.NoSuchProcess, psutil.AccessDenied):
            continue
        yield process, "api" if process.pid == pid else _role(name), name


def _role(command_line: str) -> Role:
    if "VLLM::" in command_line:
        return "engine"
    if "vllm_mm_ext" in command_line or "mm_ext" in command_line:
        return "decode"
    return "other"


class MemoryWatch:
    """Samples PSS in a thread while its block runs.

    Attributes:
        peak: Highest sum of PSS of each role, in bytes.
        front_end: Highest sum over everything but the engine: API server, decode workers and
            helpers, in bytes.
        before: ``front_end`` when the block began.
        samples: Samples taken.
    """

    def __init__(self, pid: int, interval_s: float = 0.1) -> None:
        self.peak: dict[Role, int] = defaultdict(int)
        self.front_end = 0
        self.before = 0
        self.samples = 0
        self._pid = pid
        self._interval_s = interval_s
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> Self:
        self._sample()
        self.before = self.front_end
        self._thread.start()
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._stop.set()
        self._thread.join()
        self._sample()

    def _watch(self) -> None:
        while not self._stop.wait(self._interval_s):
            self._sample()

    def _sample(self) -> None:
        by_role: dict[Role, int] = defaultdict(int)
        for process in snapshot(self._pid):
            by_role[process.role] += process.pss
        for role, size in by_role.items():
            self.peak[role] = max(self.peak[role], size)
        total = sum(size for role, size in by_role.items() if role != "engine")
        self.front_end = max(self.front_end, total)
        self.samples += 1
