"""The KV cache of an engine as an operator sees it, and what is kept and dropped there."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable
from itertools import islice
from typing import Any

from vllm_mm_ext.adapters.kv.block_pool import MMExtBlockPool
from vllm_mm_ext.policies.kv.pieces import Piece, paths
from vllm_mm_ext.policies.kv.sessions import MAX_ENDS

# Items and sessions that are listed at most; the largest items, the sessions used last.
LISTED = 200

Wanted = Callable[[str], bool]


def pool_of(core: Any) -> MMExtBlockPool | None:
    """The plugin's block pool of an engine; None where it has vLLM's own.

    Args:
        core: vLLM's ``EngineCore``.
    """
    pool = core.scheduler.kv_cache_manager.block_pool
    return pool if isinstance(pool, MMExtBlockPool) else None


def _pieces(pool: MMExtBlockPool, wanted: Wanted) -> list[Piece]:
    """The cached pieces of some mm items."""
    return [
        piece
        for piece in pool.tree
        if (identifier := piece.content.identifier) is not None and wanted(identifier)
    ]


def pin(pool: MMExtBlockPool, wanted: Wanted, key: str) -> int:
    """Pin mm items that are cached now; returns in how many places.

    Args:
        pool: The block pool.
        wanted: Whether an item, named by its identifier, is one of them.
        key: Names the pin.
    """
    # What comes before a pinned piece stays with it, so the last ones are enough.
    found = _pieces(pool, wanted)
    before = paths(piece.parent for piece in found if piece.parent is not None)
    last = [piece for piece in found if piece not in before][:MAX_ENDS]
    if last:
        pool.settle(pool.sessions.pin(key))
    others = [pool.sessions.use(key, piece) for piece in last]
    pool.settle([*last, *(other for other in others if other is not None)])
    pinned = paths(last)
    return sum(piece.begins_item for piece in found if piece in pinned)


def unpin(pool: MMExtBlockPool, key: str) -> int:
    """End a pin; returns the number of its items."""
    ends = pool.sessions.release(key)
    pool.settle(ends)
    return sum(piece.begins_item for piece in paths(ends))


def let_go(pool: MMExtBlockPool, wanted: Wanted) -> int:
    """Stop keeping mm items, and what follows them; returns their number."""
    found = _pieces(pool, wanted)
    items = sum(piece.begins_item for piece in found)
    pool.let_go(found)
    return items


def view(pool: MMExtBlockPool) -> dict[str, Any]:
    """What the KV cache holds, as plain values."""
    media = sorted(pool.media(), key=lambda one: -one.blocks)
    tokens: Counter[str] = Counter()
    for one in media:
        tokens.update(one.modalities)
    now = time.monotonic()
    listed = [
        {
            "hash": one.identifier.rpartition(":")[2],
            "modality": one.modality,
            "blocks": one.blocks,
            "bytes": one.bytes,
            "tokens": one.tokens,
            "modalities": one.modalities,
            "hits": one.hits,
            "idle_s": round(now - one.last_use_s, 1),
            "sessions": one.sessions,
        }
        for one in media[:LISTED]
    ]
    return {
        "blocks": pool.num_gpu_blocks - 1,
        "block_bytes": pool.limits.block_bytes,
        "block_tokens": pool.hash_block_size,
        "pressure": pool.true_pressure(),
        "used": pool.num_gpu_blocks - 1 - pool.get_num_free_blocks(),
        "kept": pool.free_block_queue.kept,
        "quota": pool.limits.quota,
        "tokens": dict(tokens),
        "items": listed,
        "all_items": len(media),
        "sessions": [
            {
                "id": key,
                "pinned": pinned,
                "items": sum(piece.begins_item for piece in paths(ends)),
                "idle_s": round(now - max(end.last_use_s for end in ends), 1) if ends else None,
            }
            for key, pinned, ends in islice(pool.sessions.latest(), LISTED)
        ],
        "all_sessions": len(pool.sessions),
    }
