"""Lets no freed memory keep what was in it.

The C library keeps freed blocks with their contents. Soon other blocks lie on them, which overwrite
them only in part; then nobody can tell any more what is left of a block. So a process whose media
may be taken down overwrites blocks as it frees them. Each thread keeps a few small blocks for
itself, which the C library does not overwrite: these are taken and cleared when media are taken
down.
"""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import suppress

from vllm_mm_ext.base.heap import trim_now

# Parameters of glibc's ``mallopt`` and their values. By the second one, blocks of fewer bytes than
# the first one says are filled with ones when they are freed, and with zeros when they are made.
_M_MMAP_THRESHOLD, _LARGE_BYTES = -3, 64 << 10
_M_PERTURB, _CLEAR = -6, 0xFF
# What a thread keeps of freed blocks ("tcache"): at most so many of each size.
_KEPT = 7
_LEAST_KEPT, _MOST_KEPT, _STEP = 24, 1032, 16
# Sizes of objects that Python keeps places for, how many places of a size are looked for, and what
# a ``bytes`` object has besides its bytes.
_LEAST_OBJECT, _MOST_OBJECT, _OBJECTS, _BYTES_HEAD = 64, 512, 1 << 13, 33
# Bytes of a thread's stack that are cleared: functions leave behind there what they worked on.
_STACK_BYTES = 128 << 10
# Seconds to wait for the threads of a pool, which may be at work.
_WAIT_S = 5.0

_libc = ctypes.CDLL(None)
_has_glibc = hasattr(_libc, "malloc_trim")
_libc.malloc.restype = ctypes.c_void_p
_libc.malloc.argtypes = [ctypes.c_size_t]
_libc.free.argtypes = [ctypes.c_void_p]


class _Zeros(ctypes.Structure):
    _fields_ = (("bytes", ctypes.c_char * _STACK_BYTES),)


def clear_what_is_freed() -> None:
    """Overwrite blocks of memory when they are freed, from now on, for the life of this process.

    Large blocks are given back to the system instead, which clears them.
    """
    if _has_glibc:
        _libc.mallopt(_M_MMAP_THRESHOLD, _LARGE_BYTES)
        _libc.mallopt(_M_PERTURB, _CLEAR)


def scrub_here() -> None:
    """Clear the small blocks that the calling thread has freed and keeps, and its unused stack."""
    # An argument of this size, which the function does not look at, is passed on the stack.
    _libc.getpid(_Zeros())
    if not _has_glibc:
        return
    taken = []
    for size in range(_LEAST_KEPT, _MOST_KEPT + 1, _STEP):
        for _ in range(_KEPT):
            block = _libc.malloc(size)
            if block:
                ctypes.memset(block, 0, size)
                taken.append(block)
    for block in taken:
        _libc.free(block)


def scrub(pools: Iterable[ThreadPoolExecutor] = ()) -> None:
    """Clear the small freed blocks of this thread and of pools, and give freed memory back.

    Args:
        pools: Pools of threads, this one not among them. A thread that is at work for long is left
            out.
    """
    trim_now()
    _clear_small_objects()
    scrub_here()
    for pool in pools:
        _on_each_thread(pool, len(pool._threads))
    trim_now()


def _clear_small_objects() -> None:
    """Clear the places of small freed objects, which Python keeps itself for objects of a size."""
    for size in range(_LEAST_OBJECT, _MOST_OBJECT + 1, _STEP):
        # They lie in free places as long as there are any; all of one size are alive at a time.
        list(map(bytes, (size - _BYTES_HEAD,) * _OBJECTS))


def _on_each_thread(pool: ThreadPoolExecutor, count: int) -> None:
    """Scrub on each of the threads of a pool."""
    together = threading.Barrier(max(count, 1))

    def work() -> None:
        scrub_here()
        # Until all have begun, so that none takes the work of two.
        with suppress(threading.BrokenBarrierError):
            together.wait(_WAIT_S)

    wait([pool.submit(work) for _ in range(count)], _WAIT_S)
