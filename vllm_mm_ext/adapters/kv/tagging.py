"""Makes blocks of requests part of the mm items whose tokens the blocks hold."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from vllm.v1.core.kv_cache_utils import KVCacheBlock
from vllm.v1.request import Request

from vllm_mm_ext.adapters.kv.free_queue import KeepingQueue
from vllm_mm_ext.policies.kv.item_registry import (
    ENCODE_COST,
    CachedItem,
    Registry,
    prefill_cost,
)
from vllm_mm_ext.policies.kv.modalities import ModalityMap
from vllm_mm_ext.policies.kv.placement import Placement
from vllm_mm_ext.policies.kv.retention import Retention
from vllm_mm_ext.policies.kv.sessions import Sessions, session_key


@dataclass(frozen=True, slots=True)
class Prefix:
    """Blocks of a running request in one KV cache group.

    Attributes:
        request: The request.
        blocks: The request's blocks, from the first on.
        block_size: Tokens per block.
        group: KV cache group.
        hit: Whether the blocks were found in the cache, not computed.
        sparse: Whether vLLM never looks some of the blocks up, so that these have no hash.
    """

    request: Request
    blocks: Sequence[KVCacheBlock]
    block_size: int
    group: int
    hit: bool
    sparse: bool = False


class Tagger:
    """Makes blocks part of items.

    Args:
        queue: The free list, which knows the holder of each block.
        registry: The cached items.
        retention: The order in which items are given up.
        sessions: Conversations; the tagger tells them which session uses which item.
        hash_block_size: Tokens per block hash.
        hidden_size: Hidden size of the language model.
        audio_token: The token that stands for sound inside a video item, if the model has one.
    """

    def __init__(
        self,
        queue: KeepingQueue,
        registry: Registry,
        retention: Retention,
        sessions: Sessions,
        hash_block_size: int,
        hidden_size: int,
        audio_token: int | None = None,
    ) -> None:
        self._queue = queue
        self._registry = registry
        self._retention = retention
        self._sessions = sessions
        self._hash_block_size = hash_block_size
        self._hidden_size = hidden_size
        self._audio_token = audio_token

    def tag(self, prefix: Prefix, indices: range) -> None:
        """Make blocks part of their items.

        Args:
            prefix: The blocks that a request uses.
            indices: Indices of the blocks that are new to the request.
        """
        placement = Placement(prefix.request.mm_features, self._hash_block_size)
        for index, own in placement.runs(indices, prefix.block_size):
            # Attention windows leave holes.
            blocks = _cached(prefix, own)
            item = self._use(prefix, placement, index) if blocks else None
            if item is not None:
                self._claim(item, prefix, placement.before(index, prefix.block_size), own)

    def _use(self, prefix: Prefix, placement: Placement, index: int) -> CachedItem | None:
        """A request's item, kept from now on; None if what comes before the item cannot be kept."""
        request = prefix.request
        key = self._key(request, placement, index)
        item = self._registry.get(key)
        if item is None:
            self._keep_before(prefix, placement, index)
            before = placement.parent(index)
            parent = None
            if before is not None:
                parent = self._registry.get(self._key(request, placement, before))
                if parent is None:
                    return None
            feature = request.mm_features[index]
            item = self._registry.add(key, feature.identifier, feature.modality, parent)
            if parent is not None:
                self._retention.reconsider(parent)
        # A preempted request that finds its own blocks again is no new use.
        if not (prefix.hit and request.num_preemptions):
            item.hits += prefix.hit
            item.renewed = True
        item.last_use_s = self._sessions.now()
        if request.session_id is not None:
            session = session_key(request.session_id, request.cache_salt)
            changed = self._sessions.use(session, item.number)
            # Its request may use equal blocks of its own, so that the item itself is idle.
            for number in {*changed, item.number}:
                affected = self._registry.numbered(number)
                if affected is not None:
                    self._retention.reconsider(affected)
        return item

    def _keep_before(self, prefix: Prefix, placement: Placement, index: int) -> None:
        """Keep given-up items before an item again: the request uses their blocks."""
        first = index
        while (before := placement.parent(first)) is not None:
            if self._registry.get(self._key(prefix.request, placement, before)) is not None:
                break
            first = before
        if first != index:
            start, stop = (
                prefix.request.mm_features[i].mm_position.offset // prefix.block_size
                for i in (first, index)
            )
            self.tag(prefix, range(start, stop))

    def _key(self, request: Request, placement: Placement, index: int) -> bytes:
        found = placement.hash_index(index)
        assert found is not None
        return bytes(request.block_hashes[found])

    def _claim(self, item: CachedItem, prefix: Prefix, before: range, own: range) -> None:
        """Let an item hold a request's blocks, unless the item holds equal blocks already.

        Requests that computed the same at the same time have a block each; one of them is enough.
        """
        reached = item.reached.get(prefix.group)
        if reached is None:
            self._claim_text(item, prefix, before)
            reached = own.start
        if reached >= own.stop:
            return
        new = range(reached, own.stop)
        item.reached[prefix.group] = own.stop
        blocks = _cached(prefix, new)
        if blocks and item.blocks and item.idle:
            self._retention.busy(item)
        holders = self._queue.holders
        for block_id in blocks:
            holders[block_id] = item
        item.blocks += blocks
        self._count(item, prefix, new, len(blocks), ENCODE_COST)

    def _claim_text(self, item: CachedItem, prefix: Prefix, indices: range) -> None:
        holders = self._queue.holders
        blocks = _cached(prefix, indices)
        for block_id in blocks:
            needed = holders[block_id]
            holders[block_id] = needed + 1 if isinstance(needed, int) else 1
        item.before += blocks
        self._count(item, prefix, indices, len(blocks), 0.0)

    def _count(
        self, item: CachedItem, prefix: Prefix, indices: range, blocks: int, encode: float
    ) -> None:
        """Add blocks to an item's tokens and cost; ``encode`` is that of encoding a token."""
        if prefix.group == 0 and blocks:
            size = prefix.block_size
            item.tokens += blocks * size
            self._count_modalities(item, prefix, indices, blocks)
            prefill = prefill_cost(indices.start * size, indices.stop * size, self._hidden_size)
            item.cost += prefill * blocks / len(indices) + encode * blocks * size

    def _count_modalities(
        self, item: CachedItem, prefix: Prefix, indices: range, blocks: int
    ) -> None:
        """Add the positions of blocks by modality; where some are not kept, their share."""
        request, size = prefix.request, prefix.block_size
        modalities = ModalityMap(request.mm_features, request.prompt_token_ids, self._audio_token)
        counted = modalities.counts(range(indices.start * size, indices.stop * size))
        for name, count in counted.items():
            before = item.modalities.get(name, 0.0)
            item.modalities[name] = before + count * blocks / len(indices)


def _cached(prefix: Prefix, indices: range) -> list[int]:
    """Ids of a request's blocks that later requests can find."""
    blocks = prefix.blocks[indices.start : indices.stop]
    if prefix.sparse:
        return [block.block_id for block in blocks if block.block_hash is not None]
    return [block.block_id for block in blocks if not block.is_null]
