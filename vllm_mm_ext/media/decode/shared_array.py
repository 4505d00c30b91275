"""Arrays whose memory can be handed to another process as a file descriptor."""

from __future__ import annotations

import ctypes
import fcntl
import math
import mmap
import os
import weakref
from typing import Any

import numpy as np
import numpy.typing as npt

NAME = "vllm_mm_ext"
"""Name of the memory files, as the mappings of a process show them."""

# A process that reads mapped memory past the end of its file is killed (SIGBUS). The kernel refuses
# to shrink a file with this seal, and to take the seal off.
_SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_SEAL

_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]
_libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]


class FileArray(np.ndarray[Any, Any]):
    """An array in shared memory that ``put`` writes through the file of the memory.

    The first touch of a page of a mapping costs some 2 us for the fault, on top of a new page. A
    write to the file takes new pages without faults: 32 frames of 1080p cost 70 ms instead of 160.

    Attributes:
        fd: Descriptor of the memory, or -1 for an array that is not in shared memory.
        address: Where the memory begins in this process.
    """

    fd: int
    address: int

    def __array_finalize__(self, source: npt.NDArray[np.generic] | None) -> None:
        self.fd = getattr(source, "fd", -1)
        self.address = getattr(source, "address", 0)


def put(target: npt.NDArray[np.generic], values: npt.NDArray[np.generic]) -> None:
    """Copy values to an array of their shape and type.

    Args:
        target: A part of an array that ``create`` made, whose descriptor is still open, or any
            other array.
        values: What to write.

    Raises:
        OSError: There is no room.
    """
    if not isinstance(target, FileArray) or target.fd < 0 or not target.flags.c_contiguous:
        target[...] = values
        return
    left = np.ascontiguousarray(values).data.cast("B")
    at = target.ctypes.data - target.address
    while left:
        written = os.pwrite(target.fd, left, at)
        at, left = at + written, left[written:]


def create(shape: tuple[int, ...], dtype: npt.DTypeLike) -> tuple[FileArray, int]:
    """Make a zeroed array in shared memory.

    Args:
        shape: Length of each axis.
        dtype: Type of the elements.

    Returns:
        The array, and the descriptor of its memory. The caller owns the descriptor; the array stays
        valid without it, but ``put`` writes to the array only while the descriptor is open.

    Raises:
        MemoryError: There is no room.
    """
    fd = os.memfd_create(NAME, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        os.ftruncate(fd, _num_bytes(shape, dtype))
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, _SEALS)
        array = adopt(fd, shape, dtype).view(FileArray)
        array.fd, array.address = fd, array.ctypes.data
        return array, fd
    except BaseException:
        os.close(fd)
        raise


def adopt(fd: int, shape: tuple[int, ...], dtype: npt.DTypeLike) -> npt.NDArray[np.generic]:
    """Map an array that another process made with ``create``; nothing is copied.

    The memory is unmapped when the last view of the array is gone. (``mmap.mmap`` would keep a
    descriptor open for each array.)

    Args:
        fd: Descriptor of the memory; the caller may close it at once.
        shape: Length of each axis.
        dtype: Type of the elements.

    Raises:
        ValueError: ``fd`` is no memory that keeps its size, or holds less than the array.
        MemoryError: The memory cannot be mapped.
    """
    num_bytes = _num_bytes(shape, dtype)
    try:
        seals = fcntl.fcntl(fd, fcntl.F_GET_SEALS)
    except OSError as error:
        raise ValueError("the descriptor is not one of shared memory") from error
    if not seals & fcntl.F_SEAL_SHRINK:
        raise ValueError("the shared memory could shrink while it is mapped")
    if os.fstat(fd).st_size < num_bytes:
        raise ValueError(f"{num_bytes} bytes do not lie in the shared memory")
    address = _libc.mmap(None, num_bytes, mmap.PROT_READ | mmap.PROT_WRITE, mmap.MAP_SHARED, fd, 0)
    if address in (None, ctypes.c_void_p(-1).value):
        raise MemoryError(f"cannot map {num_bytes} bytes of shared memory")
    block = (ctypes.c_char * num_bytes).from_address(address)
    weakref.finalize(block, _libc.munmap, address, num_bytes).atexit = False
    memory = memoryview(block).cast("B")
    array: npt.NDArray[np.generic] = np.ndarray(shape, np.dtype(dtype), buffer=memory)
    return array


def _num_bytes(shape: tuple[int, ...], dtype: npt.DTypeLike) -> int:
    # An empty mapping is an error; an empty array gets a byte.
    return max(1, math.prod(shape) * np.dtype(dtype).itemsize)
