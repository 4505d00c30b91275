"""From a request's blocks to the items they hold."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import IntEnum

from vllm.v1.core.kv_cache_utils import KVCacheBlock
from vllm.v1.request import Request

from vllm_mm_ext.kv.free_queue import KeepingQueue
from vllm_mm_ext.kv.placement import Placement
from vllm_mm_ext.kv.registry import ENCODE_COST, CachedItem, Registry, prefill_cost
from vllm_mm_ext.kv.retention import Retention
from vllm_mm_ext.kv.sessions import Sessions


class Kind(IntEnum):
    """What a cached block holds; where an item begins or ends inside, that of its first token."""

    TEXT = 0
    IMAGE = 1
    AUDIO = 2
    VIDEO = 3
    OTHER = 4


_KINDS: dict[str | None, Kind] = {
    None: Kind.TEXT,
    "image": Kind.IMAGE,
    "audio": Kind.AUDIO,
    "video": Kind.VIDEO,
}


@dataclass(frozen=True, slots=True)
class Prefix:
    """Blocks of a running request in one KV cache group.

    Attributes:
        request: The request.
        blocks: Its blocks, from the first on.
        block_size: Tokens per block.
        group: KV cache group.
        hit: They were found in the cache, not computed.
    """

    request: Request
    blocks: Sequence[KVCacheBlock]
    block_size: int
    group: int
    hit: bool


class Tagger:
    """Makes blocks part of items. O(1) per block, O(log n) per item.

    Args:
        queue: Holds the tags of blocks that belong to items.
        registry: The items.
        retention: Their ranks.
        sessions: Told which session uses which item.
        hash_block_size: Tokens per block hash.
        hidden_size: Of the language model.
        kinds: By block id, a ``Kind``; changed.
    """

    def __init__(
        self,
        queue: KeepingQueue,
        registry: Registry,
        retention: Retention,
        sessions: Sessions,
        hash_block_size: int,
        hidden_size: int,
        kinds: bytearray,
    ) -> None:
        self._queue = queue
        self._registry = registry
        self._retention = retention
        self._sessions = sessions
        self._hash_block_size = hash_block_size
        self._hidden_size = hidden_size
        self._kinds = kinds

    def tag(self, prefix: Prefix, indices: range) -> None:
        """Note what some blocks of a request hold, and keep what belongs to an item.

        Args:
            prefix: The request's blocks, which it uses.
            indices: Which of them.
        """
        placement = Placement(prefix.request.mm_features, self._hash_block_size)
        for run in placement.runs(indices, prefix.block_size):
            for i in (*run.text, *run.own):
                kind = _KINDS.get(placement.medium_at(i * prefix.block_size), Kind.OTHER)
                self._kinds[prefix.blocks[i].block_id] = kind
            # Attention windows leave holes, and blocks that are never looked up.
            if run.item is None or not any(_is_cached(prefix.blocks[i]) for i in run.own):
                continue
            item = self._use(prefix, placement, run.item)
            if item is not None:
                before = placement.before(run.item, prefix.block_size)
                self._claim(item, item.before, prefix, before)
                self._claim(item, item.blocks, prefix, run.own)

    def _use(self, prefix: Prefix, placement: Placement, index: int) -> CachedItem | None:
        """A request's item, kept from now on; None if what comes before it cannot be."""
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
            self._sessions.use(request.session_id, item.number)
        return item

    def _keep_before(self, prefix: Prefix, placement: Placement, index: int) -> None:
        """Keep the items before one again that were given up; the request uses their blocks."""
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

    def _claim(
        self,
        item: CachedItem,
        table: dict[tuple[int, int], int],
        prefix: Prefix,
        indices: Iterable[int],
    ) -> None:
        own = table is item.blocks
        was_idle = bool(item.blocks) and item.idle
        for i in indices:
            block = prefix.blocks[i]
            # Requests that computed the same at the same time have a block each; one is enough.
            if (prefix.group, i) in table or not _is_cached(block):
                continue
            table[prefix.group, i] = block.block_id
            self._queue.claims[block.block_id] += 1
            if own:
                self._queue.owners[block.block_id] = item
            if prefix.group == 0:
                start, stop = i * prefix.block_size, (i + 1) * prefix.block_size
                item.tokens += prefix.block_size
                item.cost += prefill_cost(start, stop, self._hidden_size)
                item.cost += ENCODE_COST * prefix.block_size * own
        if was_idle and not item.idle:
            self._retention.busy(item)


def _is_cached(block: KVCacheBlock) -> bool:
    return not block.is_null and block.block_hash is not None
