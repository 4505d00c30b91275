"""Files that the processes of a service map, and that are removed when none of them is left.

Whoever uses one holds a shared lock on it, which the kernel drops with its holder, however that
ends. Process ids would not tell: containers may share ``/dev/shm`` and not the ids.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
from pathlib import Path


def open_shared(path: Path, size: int) -> int:
    """Open a file, or make it if it is not there; it is in use as long as the descriptor is open.

    Args:
        path: Where it is; only this user can read it.
        size: Its bytes, at first zeros.

    Returns:
        The descriptor.

    Raises:
        OSError: It cannot be made, is a link or belongs to another user.
    """
    flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW
    while True:
        descriptor = os.open(path, flags, 0o600)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_SH)
            if os.fstat(descriptor).st_uid != os.getuid():
                raise PermissionError(f"{path} belongs to another user")
            if is_at(path, descriptor):
                # With its space taken now, a full file system is an error here and not a SIGBUS at
                # some later write.
                os.posix_fallocate(descriptor, 0, size)
                return descriptor
        except BaseException:
            os.close(descriptor)
            raise
        # It was removed in between, as unused.
        os.close(descriptor)


def remove_if_unused(path: Path, descriptor: int) -> None:
    """Remove a file that nobody has in use but through this descriptor.

    Args:
        path: Where it is, or was.
        descriptor: It, open. It counts as in use through it no longer.
    """
    with contextlib.suppress(BlockingIOError):
        # Of users that do this at once the last one gets the lock.
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if is_at(path, descriptor):
            path.unlink()


def remove_abandoned(directory: Path, prefix: str) -> None:
    """Remove the files that users left who were killed.

    Args:
        directory: Where they are.
        prefix: How their names begin.
    """
    for path in directory.glob(f"{prefix}*"):
        with contextlib.suppress(OSError):
            descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
            try:
                remove_if_unused(path, descriptor)
            finally:
                os.close(descriptor)


def is_at(path: Path, descriptor: int) -> bool:
    """Whether an open file is the one of that path."""
    try:
        there = path.stat()
    except FileNotFoundError:
        return False
    return os.path.samestat(there, os.fstat(descriptor))
