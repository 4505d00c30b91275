"""vLLM's free list without the blocks that the pool keeps.

Kept blocks are free: they count as free, and a request that needs them gets them. They are only not
in the linked list from which blocks are taken. The pool gives blocks back to the list when it
gives them up, mostly as the list runs dry.
"""

from __future__ import annotations

from collections.abc import Callable

from vllm.v1.core.kv_cache_utils import FreeKVCacheBlockQueue, KVCacheBlock

from vllm_mm_ext.policies.kv.pieces import Piece


class KeepingQueue(FreeKVCacheBlockQueue):  # type: ignore[misc]
    """vLLM's free list for a pool that keeps pieces. Every operation is O(1) per block.

    Args:
        blocks: All blocks of the pool, all free.
        refill: Called with a number of blocks when the list holds fewer. The list must hold that
            many afterwards, if as many are free.

    Attributes:
        holders: By block id, the piece that the block is part of, or None.
        kept: Number of free blocks that are not in the list because they have holders.
    """

    def __init__(self, blocks: list[KVCacheBlock], refill: Callable[[int], None]) -> None:
        super().__init__(blocks)
        self._refill = refill
        self.holders: list[Piece | None] = [None] * len(blocks)
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
        """Count free blocks that the pool keeps and that are not in the list."""
        self.kept += blocks
        self.num_free_blocks += blocks

    def give_back(self, blocks: list[KVCacheBlock]) -> None:
        """Put kept blocks that no piece holds any more at the end of the list."""
        self.keep(-len(blocks))
        self.append_n(blocks)
