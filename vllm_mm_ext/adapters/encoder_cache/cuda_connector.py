"""The host tier where vLLM's second model runner is used: its CPU connector with our eviction.

vLLM owns the pinned region, the copy streams and the reports of what has arrived; here is only
what it should keep.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from vllm.distributed.ec_transfer.ec_connector.base import ECConnectorRole
from vllm.distributed.ec_transfer.ec_connector.cpu.connector import ECCPUConnector
from vllm.distributed.ec_transfer.ec_connector.cpu.scheduler import ECCPUScheduler
from vllm.distributed.ec_transfer.ec_connector.cpu.scheduler.embedding_cache import (
    CacheEntry,
    EmbeddingCache,
)

from vllm_mm_ext.adapters.encoder_cache.manager import attach_host_tier
from vllm_mm_ext.adapters.encoder_cache.mm_features import feature_cost
from vllm_mm_ext.adapters.encoder_cache.startup import HostTierError, check_host_tier, host_bytes
from vllm_mm_ext.policies.eviction.cost_aware import CostAware

if TYPE_CHECKING:
    import torch
    from vllm.config import VllmConfig
    from vllm.v1.core.sched.output import SchedulerOutput
    from vllm.v1.request import Request


class CostAwareEmbeddingCache(EmbeddingCache):  # type: ignore[misc]
    """vLLM's cache of blocks, but what is evicted is the least worth keeping.

    Args:
        num_blocks: Blocks of the region.
    """

    def __init__(self, num_blocks: int) -> None:
        super().__init__(num_blocks)
        self.ranks: CostAware[str] = CostAware()
        # Of the item that is allocated next: ``alloc`` is not told.
        self.next_cost = 0.0

    def alloc(
        self, key: str, n_blocks: int, shape: tuple[int, int] | None = None
    ) -> CacheEntry | None:
        """Blocks for an item; None if they are in use, or more than there are."""
        if not 0 < n_blocks <= self._num_blocks:
            return None
        entry = super().alloc(key, n_blocks, shape)
        if entry is not None:
            self.ranks.admit(key, n_blocks, self.next_cost)
        return entry

    def discard(self, key: str) -> None:
        """Give up an item that was never filled."""
        super().discard(key)
        self.ranks.forget(key)

    def reset(self) -> None:
        """Forget all items but those that copies are under way for; those go when they are done."""
        with self._lock:
            for key in list(self._entries_free_list):
                self._give_back(key)
                self.ranks.forget(key)

    def drop(self, key: str) -> None:
        """Forget an item that no copy uses."""
        with self._lock:
            if key in self._entries_free_list:
                self._give_back(key)
                self.ranks.forget(key)

    def _evict_until(self, n_blocks: int) -> None:
        while len(self._free_blocks) < n_blocks:
            key = self.ranks.victim(self._entries_free_list.__contains__)
            assert key is not None
            self._give_back(key)
            self.ranks.evict(key)

    def _give_back(self, key: str) -> None:
        del self._entries_free_list[key]
        entry = self._entries.pop(key)
        self._evictable_block_count -= len(entry.block_ids)
        self._free_blocks.extend(entry.block_ids)


class CostAwareScheduler(ECCPUScheduler):  # type: ignore[misc]
    """vLLM's scheduler side, with our eviction; it forgets what was given up or has gone stale."""

    def __init__(self, vllm_config: VllmConfig) -> None:
        super().__init__(vllm_config)
        self._cache = CostAwareEmbeddingCache(self._region.num_blocks)
        self._widths = vllm_config.ec_transfer_config.mm_encoder_output_widths
        # By item to be saved, the requests and indices it may be encoded for.
        self._planned: dict[str, list[tuple[Request, int]]] = {}
        # Items that were being copied when the model's weights changed.
        self._stale: set[str] = set()

    def has_cache_item(self, identifier: str) -> bool:
        """Whether an item can be loaded instead of encoded."""
        return identifier not in self._stale and super().has_cache_item(identifier)

    def update_state_after_alloc(self, request: Request, index: int) -> None:
        """The device tier has room for an item now: plan its load or save.

        Blocks for what is to be saved are taken at the end of the pass: what ``has_cache_item``
        found must not be evicted before it is loaded.
        """
        feature = request.mm_features[index]
        key = feature.identifier
        # A width that was not measured: the client's own embeddings, nothing is encoded.
        if key in self._stale or feature.modality not in self._widths:
            return
        if self._cache.get(key) is None:
            self._planned.setdefault(key, []).append((request, index))
        elif key not in self._pending_loads:
            self._cache.ranks.hit(key)
            super().update_state_after_alloc(request, index)

    def build_connector_meta(self, scheduler_output: SchedulerOutput) -> Any:
        """End the pass; what is not encoded after all is not saved."""
        scheduled = scheduler_output.scheduled_encoder_inputs
        for needed in self._planned.values():
            for request, index in needed:
                if index in scheduled.get(request.request_id, ()):
                    self._cache.next_cost = feature_cost(request.mm_features[index])
                    super().update_state_after_alloc(request, index)
                    break
        self._planned.clear()
        return super().build_connector_meta(scheduler_output)

    def update_connector_output(self, connector_output: Any) -> None:
        """Note which copies are done."""
        super().update_connector_output(connector_output)
        for key in list(self._stale):
            entry = self._cache.get(key)
            if entry is None or entry.evictable:
                self._cache.drop(key)
                self._stale.discard(key)

    def used(self, key: str) -> None:
        """The device tier had an item."""
        if key in self._cache.ranks:
            self._cache.ranks.hit(key)

    def cancel(self, key: str) -> None:
        """The device tier gave up an item that it allocated in this pass."""
        pending = self._pending_loads.pop(key, None)
        if pending is not None:
            del self._load_acks[pending[0]]
            self._cache.unpin(key)

    def reset(self) -> None:
        """Forget everything."""
        self._cache.reset()
        self._stale = set(self._cache.ranks.order())


class CudaECConnector(ECCPUConnector):  # type: ignore[misc]
    """The host tier on vLLM's own transfers between device and pinned memory."""

    def __init__(self, vllm_config: VllmConfig, role: ECConnectorRole) -> None:
        check_host_tier(vllm_config)
        if vllm_config.parallel_config.pipeline_parallel_size > 1:
            # Reports of finished copies come from the last stage, and copies are made in the first.
            raise HostTierError("the host tier on CUDA does not go with pipeline parallelism")
        extra = vllm_config.ec_transfer_config.ec_connector_extra_config
        if extra.get("ec_enable_nixl"):
            raise HostTierError("the host tier serves its own engine only: remove ec_enable_nixl")
        extra["ec_cpu_bytes"] = host_bytes(vllm_config)
        super().__init__(vllm_config, role)
        if role == ECConnectorRole.SCHEDULER:
            attach_host_tier(vllm_config, self.connector_scheduler)

    def _make_scheduler(self, vllm_config: VllmConfig) -> CostAwareScheduler:
        return CostAwareScheduler(vllm_config)

    def start_save_caches(self, encoder_cache: dict[str, torch.Tensor], **_: Any) -> None:
        """Save what is on the device already, as the runner will not encode that again."""
        for key in self._get_connector_metadata().saves:
            if key in encoder_cache:
                self.save_caches(encoder_cache, key)
