"""The free list, with kept blocks taken out of the order in which blocks are handed out.

Kept blocks are free: they count, and whoever needs them gets them. They just are not in the linked
list; the pool gives items back to it, whole, when it decides to or when the list runs dry.
"""

from __future__ import annotations

from collections.abc import Callable

from vllm.v1.core.kv_cache_utils import FreeKVCacheBlockQueue, KVCacheBlock

from vllm_mm_ext.policies.kv.item_registry import CachedItem


class KeepingQueue(FreeKVCacheBlockQueue):  # type: ignore[misc]
    """vLLM's free list for a pool that keeps items. Every operation is O(1) per block.

    Args:
        blocks: All blocks of the pool, all free.
        refill: Called with a number of blocks when the list holds fewer; it must then hold
            that many, if as many are free.

    Attributes:
        holders: By block id: the item whose tokens the block holds, or how many items need the
            text in it, or None.
        kept: Free blocks outside the list: those with holders.
    """

    def __init__(self, blocks: list[KVCacheBlock], refill: Callable[[int], None]) -> None:
        super().__init__(blocks)
        self._refill = refill
        self.holders: list[CachedItem | int | None] = [None] * len(blocks)
        self.kept = 0

    @property
    def listed(self) -> int:
        """Blocks in the list."""
        return int(self.num_free_blocks) - self.kept

    def popleft(self) -> KVCacheBlock:
        """The first block of the list."""
        return self.popleft_n(1)[0]

    def popleft_n(self, n: int) -> list[KVCacheBlock]:
        """The first blocks of the list.

        Args:
            n: How many; at most as many as are free.
        """
        if n > self.num_free_blocks - self.kept:
            self._refill(n)
        taken: list[KVCacheBlock] = super().popleft_n(n)
        return taken

    def keep(self, blocks: int) -> None:
        """Note that so many free blocks are kept, which are not in the list."""
        self.kept += blocks
        self.num_free_blocks += blocks

    def give_back(self, blocks: list[KVCacheBlock]) -> None:
        """Put kept blocks, which no item holds any more, at the end of the list."""
        self.keep(-len(blocks))
        self.append_n(blocks)
