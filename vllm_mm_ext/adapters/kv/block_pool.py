"""vLLM's block pool, whose blocks know which mm item they hold and which keeps media longer."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from vllm.v1.core.block_pool import BlockPool
from vllm.v1.core.kv_cache_utils import KVCacheBlock
from vllm.v1.request import Request

from vllm_mm_ext.adapters.kv.free_queue import KeepingQueue
from vllm_mm_ext.adapters.kv.tagging import Prefix, Tagger
from vllm_mm_ext.policies.kv.item_registry import CachedItem, CachedMedia, Registry, merge
from vllm_mm_ext.policies.kv.placement import end_of
from vllm_mm_ext.policies.kv.retention import Retention
from vllm_mm_ext.policies.kv.sessions import Sessions


@dataclass(frozen=True)
class Limits:
    """How many blocks the pool may keep.

    Attributes:
        quota: Kept blocks that no request uses, at most.
        floor: Blocks that are to be free and not kept. Below it the pool gives items up.
        min_items: Idle items that the pool keeps whatever quota and floor say.
        hidden_size: Hidden size of the language model, which recomputation costs depend on.
        block_bytes: Size of a KV block in bytes.
    """

    quota: int
    floor: int
    min_items: int
    hidden_size: int
    block_bytes: int


class MMExtBlockPool(BlockPool):  # type: ignore[misc]
    """A block pool that keeps media and the text before them.

    Every operation costs O(1) per block, on average.

    Args:
        args, kwargs: Arguments of vLLM's block pool.
        limits: How many blocks the pool may keep.
        sessions: Conversations, whose media the pool gives up last.
        audio_token: The token that stands for sound inside a video item, if the model has one.
    """

    def __init__(
        self,
        *args: Any,
        limits: Limits,
        sessions: Sessions,
        audio_token: int | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        self.limits = limits
        self.sessions = sessions
        self.registry = Registry()
        self.retention = Retention(sessions)
        self.free_block_queue = KeepingQueue(self.blocks, self._refill)
        # The new list holds all blocks again; the first is the null block, as before.
        assert self.free_block_queue.popleft() is self.null_block
        self._tagger = Tagger(
            self.free_block_queue,
            self.registry,
            self.retention,
            sessions,
            self.hash_block_size,
            limits.hidden_size,
            audio_token,
        )

    def true_pressure(self) -> float:
        """Share of the blocks that requests use or that the pool keeps, 0 to 1.

        Other cached text does not count. vLLM's own usage counts kept blocks as free: requests that
        need them get them.
        """
        total = self.num_gpu_blocks - 1
        return 1.0 - self.free_block_queue.listed / total if total else 0.0

    # --- what blocks hold -------------------------------------------------------------------------

    def cache_full_blocks(
        self,
        request: Request,
        blocks: list[KVCacheBlock],
        num_cached_blocks: int,
        num_full_blocks: int,
        block_size: int,
        kv_cache_group_id: int,
        block_mask: list[bool] | None = None,
    ) -> None:
        """Cache blocks as vLLM does, and make blocks of media part of their item."""
        super().cache_full_blocks(
            request,
            blocks,
            num_cached_blocks,
            num_full_blocks,
            block_size,
            kv_cache_group_id,
            block_mask,
        )
        features = request.mm_features
        if features and num_cached_blocks * block_size < end_of(features[-1]):
            sparse = block_mask is not None
            prefix = Prefix(request, blocks, block_size, kv_cache_group_id, False, sparse)
            self._tagger.tag(prefix, range(num_cached_blocks, num_full_blocks))

    def found(
        self, request: Request, blocks: Sequence[KVCacheBlock], block_size: int, group: int
    ) -> None:
        """Note that a request was admitted with a cached prefix.

        The pool keeps items of the request again that it had given up and that are still cached.

        Args:
            request: The request, which uses the blocks by now.
            blocks: The request's cached blocks, from the first on.
            block_size: Tokens per block.
            group: KV cache group.
        """
        if request.mm_features:
            prefix = Prefix(request, blocks, block_size, group, True, sparse=True)
            self._tagger.tag(prefix, range(len(blocks)))

    # --- who goes first ---------------------------------------------------------------------------

    def get_new_blocks(self, num_blocks: int) -> list[KVCacheBlock]:
        """Take blocks as vLLM does, and give up kept items where nothing else is free."""
        taken: list[KVCacheBlock] = super().get_new_blocks(num_blocks)
        queue = self.free_block_queue
        if queue.kept and queue.listed < self.limits.floor:
            self._balance()
        return taken

    def touch(self, blocks: Sequence[KVCacheBlock]) -> None:
        """Note uses as vLLM does; an item that a request uses cannot be given up."""
        others, kept, holders = self._parted(blocks)
        super().touch(others)
        if not kept:
            return
        idle = []
        for block, holder in zip(kept, holders, strict=True):
            if not block.ref_cnt:
                idle.append(holder)
            block.ref_cnt += 1
            if self.metrics_collector:
                self.metrics_collector.on_block_accessed(block)
        self.free_block_queue.keep(-len(idle))
        for each, count in Counter(idle).items():
            if not isinstance(each, int):
                each.free -= count
                if each.free + count == len(each.blocks):
                    self.retention.busy(each)

    def free_blocks(self, ordered_blocks: Iterable[KVCacheBlock]) -> None:
        """Free blocks as vLLM does, but keep those of items."""
        others, kept, holders = self._parted(list(ordered_blocks))
        super().free_blocks(others)
        if not kept:
            return
        idle = []
        # Blocks of several requests may come at once, and shared ones then repeatedly.
        for block, holder in zip(kept, holders, strict=True):
            block.ref_cnt -= 1
            if not block.ref_cnt:
                idle.append(holder)
        self.free_block_queue.keep(len(idle))
        # In the order they are met: of a request, the last item first.
        for each, count in Counter(idle).items():
            if not isinstance(each, int):
                each.free += count
                if each.free == len(each.blocks):
                    self.retention.settle(each)
        self._balance()

    def _parted(
        self, blocks: Sequence[KVCacheBlock]
    ) -> tuple[Sequence[KVCacheBlock], list[KVCacheBlock], list[CachedItem | int]]:
        """Blocks that no item holds, blocks that items hold, and the holders of the latter."""
        all_holders = self.free_block_queue.holders
        held = [all_holders[block.block_id] for block in blocks]
        if not any(held):
            return blocks, [], []
        others = [block for block, holder in zip(blocks, held, strict=True) if not holder]
        kept = [block for block, holder in zip(blocks, held, strict=True) if holder]
        return others, kept, [holder for holder in held if holder]

    def release(self, items: Iterable[int]) -> None:
        """Stop keeping items and all items after them; their blocks stay cached like any text.

        Args:
            items: Numbers of the items; unknown numbers are ignored.
        """
        for number in items:
            item = self.registry.numbered(number)
            if item is not None:
                for each in self.registry.descendants(item):
                    self._release(each)

    def reprotect(self, items: Iterable[int]) -> None:
        """Note that sessions protect items in another way than before."""
        for number in items:
            item = self.registry.numbered(number)
            if item is not None:
                self.retention.reconsider(item)

    def _balance(self) -> None:
        queue, limits = self.free_block_queue, self.limits
        while queue.kept > limits.quota or queue.num_free_blocks - queue.kept < limits.floor:
            item = None
            if self.retention.idle > limits.min_items:
                self.reprotect(self.sessions.expire())
                item = self.retention.victim()
            if item is None:
                return
            self._release(item)

    def _refill(self, num_blocks: int) -> None:
        queue = self.free_block_queue
        self.reprotect(self.sessions.expire())
        while queue.listed < num_blocks and (item := self.retention.victim()) is not None:
            self._release(item)
        if queue.listed >= num_blocks:
            return
        # Attention windows free the first blocks of items that are in use.
        for item in sorted(self.registry, key=lambda item: -item.number):
            if queue.listed >= num_blocks:
                return
            self._release(item)

    def _release(self, item: CachedItem) -> None:
        """Give the blocks of an item without children to the list, the last one first."""
        queue, blocks = self.free_block_queue, self.blocks
        self.retention.give_up(item)
        self.sessions.forget_item(item.number)
        self.registry.remove(item)
        if item.parent is not None:
            self.retention.reconsider(item.parent)
        holders = queue.holders
        freed = []
        for block_id in reversed(item.blocks):
            holders[block_id] = None
            freed.append(blocks[block_id])
        if item.free < len(freed):
            freed = [block for block in freed if block.ref_cnt == 0]
        for block_id in reversed(item.before):
            needed = holders[block_id]
            assert isinstance(needed, int)
            holders[block_id] = needed - 1 or None
            if needed == 1 and blocks[block_id].ref_cnt == 0:
                freed.append(blocks[block_id])
        queue.give_back(freed)

    # --- what else may happen to blocks -----------------------------------------------------------

    def evict_blocks(self, block_ids: set[int]) -> None:
        """Evict blocks as vLLM does, and stop keeping what follows them: no request finds it."""
        for block_id in block_ids:
            self._let_go(block_id)
        super().evict_blocks(block_ids)

    def unpin_blocks(
        self, blocks: Iterable[KVCacheBlock], on_reuse: Callable[[KVCacheBlock], None]
    ) -> None:
        """Unpin blocks as vLLM does, and stop keeping them."""
        blocks = list(blocks)
        for block in blocks:
            self._let_go(block.block_id)
        super().unpin_blocks(blocks, on_reuse)

    def move_block_hashes(self, src_block: KVCacheBlock, dst_block: KVCacheBlock) -> None:
        """Move hashes as vLLM does; the pool does not keep the copy."""
        self._let_go(src_block.block_id)
        super().move_block_hashes(src_block, dst_block)

    def _let_go(self, block_id: int) -> None:
        if self.free_block_queue.holders[block_id] is not None:
            self.release([item.number for item in self.registry.holding(block_id)])

    def reset_prefix_cache(self) -> bool:
        """Empty the cache as vLLM does; returns False, and does nothing, while requests run."""
        if not super().reset_prefix_cache():
            return False
        queue = self.free_block_queue
        kept = [block for block in self.blocks if queue.holders[block.block_id] is not None]
        queue.holders[:] = [None] * len(queue.holders)
        queue.give_back(kept)
        self.registry.clear()
        self.retention.clear()
        self.sessions.clear_items()
        return True

    def holds(self, block_id: int) -> CachedItem | None:
        """The kept mm item whose tokens are in a block; None for text and for items given up.

        A block in which an item ends and other text begins counts as text before the next item.
        """
        holder = self.free_block_queue.holders[block_id]
        return holder if isinstance(holder, CachedItem) else None

    def media(self) -> list[CachedMedia]:
        """The media that are cached, latest use first."""
        sessions = {item.number: self.sessions.ids(item.number) for item in self.registry}
        return merge(self.registry, self.limits.block_bytes, sessions)

    def check_integrity(self) -> None:
        """Raise ``AssertionError`` if blocks, items and free list disagree; for tests. O(pool)."""
        queue = self.free_block_queue
        listed = queue.get_all_free_blocks()
        ids = {block.block_id for block in listed}
        assert len(ids) == len(listed) == queue.listed
        holders: list[CachedItem | int | None] = [None] * self.num_gpu_blocks
        for item in self.registry:
            for block_id in item.blocks:
                assert holders[block_id] is None
                holders[block_id] = item
            assert item.free == sum(self.blocks[i].ref_cnt == 0 for i in item.blocks)
        for item in self.registry:
            for block_id in item.before:
                needed = holders[block_id] or 0
                assert isinstance(needed, int)
                holders[block_id] = needed + 1
        assert all(a is b or a == b for a, b in zip(holders, queue.holders, strict=True))
        kept = 0
        for block in self.blocks:
            held = holders[block.block_id] is not None
            if held:
                assert not block.is_null
                # vLLM drops hashes of Mamba states that requests in progress replace.
                key = block.block_hash
                assert key is None or self.cached_block_hash_to_block.contain(key, block.block_id)
            free = block.ref_cnt == 0 and not block.is_null
            kept += free and held
            assert (block.block_id in ids) == (free and not held), block
        assert kept == queue.kept
        self.registry.check_integrity()
        self.retention.check_integrity(self.registry)
        self.sessions.check_integrity()
