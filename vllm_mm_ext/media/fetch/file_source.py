"""Local files under the directory the operator allowed."""

from __future__ import annotations

import asyncio
import errno
import os
import stat
import threading
import time
from collections.abc import Callable, Collection, Iterator
from functools import partial
from pathlib import Path
from typing import NamedTuple
from urllib.request import url2pathname

from blake3 import blake3
from cachetools import LRUCache
from urllib3.util import parse_url

from vllm_mm_ext.errors import (
    BusyError,
    ForbiddenMediaError,
    MediaError,
    UnreachableMediaError,
    no_room,
)
from vllm_mm_ext.media.bounded_threads import BoundedThreads
from vllm_mm_ext.media.fetch.blob import Blob, BlobWriter, check_size
from vllm_mm_ext.media.fetch.byte_gate import Claim
from vllm_mm_ext.media.fetch.byte_lease import Lease
from vllm_mm_ext.media.fetch.source import Fetched, MediaChangedError, tighter

_FLAG = "--allowed-local-media-path"
_READ_CHUNK = 1 << 20
# Two changes of a file may get the same time stamp if they fall within one tick of the file
# system's clock. The coarsest clock in use ticks every 2 s (FAT). The identity of a file that
# changed less than 2 s ago therefore proves nothing: such a file is read and hashed each time.
_RACY_NS = 2_000_000_000
# Reasons not to open a file that lie with the server.
_OURS = frozenset({errno.EMFILE, errno.ENFILE, errno.ENOMEM})


class FileIdentity(NamedTuple):
    """What tells one state of a file from another without reading the file.

    The change time is part of it because no program can set it back, as it can the modification
    time.
    """

    device: int
    inode: int
    size: int
    mtime_ns: int
    ctime_ns: int

    @classmethod
    def of(cls, status: os.stat_result) -> FileIdentity:
        return cls(
            status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns
        )

    def is_settled(self, now_ns: int) -> bool:
        """Return whether every change made at or after ``now_ns`` will change the identity."""
        return now_ns - max(self.mtime_ns, self.ctime_ns) > _RACY_NS


class FileSource:
    """Reads files below ``allowed_path`` into memory and remembers digests by file identity.

    The source copies the content, so a file that changes later does not change what was read. A
    location is a path with all links resolved. The source checks the path again through the open
    descriptor, so a link that somebody swaps in between the two checks leads nowhere else.

    Args:
        allowed_path: Only files below this directory are read; None forbids all.
        threads: For reading, as a directory may be that of a server that is gone.
        lookups: Threads for all else that is asked of the disk: nobody waits for others' reads to
            learn that a file is known.
        max_bytes: Limit on the size of one file, None for none.
        max_known: How many digests of files are remembered.

    Attributes:
        counts: How many files were found unchanged without reading, and how many were read.
    """

    def __init__(
        self,
        allowed_path: Path | None,
        *,
        threads: BoundedThreads,
        lookups: BoundedThreads,
        max_bytes: int | None,
        max_known: int = 4096,
    ) -> None:
        if allowed_path is not None:
            allowed_path = allowed_path.resolve()
            if not allowed_path.is_dir():
                raise ValueError(f"`{_FLAG}` must be an existing directory, got {allowed_path}")
        self._allowed = allowed_path
        self._threads = threads
        self._lookups = lookups
        self._max_bytes = max_bytes
        self._known: LRUCache[FileIdentity, str] = LRUCache(max_known)
        self._lock = threading.Lock()
        self.counts = {"file_unchanged": 0, "file_reads": 0}

    async def locate(self, url: str, claim: Claim) -> Path:
        """Return the path of a ``file:`` URL with all links resolved.

        The errors do not tell whether a file outside the allowed directory exists.
        """
        if self._allowed is None:
            raise ForbiddenMediaError(f"Cannot load local files without `{_FLAG}`.")
        spec = parse_url(url)
        try:
            path = Path(url2pathname((spec.netloc or "") + (spec.path or "")))
            resolved = await self._lookups.run(path.resolve, claim.max_wait_s)
        except BusyError:  # A kind of ValueError.
            raise
        except (ValueError, OSError, RuntimeError):  # null byte; too long; a loop of links
            raise MediaError("The file URL does not hold a usable path.") from None
        self._check_allowed(resolved)
        return resolved

    async def fetch(
        self, location: Path, *, timeout_s: float, max_bytes: int | None, load: bool, claim: Claim
    ) -> Fetched:
        """See ``Source.fetch``. ``timeout_s`` does not apply to local files."""
        del timeout_s
        limit = tighter(self._max_bytes, max_bytes)
        look = partial(self._look, location, limit, load)
        found = await self._lookups.run(look, claim.max_wait_s)
        if isinstance(found, Fetched):
            return found
        # The file is not open meanwhile: descriptors are scarcer than requests.
        lease = await claim.acquire(found.size)
        reading = Reading(self._threads)
        try:
            # The file may have grown while the budget was waited for, and grows on if something is
            # being recorded to it.
            while isinstance(
                read := await self._reading(location, limit, lease, reading, claim), int
            ):
                if not claim.grow(lease, read - lease.num_bytes, spare=_READ_CHUNK):
                    lease.release()
                    lease = await claim.acquire(read + _READ_CHUNK, sure=read)
            read.hold(lease)
        except BaseException:
            lease.release()
            raise
        finally:
            reading.stop()  # If this task was cancelled, the thread ends at its next chunk.
        return Fetched.of(read)

    def forget(self, digests: Collection[str]) -> None:
        """Forget the files whose content has one of these digests."""
        with self._lock:
            for identity in [one for one, digest in self._known.items() if digest in digests]:
                del self._known[identity]

    def _look(self, path: Path, max_bytes: int | None, load: bool) -> Fetched | FileIdentity:
        """What is known of the file's content, else its identity."""
        fd = self._open(path)
        try:
            identity = FileIdentity.of(os.fstat(fd))
        finally:
            os.close(fd)
        check_size(identity.size, max_bytes, "The file")
        if not load:
            with self._lock:
                digest = self._known.get(identity)
                self.counts["file_unchanged"] += digest is not None
            if digest is not None:
                return Fetched(digest, identity.size, None)
        return identity

    async def _reading(
        self, path: Path, max_bytes: int | None, lease: Lease, reading: Reading, claim: Claim
    ) -> Blob | int:
        read = partial(self._read, path, max_bytes, lease.num_bytes, reading.go_on)
        return await self._threads.run(read, claim.max_wait_s)

    def _read(
        self, path: Path, max_bytes: int | None, room: int, go_on: Callable[[], None]
    ) -> Blob | int:
        """The bytes that the file has when it is opened; their number where it is above ``room``.

        Raises:
            MediaChangedError: Some of them changed before all were read.
        """
        fd = self._open(path)
        try:
            started_ns = time.time_ns()
            before = FileIdentity.of(os.fstat(fd))
            check_size(before.size, max_bytes, "The file")
            if before.size > room:
                return before.size
            blob = read_blob(fd, before.size, go_on)
            after = FileIdentity.of(os.fstat(fd))
            if after != before and not _begins_with(fd, before.size, blob, go_on):
                raise _changed()
        except OSError as error:
            raise UnreachableMediaError(f"The file cannot be read: {error.strerror}.") from None
        finally:
            os.close(fd)
        with self._lock:
            self.counts["file_reads"] += 1
            if after == before and before.is_settled(started_ns):
                self._known[before] = blob.digest
        return blob

    def _open(self, path: Path) -> int:
        try:
            # The kind of file is looked at before the file is opened: opening a device can have
            # effects.
            if not stat.S_ISREG(os.lstat(path).st_mode):
                raise MediaError("The file URL does not name a regular file.")
            fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
        except FileNotFoundError:
            raise UnreachableMediaError("The file does not exist.") from None
        except OSError as error:
            if error.errno in _OURS:
                raise no_room(error.strerror) from None
            raise UnreachableMediaError(f"The file cannot be opened: {error.strerror}.") from None
        try:
            if not stat.S_ISREG(os.fstat(fd).st_mode):
                raise MediaError("The file URL does not name a regular file.")
            # This is the path that the kernel opened, whatever was swapped after `locate`.
            self._check_allowed(Path(os.readlink(f"/proc/self/fd/{fd}")))
        except BaseException:
            os.close(fd)
            raise
        return fd

    def _check_allowed(self, resolved: Path) -> None:
        if self._allowed not in resolved.parents:
            raise ForbiddenMediaError(f"The file path must be below the server's `{_FLAG}`.")


