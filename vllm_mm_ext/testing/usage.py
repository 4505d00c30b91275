"""What a server's processes hold, by role: memory, descriptors, threads."""

from __future__ import annotations

import os
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

import psutil  # type: ignore[import-untyped]

from vllm_mm_ext.media.decode import shared_array
from vllm_mm_ext.testing.memory import Role, snapshot


@dataclass(frozen=True)
class Usage:
    """What some processes hold together.

    Attributes:
        memory: Bytes: proportional set size, and what lies in anonymous memory files that are open
            but need not be mapped (encoded media; one that is open and mapped counts twice).
        descriptors: Open file descriptors.
        threads: Threads.
        processes: Processes.
    """

    memory: int = 0
    descriptors: int = 0
    threads: int = 0
    processes: int = 0

    def __add__(self, other: Usage) -> Usage:
        return Usage(
            self.memory + other.memory,
            self.descriptors + other.descriptors,
            self.threads + other.threads,
            self.processes + other.processes,
        )


def usage(pid: int) -> dict[Role, Usage]:
    """What ``pid`` (role ``api``) and its descendants hold now; vanished processes are skipped."""
    found: dict[Role, Usage] = defaultdict(Usage)
    seen: set[int] = set()
    for process in snapshot(pid):
        try:
            threads = psutil.Process(process.pid).num_threads()
            descriptors, in_files = _descriptors(process.pid, seen)
        except (psutil.Error, OSError):
            continue
        found[process.role] += Usage(process.pss + in_files, descriptors, threads, 1)
    return dict(found)


def mapped_media(pid: int) -> int:
    """Bytes of decoded frames and sound that a process maps (``media.shared_array``)."""
    total = 0
    for line in Path(f"/proc/{pid}/maps").read_text().splitlines():
        if f"/memfd:{shared_array.NAME}" in line:
            begin, end = line.split(maxsplit=1)[0].split("-")
            total += int(end, 16) - int(begin, 16)
    return total


def _descriptors(pid: int, seen: set[int]) -> tuple[int, int]:
    """Number of descriptors, and bytes in memory files behind them; ``seen``: files counted."""
    count = size = 0
    for name in os.listdir(f"/proc/{pid}/fd"):
        link = Path(f"/proc/{pid}/fd/{name}")
        try:
            in_memory = str(link.readlink()).startswith("/memfd:")
            status = link.stat() if in_memory else None
        except FileNotFoundError:  # Closed since.
            continue
        count += 1
        if status is not None and status.st_ino not in seen:
            seen.add(status.st_ino)
            size += status.st_blocks * 512
    return count, size
