"""Searches the memory of processes for pieces of some bytes."""

from __future__ import annotations

import mmap
import os
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

# A piece of this many bytes is found wherever it lies: of the memory, eight bytes every ``_STEP``
# are looked up among all eight bytes of the content, and then compared with what follows.
_STEP = 128
_KEY = 8
_COMPARED = 24
PIECE = _STEP + _COMPARED
_CHUNK = 64 << 20
_PAGE = mmap.PAGESIZE
# Most of what is looked up is told from the content by these bits of a hash.
_BITS = 25
_ODD = np.uint64(0x9E3779B97F4A7C15)
_MAP = re.compile(r"([0-9a-f]+)-([0-9a-f]+) (\S+) \S+ (\S+) (\d+)\s*(.*)")


@dataclass(frozen=True)
class Found:
    """A piece of the content.

    Attributes:
        pid: Process in which it lies.
        where: The mapping, or the memory file.
        address: Where it lies there.
        offset: Where in the content it begins.
    """

    pid: int
    where: str
    address: int
    offset: int


class Content:
    """Bytes to search for. Pieces with little variety are not searched for: others may have them.

    Args:
        data: The bytes.
        apart_from: Other content that may be there; what both have (headers) is not searched for.
    """

    def __init__(self, data: bytes, apart_from: bytes = b"") -> None:
        self._data = data
        windows = np.lib.stride_tricks.sliding_window_view(np.frombuffer(data, np.uint8), _KEY)
        varied = (np.diff(np.sort(windows, axis=1), axis=1) != 0).sum(axis=1) >= _KEY - 2
        assert varied.mean() > 0.5, (
            "the content has too little variety to be told from other memory"
        )
        self._offsets = np.flatnonzero(varied)
        keys = np.ascontiguousarray(windows[self._offsets]).view(np.uint64).reshape(-1)
        own = ~np.isin(keys, _all_keys(apart_from))
        self._offsets, keys = self._offsets[own], keys[own]
        order = np.argsort(keys)
        self._offsets, self._keys = self._offsets[order], keys[order]
        self._likely = np.zeros(1 << _BITS, bool)
        self._likely[_hash(keys)] = True

    def pieces_in(
        self, memory: npt.NDArray[np.uint8], sampled: npt.NDArray[np.uint64]
    ) -> list[tuple[int, int]]:
        """The pieces that lie in a part of memory: where there, and where in the content.

        Args:
            memory: The part.
            sampled: Eight bytes of each ``_STEP`` of it.
        """
        likely = np.flatnonzero(self._likely[_hash(sampled)])
        places = np.searchsorted(self._keys, sampled[likely])
        same = self._keys[np.minimum(places, len(self._keys) - 1)] == sampled[likely]
        found = []
        for at, place in zip(likely[same].tolist(), places[same].tolist(), strict=True):
            begin, end = at * _STEP, place
            while end < len(self._keys) and self._keys[end] == sampled[at]:
                offset = int(self._offsets[end])
                expected = self._data[offset : offset + _COMPARED]
                if (
                    len(expected) == _COMPARED
                    and memory[begin : begin + _COMPARED].tobytes() == expected
                ):
                    found.append((begin, offset))
                    break
                end += 1
        return found


def _all_keys(data: bytes) -> npt.NDArray[np.uint64]:
    if len(data) < _KEY:
        return np.empty(0, np.uint64)
    windows = np.lib.stride_tricks.sliding_window_view(np.frombuffer(data, np.uint8), _KEY)
    return np.ascontiguousarray(windows).view(np.uint64).reshape(-1)


def _hash(values: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    return (values * _ODD) >> np.uint64(64 - _BITS)


def search(pids: Iterable[int], contents: dict[str, Content]) -> dict[str, list[Found]]:
    """Pieces of some contents in the memory of processes, and in the memory files they have open.

    Args:
        pids: The processes.
        contents: By name.
    """
    found: dict[str, list[Found]] = {name: [] for name in contents}
    files: set[tuple[int, int]] = set()
    for pid in pids:
        for where, base, memory in _parts(pid, files):
            count = (len(memory) - _KEY) // _STEP + 1
            strided = np.lib.stride_tricks.as_strided(memory, (max(0, count), _KEY), (_STEP, 1))
            sampled = np.ascontiguousarray(strided).view(np.uint64).reshape(-1)
            for name, content in contents.items():
                pieces = content.pieces_in(memory, sampled)
                found[name] += [Found(pid, where, base + begin, at) for begin, at in pieces]
    return found


def _parts(
    pid: int, files: set[tuple[int, int]]
) -> Iterator[tuple[str, int, npt.NDArray[np.uint8]]]:
    with (
        open(f"/proc/{pid}/mem", "rb", buffering=0) as mem,
        open(f"/proc/{pid}/pagemap", "rb", buffering=0) as pagemap,
    ):
        for line in Path(f"/proc/{pid}/maps").read_text().splitlines():
            start, end, rights, _, inode, path = _MAP.fullmatch(line).groups()  # type: ignore[union-attr]
            # What a process cannot write, and comes from a file of the system, is that file.
            is_file = inode != "0" and not path.startswith(("/memfd:", "/dev/shm", "/dev/zero"))
            if "r" not in rights or path == "[vvar]" or (is_file and "w" not in rights):
                continue
            for first, last in _touched(pagemap.fileno(), int(start, 16), int(end, 16)):
                yield from _read(mem.fileno(), first, last, path or "[anonymous]")
    for link in Path(f"/proc/{pid}/fd").iterdir():
        try:
            target = os.readlink(link)
            if not target.startswith(("/memfd:", "/dev/shm/")):
                continue
            fd = os.open(link, os.O_RDONLY)
        except OSError:
            continue
        try:
            status = os.fstat(fd)
            if (status.st_dev, status.st_ino) not in files:
                files.add((status.st_dev, status.st_ino))
                yield from _read(fd, 0, status.st_size, target)
        finally:
            os.close(fd)


def _touched(pagemap: int, start: int, end: int) -> Iterator[tuple[int, int]]:
    """Runs of pages of a mapping that exist, in memory or swapped out."""
    for at in range(start, end, _CHUNK):
        count = (min(end, at + _CHUNK) - at) // _PAGE
        entries = np.frombuffer(os.pread(pagemap, 8 * count, at // _PAGE * 8), np.uint64)
        exists = np.concatenate(([False], entries >> np.uint64(62) != 0, [False]))
        edges = np.flatnonzero(np.diff(exists.astype(np.int8)))
        for first, last in edges.reshape(-1, 2).tolist():
            yield at + first * _PAGE, at + last * _PAGE


def _read(
    fd: int, start: int, end: int, name: str
) -> Iterator[tuple[str, int, npt.NDArray[np.uint8]]]:
    at = start
    while at < end:
        try:
            chunk = os.pread(fd, min(_CHUNK, end - at), at)
        except OSError:
            return
        if not chunk:
            return
        yield name, at, np.frombuffer(chunk, np.uint8)
        # The next part overlaps, so that nothing lies between two.
        at += len(chunk) if at + len(chunk) >= end else len(chunk) - PIECE // _STEP * _STEP
