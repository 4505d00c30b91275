"""Arrays whose memory can be handed to another process as a file descriptor."""

from __future__ import annotations

import ctypes
import math
import mmap
import os
import tempfile
import weakref

import numpy as np
import numpy.typing as npt

NAME = "vllm_mm_ext"
"""Name of the memory files, as the mappings of a process show them."""

_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]
_libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]


def create(shape: tuple[int, ...], dtype: npt.DTypeLike) -> tuple[npt.NDArray[np.generic], int]:
    """A new zeroed array in shared memory, and the descriptor of that memory.

    The caller owns the descriptor; the array stays valid without it.

    Raises:
        MemoryError: No room.
    """
    num_bytes = max(1, math.prod(shape) * np.dtype(dtype).itemsize)
    fd = _memory_file()
    try:
        os.ftruncate(fd, num_bytes)
        return adopt(fd, shape, dtype), fd
    except BaseException:
        os.close(fd)
        raise


def adopt(fd: int, shape: tuple[int, ...], dtype: npt.DTypeLike) -> npt.NDArray[np.generic]:
    """The array that lies in the memory of ``fd``, shared, not copied.

    ``fd`` may be closed at once. The memory is unmapped when the last view of the array is
    gone. (``mmap.mmap`` would keep a descriptor open for each array.)

    Raises:
        MemoryError: It cannot be mapped, or ``fd`` holds less than the array.
    """
    kind = np.dtype(dtype)
    num_bytes = max(1, math.prod(shape) * kind.itemsize)
    if os.fstat(fd).st_size < num_bytes:
        raise MemoryError(f"{num_bytes} bytes do not lie in the shared memory")
    address = _libc.mmap(None, num_bytes, mmap.PROT_READ | mmap.PROT_WRITE, mmap.MAP_SHARED, fd, 0)
    if address in (None, ctypes.c_void_p(-1).value):
        raise MemoryError(f"cannot map {num_bytes} bytes of shared memory")
    block = (ctypes.c_char * num_bytes).from_address(address)
    weakref.finalize(block, _libc.munmap, address, num_bytes).atexit = False
    array: npt.NDArray[np.generic] = np.ndarray(shape, kind, buffer=memoryview(block).cast("B"))
    return array


def _memory_file() -> int:
    try:
        return os.memfd_create(NAME, os.MFD_CLOEXEC)
    except (AttributeError, OSError):  # a kernel or sandbox without memfd
        with tempfile.TemporaryFile(dir="/dev/shm" if os.path.isdir("/dev/shm") else None) as file:
            return os.dup(file.fileno())
