"""Takes mm items out of vLLM's processor cache."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any


def drop_inputs(cache: Any, hashes: Collection[str]) -> int:
    """Drop model inputs; returns the number of those that were there.

    A request that uses an input as well keeps it. Memory of this process is overwritten when the
    last one lets go of it (``heap_scrub``); shared memory is overwritten here, so no request may
    still have to read the items that are there.

    The halves of a cache that is in both processes stay alike if each drops the same items.

    Args:
        cache: vLLM's processor cache of this process, or its half of one; None without one.
        hashes: vLLM's hashes of the mm items.
    """
    if hasattr(cache, "_shm_cache"):
        return sum(_drop_shared(cache, one) for one in hashes)
    entries = getattr(cache, "_cache", None)
    if entries is None:
        return 0
    return sum(entries.pop(one, None) is not None for one in hashes)


def _drop_shared(cache: Any, mm_hash: str) -> bool:
    """Overwrite an item in shared memory, where its place is free once all readers are done.

    Only the API server, which writes the memory, knows of items.
    """
    storage = cache._shm_cache
    if mm_hash not in getattr(storage, "key_index", ()):
        return False
    address, number = storage.key_index.pop(mm_hash)
    name = f"taken down: {number}"
    storage.key_index[name] = address, number
    storage.id_index[number] = name
    with storage.ring_buffer.access_buf(address) as (view, _):
        view[storage.flag_bytes :] = bytes(len(view) - storage.flag_bytes)
    cache._p0_cache.pop(mm_hash, None)
    return True
