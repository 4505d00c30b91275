"""Files that the processes of a service map into memory, removed when no process uses them.

A process that uses a file holds a shared lock on it. The kernel drops the lock when the process
ends, however it ends. Process ids in the file's name would not show whether it is in use, since
containers may share ``/dev/shm`` but not their process ids.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
from pathlib import Path


def open_shared(path: Path, size: int) -> int:
    """Open a file, or create it; the file is in use as long as the returned descriptor is open.

    Args:
        path: Path of the file. A new file can be read and written by this user only.
        size: Size of the file in bytes; a new file holds zeros.

    Returns:
        The open file descriptor.

    Raises:
        OSError: The file cannot be created, is a symbolic link, or belongs to another user.
    """
    flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW
    while True:
        descriptor = os.open(path, flags, 0o600)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_SH)
            if os.fstat(descriptor).st_uid != os.getuid():
                raise PermissionError(f"{path} belongs to another user")
            if is_at(path, descriptor):
                # With all space allocated now, a full file system is an error here and not a SIGBUS
                # at a later write.
                os.posix_fallocate(descriptor, 0, size)
                return descriptor
        except BaseException:
            os.close(descriptor)
            raise
        # Another process removed the file as unused before the lock was taken.
        os.close(descriptor)


def remove_if_unused(path: Path, descriptor: int) -> None:
    """Remove a file unless it is in use through another descriptor.

    Args:
        path: Path of the file, which may be gone already.
        descriptor: The open file. From now on it does not keep the file in use.
    """
    with contextlib.suppress(BlockingIOError):
        # Of several users that do this at once, the last one gets the lock.
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if is_at(path, descriptor):
            path.unlink()


def remove_abandoned(directory: Path, prefix: str) -> None:
    """Remove files that no process uses any more, as all their users were killed.

    Args:
        directory: Directory of the files.
        prefix: Beginning of their names.
    """
    for path in directory.glob(f"{prefix}*"):
        with contextlib.suppress(OSError):
            descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
            try:
                remove_if_unused(path, descriptor)
            finally:
                os.close(descriptor)


def is_at(path: Path, descriptor: int) -> bool:
    """Whether an open file is the file that is at ``path`` now."""
    try:
        there = path.stat()
    except FileNotFoundError:
        return False
    return os.path.samestat(there, os.fstat(descriptor))
