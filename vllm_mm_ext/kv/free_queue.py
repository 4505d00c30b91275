"""The free list, with kept blocks taken out of the order in which blocks are handed out.

Kept blocks are free: they count, and whoever needs them gets them. They just are not in the linked
list; the pool gives items back to it, whole, when it decides to or when the list runs dry.
"""

from __future__ import annotations

from collections.abc import Callable

from vllm.v1.core.kv_cache_utils import FreeKVCacheBlockQueue, KVCacheBlock

from vllm_mm_ext.kv.registry import CachedItem
from vllm_mm_ext.kv.retention import Retention


class KeepingQueue(FreeKVCacheBlockQueue):  # type: ignore[misc]
    """vLLM's free list for a pool that keeps items. Every operation is O(1) per block.

    Args:
        blocks: All blocks of the pool, all free.
        retention: Told when items become idle and busy.
        make_room: Called with a number of blocks when the list holds fewer; it must then hold
            that many, if as many are free.

    Attributes:
        claims: By block id, how many items hold the block.
        owners: By block id, the item whose own tokens it holds.
        kept: Free blocks outside the list.
    """

    def __init__(
        self,
        blocks: list[KVCacheBlock],
        retention: Retention,
        make_room: Callable[[int], None],
    ) -> None:
        super().__init__(blocks)
        self._retention = retention
        self._make_room = make_room
        self.claims = [0] * len(blocks)
        self.owners: list[CachedItem | None] = [None] * len(blocks)
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
            self._make_room(n)
        taken: list[KVCacheBlock] = super().popleft_n(n)
        return taken

    def remove(self, block: KVCacheBlock) -> None:
        """Take one block out, because a request hits it."""
        if not self.claims[block.block_id]:
            super().remove(block)
            return
        self.kept -= 1
        self.num_free_blocks -= 1
        item = self.owners[block.block_id]
        if item is not None:
            was_idle = item.idle
            item.free -= 1
            if was_idle:
                self._retention.busy(item)

    def append(self, block: KVCacheBlock) -> None:
        """Take back one block."""
        self.append_n([block])

    def append_n(self, blocks: list[KVCacheBlock]) -> None:
        """Take back blocks that are cached: those of items are kept, others go to the end."""
        claims = self.claims
        others = [block for block in blocks if not claims[block.block_id]]
        if len(others) != len(blocks):
            self._keep([block.block_id for block in blocks if claims[block.block_id]])
        super().append_n(others)

    def give_back(self, blocks: list[KVCacheBlock]) -> None:
        """Put kept blocks, which no item holds any more, at the end of the list."""
        self.kept -= len(blocks)
        self.num_free_blocks -= len(blocks)
        super().append_n(blocks)

    def _keep(self, block_ids: list[int]) -> None:
        self.kept += len(block_ids)
        self.num_free_blocks += len(block_ids)
        for block_id in block_ids:
            item = self.owners[block_id]
            if item is not None:
                item.free += 1
                if item.idle:
                    self._retention.settle(item)
