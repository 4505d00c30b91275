"""Files of safetensors in a directory that others write to: what they are, and what goes wrong."""

from __future__ import annotations

import json
import os
from pathlib import Path

from vllm_mm_ext.errors import FULL_DISK


def is_whole(path: Path) -> bool:
    """Whether a safetensors file is as long as its header says.

    Raises:
        OSError: It is not there, or cannot be read.
    """
    with path.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        begin = file.read(8)
        if len(begin) < 8:
            return False
        length = int.from_bytes(begin, "little")
        if length > size - 8:
            return False
        try:
            header = json.loads(file.read(length))
            ends = [one["data_offsets"][1] for name, one in header.items() if name[:2] != "__"]
        except (ValueError, TypeError, AttributeError, KeyError, IndexError):
            return False
    return bool(ends) and size == 8 + length + max(ends)


def lacks_room(error: Exception) -> bool:
    """Whether a file could not be written as the disk is full.

    Args:
        error: An ``OSError``, or that of safetensors, whose text alone tells the system's error.
    """
    if isinstance(error, OSError):
        return error.errno in FULL_DISK
    return any(f"(os error {number})" in str(error) for number in FULL_DISK)


def entries(directory: str | os.PathLike[str]) -> list[os.DirEntry[str]]:
    """What is in a directory; nothing where it cannot be read."""
    try:
        with os.scandir(directory) as found:
            return list(found)
    except OSError:
        return []


def is_older(entry: os.DirEntry[str], than: float) -> bool:
    """Whether a file is still there, and was changed last before a time of the file system."""
    try:
        return entry.stat(follow_symlinks=False).st_mtime < than
    except OSError:
        return False
