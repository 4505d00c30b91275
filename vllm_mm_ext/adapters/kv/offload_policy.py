"""Eviction from the host tier of vLLM's KV offloading, by the score that KV blocks have.

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

from vllm_mm_ext.adapters.names.kv_names import KNOWN_POLICY_METHODS, OFFLOAD_NAMES
from vllm_mm_ext.adapters.names.names_check import problem
from vllm_mm_ext.policies.eviction.reuse_history import ReuseHistory
from vllm_mm_ext.policies.eviction.sampled_worst import SampledWorst
from vllm_mm_ext.policies.kv.pieces import prefill_cost

# vLLM tells the policy nothing of the model; models of 7-8B parameters have this hidden size.
_HIDDEN_SIZE = 4096


def offload_problem() -> str | None:
    """What of vLLM is not as the policy needs it; None if all is."""
    unknown = CachePolicy.__abstractmethods__ - set(KNOWN_POLICY_METHODS)
    if unknown:
        return f"vLLM's cache policies have {', '.join(sorted(unknown))} now"
    return problem(OFFLOAD_NAMES)


class CostAwarePolicy(CachePolicy):  # type: ignore[misc]
    """Evicts the chunks of KV whose memory is expected to save the least recomputation.

    All chunks of a request have the same cost: the mean of what prefilling the request takes per
    token. The first chunks are cheaper to compute, but without them the others are useless. Of the
    chunks of one request, which have equal scores, the policy evicts the last chunk first.

    Args:
        cache_capacity: Chunks that fit into the host tier.

    Raises:
        RuntimeError: vLLM's interface for cache policies is not one that this policy knows.
    """

    def __init__(self, cache_capacity: int) -> None:
        changed = offload_problem()
        if changed is not None:
            raise RuntimeError(
                f"mm_ext: CostAwarePolicy does not fit this vLLM: {changed}. Without "
                "eviction_policy and cache_policy_module_path vLLM uses a policy of its own."
            )
        super().__init__(cache_capacity)
        self.clear()

    def get(self, key: OffloadKey) -> ChunkStatus | None:
        """The chunk of a key; None if the tier does not hold it."""
        return self._chunks.get(key)

    def insert(
        self,
        key: OffloadKey,
        chunk: ChunkStatus,
        req_context: ReqContext | None = None,  # noqa: ARG002 - vLLM 0.33 and later give it
    ) -> None:
        """Take in a chunk; the policy ranks the chunk when its request has finished."""
        self._chunks[key] = chunk
        self._renew(key)
        if chunk.ref_cnt == 0:
            self.mark_evictable(key)

    def remove(self, key: OffloadKey) -> None:
        """Drop a chunk whose store failed."""
        del self._chunks[key]
        self._last_uses.pop(key)
        self._history.forget(key)
        self._costs.pop(key, None)
        if key in self._evictable:
            self._evictable.remove(key)

    def touch(self, keys: Iterable[OffloadKey], req_context: ReqContext) -> None:
        """Count one use of each chunk."""
        self._use(list(keys), req_context)

    def on_store_miss(self, keys: Iterable[OffloadKey], req_context: ReqContext) -> None:
        """Do nothing: the scores remember evicted chunks by themselves."""

    def on_request_finished(
        self,
        key_groups: Sequence[Sequence[OffloadKey]],
        insertion_only_keys: set[OffloadKey],
        reused_keys: set[OffloadKey],
        req_context: ReqContext,
    ) -> None:
        """Count one use of each chunk that a request stored or found."""
        used = insertion_only_keys | reused_keys
        keys = [key for key in order_request_keys(key_groups, req_context) if key in used]
        self._use(keys, req_context)

    def evict(
        self, n: int, protected: set[OffloadKey]
    ) -> list[tuple[OffloadKey, ChunkStatus]] | None:
        """Evict chunks that nobody reads.

        Args:
            n: How many chunks.
            protected: Keys of chunks that must stay.

        Returns:
            What was evicted; None, with nothing changed, if fewer than ``n`` chunks may go.
        """
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
            self._last_uses.pop(key)
            if self._costs.pop(key, None) is not None:
                self._history.evict(key)
        for key in held:
            self._evictable.add(key)
        return gone

    def clear(self) -> None:
        """Forget everything."""
        self._chunks: dict[OffloadKey, ChunkStatus] = {}
        self._history: ReuseHistory[OffloadKey] = ReuseHistory(ghosts=self.cache_capacity)
        # By chunk, what computing it again takes.
        self._costs: dict[OffloadKey, float] = {}
        self._last_uses: dict[OffloadKey, int] = {}
        self._uses = 0
        self._evictable: SampledWorst[OffloadKey] = SampledWorst(self._rank, random.Random(0))

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
            if key not in self._chunks:
                continue
            if key in self._history:
                self._history.use(key)
            else:
                self._history.add(key)
            self._costs[key] = cost
            self._renew(key)
        self._history.tick()

    def _renew(self, key: OffloadKey) -> None:
        self._uses += 1
        self._last_uses[key] = self._uses
        self._evictable.rank_changed(key)

    def _rank(self, key: OffloadKey) -> tuple[float, int]:
        # Chunks of requests in progress are about to be used.
        cost = self._costs.get(key)
        score = float("inf") if cost is None else cost * self._history.rate(key)
        return score, self._last_uses[key]