class Reading:
    """A read of a file in one of some threads, which another thread may stop.

    Args:
        threads: Of the read.
    """

    def __init__(self, threads: BoundedThreads) -> None:
        self._threads = threads
        self._stopped = False

    def stop(self) -> None:
        """End the read at its next chunk."""
        self._stopped = True

    def go_on(self) -> None:
        """Note that a chunk was read.

        Raises:
            asyncio.CancelledError: The read shall end.
        """
        if self._stopped:
            raise asyncio.CancelledError
        self._threads.note_progress()


def read_blob(fd: int, size: int, go_on: Callable[[], None]) -> Blob:
    """Copy the beginning of an open file into memory.

    Args:
        fd: Descriptor open for reading.
        size: Most bytes to copy; the blob has fewer where the file ends before.
        go_on: Called for each chunk; what it raises ends the copy.

    Raises:
        OSError: The file cannot be read.
    """
    with BlobWriter() as writer:
        for chunk in _chunks(fd, size, go_on):
            writer.append(chunk)
        return writer.finish()


def digest_of(path: Path, size: int) -> str:
    """Digest of the beginning of a file.

    The file is read, not mapped into memory: to read on in a mapped file that somebody cuts short
    would end the process.

    Args:
        path: Of the file.
        size: Most bytes to read.

    Raises:
        OSError: The file cannot be read.
    """
    with path.open("rb", buffering=0) as file:
        return _digest(file.fileno(), size, lambda: None)


def _begins_with(fd: int, size: int, blob: Blob, go_on: Callable[[], None]) -> bool:
    """Whether a blob is still the first ``size`` bytes of a file that changed while it was read.

    That is so of a recording in progress, and where no more than rights or a name changed. A file
    that somebody writes anew may grow as well.
    """
    return blob.size == size and blob.digest == _digest(fd, size, go_on)


def _digest(fd: int, size: int, go_on: Callable[[], None]) -> str:
    """Digest of what ``_chunks`` reads."""
    digest = blake3()
    for chunk in _chunks(fd, size, go_on):
        digest.update(chunk)
    return str(digest.hexdigest())


def _chunks(fd: int, size: int, go_on: Callable[[], None]) -> Iterator[bytes]:
    """The first ``size`` bytes of an open file, or all where it has fewer."""
    os.lseek(fd, 0, os.SEEK_SET)
    left = size
    while chunk := os.read(fd, min(_READ_CHUNK, left)):
        go_on()
        left -= len(chunk)
        yield chunk


def _changed() -> MediaChangedError:
    return MediaChangedError("The file changed while it was read; send it again.")
