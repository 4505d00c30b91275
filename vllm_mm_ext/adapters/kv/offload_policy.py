"""Eviction from the host tier of vLLM's KV offloading, by the score of the KV blocks.

    --kv-transfer-config '{"kv_connector": "OffloadingConnector", "kv_role": "kv_both",
      "kv_connector_extra_config": {"cpu_bytes_to_use": 68719476736,
        "eviction_policy": "CostAwarePolicy",
        "cache_policy_module_path": "vllm_mm_ext.kv_offload"}}'

vLLM offloads to the host on CUDA only.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Sequence

from vllm.v1.kv_offload.base import OffloadKey, ReqContext
from vllm.v1.kv_offload.cpu.policies.base import CachePolicy, ChunkStatus, order_request_keys

from vllm_mm_ext.policies.eviction.cost_aware import CostAware
from vllm_mm_ext.policies.kv.item_registry import prefill_cost
from vllm_mm_ext.policies.kv.worst import Worst

# vLLM tells the policy nothing of the model; models of 7-8B parameters have this hidden size.
_HIDDEN_SIZE = 4096


class CostAwarePolicy(CachePolicy):  # type: ignore[misc]
    """Evicts the chunks whose memory is expected to save the least recomputation.

    All chunks of a request cost the same, the mean of what prefilling it takes per token: the
    first ones are cheaper to compute, but without them the others are useless. Of a request's
    chunks, which score alike, the last goes first.

    Args:
        cache_capacity: Chunks that fit.
    """

    def __init__(self, cache_capacity: int) -> None:
        super().__init__(cache_capacity)
        self.clear()

    def get(self, key: OffloadKey) -> ChunkStatus | None:
        """The chunk, if it is there."""
        return self._chunks.get(key)

    def insert(self, key: OffloadKey, chunk: ChunkStatus) -> None:
        """Take in a chunk; it is ranked when its request has finished."""
        self._chunks[key] = chunk
        self._renew(key)
        if chunk.ref_cnt == 0:
            self.mark_evictable(key)

    def remove(self, key: OffloadKey) -> None:
        """Drop a chunk whose store failed."""
        del self._chunks[key]
        self._turns.pop(key)
        self._scores.forget(key)
        if key in self._evictable:
            self._evictable.remove(key)

    def touch(self, keys: Iterable[OffloadKey], req_context: ReqContext) -> None:
        """Count a use of chunks."""
        self._use(list(keys), req_context)

    def on_store_miss(self, keys: Iterable[OffloadKey], req_context: ReqContext) -> None:
        """Nothing: evicted chunks are remembered by themselves."""

    def on_request_finished(
        self,
        key_groups: Sequence[Sequence[OffloadKey]],
        insertion_only_keys: set[OffloadKey],
        reused_keys: set[OffloadKey],
        req_context: ReqContext,
    ) -> None:
        """Count a use of what the request stored or found."""
        used = insertion_only_keys | reused_keys
        keys = [key for key in order_request_keys(key_groups, req_context) if key in used]
        self._use(keys, req_context)

    def evict(
        self, n: int, protected: set[OffloadKey]
    ) -> list[tuple[OffloadKey, ChunkStatus]] | None:
        """Drop ``n`` chunks that nobody reads and that are not protected; None, and no change, if
        there are fewer."""
        held = [key for key in protected if key in self._evictable]
        if len(self._evictable) - len(held) < n:
            return None
        for key in held:
            self._evictable.remove(key)
        gone = []
        for _ in range(n):
            key = self._evictable.worst()
            assert key is not None
            self._evictable.remove(key)
            gone.append((key, self._chunks.pop(key)))
            self._turns.pop(key)
            if key in self._scores:
                self._scores.evict(key)
        for key in held:
            self._evictable.add(key)
        return gone

    def clear(self) -> None:
        """Forget everything."""
        self._chunks: dict[OffloadKey, ChunkStatus] = {}
        self._scores: CostAware[OffloadKey] = CostAware(ghosts=self.cache_capacity)
        self._turns: dict[OffloadKey, int] = {}
        self._turn = 0
        self._evictable: Worst[OffloadKey] = Worst(self._rank, random.Random(0))

    def mark_evictable(self, key: OffloadKey) -> None:
        """Note that nobody reads or writes a chunk any more."""
        if key not in self._evictable:
            self._evictable.add(key)

    def mark_non_evictable(self, key: OffloadKey) -> None:
        """Note that a chunk is being read."""
        if key in self._evictable:
            self._evictable.remove(key)

    def _use(self, keys: list[OffloadKey], req_context: ReqContext) -> None:
        ends = [req_context.get_offload_key_position(key) or 0 for key in keys]
        length = max(ends, default=0)
        cost = prefill_cost(0, length, _HIDDEN_SIZE) / length if length else 1.0
        for key in reversed(keys):
            if key in self._chunks:
                self._scores.admit(key, 1.0, cost)
                self._renew(key)

    def _renew(self, key: OffloadKey) -> None:
        self._turn += 1
        self._turns[key] = self._turn
        # What is remembered of its rank is out of date.
        if key in self._evictable:
            self._evictable.remove(key)
            self._evictable.add(key)

    def _rank(self, key: OffloadKey) -> tuple[float, int]:
        # Chunks of requests in progress are about to be used.
        score = self._scores.score(key) if key in self._scores else float("inf")
        return score, self._turns[key]
