"""Encoded media files in memory, outside the Python heap, identified by their content."""

from __future__ import annotations

import fcntl
import mmap
import os
import tempfile
import weakref
from collections.abc import Iterator
from types import TracebackType
from typing import Self

from blake3 import blake3

from vllm_mm_ext.errors import MediaTooLargeError, no_room
from vllm_mm_ext.media.fetch.byte_lease import Lease

# memfd_create and file seals exist on Linux only; elsewhere an unlinked temporary file serves.
_HAS_MEMFD = hasattr(os, "memfd_create")
_READ_CHUNK = 1 << 20


class ByteLimit(int):
    """A limit in bytes that knows its name.

    Attributes:
        setting: The setting or the variable that it comes from, for messages.
    """

    setting: str

    def __new__(cls, num_bytes: int, setting: str) -> ByteLimit:
        """See the class."""
        limit = super().__new__(cls, num_bytes)
        limit.setting = setting
        return limit


class Blob:
    """An encoded file in memory that cannot change, behind a file descriptor.

    The descriptor can be passed to a decode worker. A duplicate of a descriptor shares its file
    offset, so a worker must not rely on the offset: it uses ``os.pread``, ``mmap``, or opens
    ``/proc/self/fd/N`` again. On Linux the memory is sealed, so a worker cannot change it either.
    The descriptor closes when the blob is garbage collected; views stay valid after that.

    Make one with :meth:`from_bytes` or :class:`BlobWriter`.

    Attributes:
        fd: Open descriptor, owned by this object.
        size: Length in bytes.
        digest: Hex BLAKE3 of the bytes.
        lease: The bytes of the media budget that the blob holds; None where they do not count.
    """

    __slots__ = ("__weakref__", "_finalizer", "digest", "fd", "lease", "size")

    def __init__(self, fd: int, size: int, digest: str) -> None:
        self.fd = fd
        self.size = size
        self.digest = digest
        self.lease: Lease | None = None
        self._finalizer = weakref.finalize(self, os.close, fd)

    def hold(self, lease: Lease) -> None:
        """Count the blob's bytes with ``lease`` until the blob is garbage collected."""
        lease.resize(self.size)
        self.lease = lease
        weakref.finalize(self, lease.release).atexit = False

    @classmethod
    def from_bytes(cls, data: bytes | bytearray | memoryview) -> Blob:
        """Copy ``data`` into a new blob."""
        with BlobWriter() as writer:
            writer.append(data)
            return writer.finish()

    def view(self) -> memoryview:
        """The bytes as a read-only mapping, not copied; it stays valid after the blob is gone."""
        if self.size == 0:
            return memoryview(b"")
        return memoryview(mmap.mmap(self.fd, self.size, access=mmap.ACCESS_READ))

    def read(self) -> bytes:
        """A copy of all bytes."""
        return b"".join(self.chunks())

    def chunks(self, size: int = _READ_CHUNK) -> Iterator[bytes]:
        """The bytes in order, at most ``size`` at a time; the file offset stays where it is."""
        offset = 0
        while offset < self.size:
            chunk = os.pread(self.fd, min(size, self.size - offset), offset)
            offset += len(chunk)
            yield chunk

    def __len__(self) -> int:
        return self.size

    def __repr__(self) -> str:
        return f"Blob({self.digest[:12]}, {self.size} bytes)"


class BlobWriter:
    """Builds a :class:`Blob` chunk by chunk and hashes each chunk as it comes.

    Leaving the writer's ``with`` block closes the descriptor, unless :meth:`finish` was called.

    Args:
        max_bytes: Most bytes that the blob may have; None for no limit.
        what: What the error message calls the source.

    Raises:
        BusyError: The process has no descriptor left.
    """

    def __init__(self, max_bytes: int | None = None, what: str = "The media") -> None:
        self.max_bytes = max_bytes
        self.what = what
        self.size = 0
        self._hash = blake3()
        try:
            self._fd = _create_fd()
        except OSError as error:
            raise no_room(error.strerror) from None

    def append(self, chunk: bytes | bytearray | memoryview) -> None:
        """Add ``chunk`` at the end.

        Raises:
            MediaTooLargeError: The total would pass ``max_bytes``; nothing is written.
            BusyError: The system has no memory left for it.
        """
        check_size(self.size + len(chunk), self.max_bytes, self.what)
        view = memoryview(chunk)
        self._hash.update(view)
        try:
            while view:
                view = view[os.write(self._fd, view) :]
        except OSError as error:
            raise no_room(error.strerror) from None
        self.size += len(chunk)

    def finish(self) -> Blob:
        """The blob, which owns the descriptor from now on; the writer cannot be used any more."""
        fd, self._fd = self._fd, -1
        if _HAS_MEMFD:
            seals = fcntl.F_SEAL_WRITE | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW
            fcntl.fcntl(fd, fcntl.F_ADD_SEALS, seals | fcntl.F_SEAL_SEAL)
        return Blob(fd, self.size, str(self._hash.hexdigest()))

    def close(self) -> None:
        """Free what was written. After :meth:`finish` there is nothing to free."""
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()


def check_size(size: int, max_bytes: int | None, what: str = "The media") -> None:
    """Raise ``MediaTooLargeError`` naming the limit when ``size`` is past ``max_bytes``."""
    if max_bytes is not None and size > max_bytes:
        source = f" ({max_bytes.setting})" if isinstance(max_bytes, ByteLimit) else ""
        raise MediaTooLargeError(
            f"{what} has at least {size} bytes; the limit is {max_bytes} bytes{source}.",
            value=size,
        )


def _create_fd() -> int:
    if _HAS_MEMFD:
        return os.memfd_create("mm_ext_media", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    with tempfile.TemporaryFile() as file:
        return os.dup(file.fileno())
