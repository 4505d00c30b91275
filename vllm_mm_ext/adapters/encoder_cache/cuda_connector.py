"""The host tier for vLLM's second model runner: vLLM's CPU connector with the plugin's eviction.

vLLM owns the pinned region, the copy streams and the reports of finished copies. This module only
decides which items stay.
"""

from __future__ import annotations

import os
from contextlib import suppress
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
from vllm_mm_ext.adapters.encoder_cache.outputs import owned
from vllm_mm_ext.adapters.encoder_cache.startup import HostTierError, check_host_tier, host_bytes
from vllm_mm_ext.adapters.encoder_cache.transport_options import (
    CPU,
    TRANSPORT,
    is_shared,
    transport_of,
)
from vllm_mm_ext.policies.eviction.cost_aware import CostAware

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    import torch
    from vllm.config import VllmConfig
    from vllm.v1.core.sched.output import SchedulerOutput
    from vllm.v1.request import Request


class CostAwareEmbeddingCache(EmbeddingCache):  # type: ignore[misc]
    """vLLM's cache of blocks, which evicts the item of the lowest value density.

    Args:
        num_blocks: Number of blocks in the pinned region.
    """

    def __init__(self, num_blocks: int) -> None:
        super().__init__(num_blocks)
        self.ranks: CostAware[str] = CostAware()
        # Cost of the item that is allocated next, since vLLM does not pass it to ``alloc``.
        self.next_cost = 0.0
        self.adds = self.evictions = 0

    def alloc(
        self, key: str, n_blocks: int, shape: tuple[int, int] | None = None
    ) -> CacheEntry | None:
        """Take blocks for an item; None if too few blocks can be had, now or ever."""
        if not 0 < n_blocks <= self._num_blocks:
            return None
        entry = super().alloc(key, n_blocks, shape)
        if entry is not None:
            self.ranks.admit(key, n_blocks, self.next_cost)
            self.adds += 1
        return entry

    def discard(self, key: str) -> None:
        """Drop an item that was never filled."""
        super().discard(key)
        self.ranks.forget(key)

    def reset(self) -> None:
        """Forget all items, except those that are being copied; these go after their copies."""
        with self._lock:
            for key in list(self._entries_free_list):
                self._give_back(key)
                self.ranks.forget(key)

    def drop(self, key: str) -> None:
        """Forget an item, unless a copy uses it."""
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
            self.evictions += 1

    @property
    def used_blocks(self) -> int:
        """Blocks of all items."""
        free: int = len(self._free_blocks)
        return int(self._num_blocks) - free

    def _give_back(self, key: str) -> None:
        del self._entries_free_list[key]
        entry = self._entries.pop(key)
        self._evictable_block_count -= len(entry.block_ids)
        self._free_blocks.extend(entry.block_ids)


class CostAwareScheduler(ECCPUScheduler):  # type: ignore[misc]
    """vLLM's scheduler side with the plugin's eviction, which also forgets stale items."""

    def __init__(self, vllm_config: VllmConfig) -> None:
        super().__init__(vllm_config)
        # Workers, which vLLM builds first, have the region open. Without a name its memory is freed
        # however they end: a name would outlive those that are killed.
        with suppress(FileNotFoundError):
            os.unlink(self._region._mmap_path)
        self._region._is_creator = False
        self._cache = CostAwareEmbeddingCache(self._region.num_blocks)
        if self._producer_session is not None:
            # vLLM gave the session the cache that this one takes the place of.
            self._producer_session._cache = self._cache
        self._widths = vllm_config.ec_transfer_config.mm_encoder_output_widths
        # By item to be saved, the requests and indices it may be encoded for.
        self._planned: dict[str, list[tuple[Request, int]]] = {}
        # Items that were being copied when they were to be forgotten.
        self._stale: set[str] = set()
        self._loads = 0

    def has_cache_item(self, identifier: str) -> bool:
        """Whether an item can be loaded instead of encoded."""
        return identifier not in self._stale and super().has_cache_item(identifier)

    def embeddings_of(self, identifier: str, modality: str) -> int | None:  # noqa: ARG002
        """Number of an item's embeddings in the tier; None if the item is not there."""
        entry = self._cache.get(identifier) if self.has_cache_item(identifier) else None
        return None if entry is None or entry.shape is None else int(entry.shape[0])

    def follow_device(self, holds: Callable[[str], bool]) -> None:
        """The device tier makes no difference here."""

    def awaits(self, request: Request, index: int) -> bool:  # noqa: ARG002 - the interface
        """Whether an item that is not on the device is being encoded elsewhere: never."""
        return False

    def secured(self, request: Request, index: int) -> bool:  # noqa: ARG002 - the interface
        """Whether a request may use an item that is on the device: items come whole."""
        return True

    def update_state_after_alloc(self, request: Request, index: int) -> None:
        """Plan the load or save of an item for which the device tier has space now.

        Blocks for saves are taken at the end of the scheduling pass: an item that
        ``has_cache_item`` found must not be evicted before it is loaded.
        """
        feature = request.mm_features[index]
        key = feature.identifier
        if key in self._stale:
            return
        if self._cache.get(key) is None:
            # vLLM measures no width for embeddings that clients send, as nothing encodes them, and
            # none where nothing is saved.
            if feature.modality in self._widths:
                self._planned.setdefault(key, []).append((request, index))
        elif key not in self._pending_loads:
            self._loads += 1
            self._cache.ranks.hit(key)
            super().update_state_after_alloc(request, index)

    def build_connector_meta(self, scheduler_output: SchedulerOutput) -> Any:
        """End the scheduling pass; an item that is not encoded after all is not saved."""
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
        """Note finished copies, and drop stale items that no copy uses any more."""
        super().update_connector_output(connector_output)
        stale, self._stale = self._stale, set()
        self.forget(stale)

    def request_finished(self, request: Request) -> tuple[bool, dict[str, Any] | None]:
        """Forget a request; its answer tells where other instances find what they may share."""
        delayed, told = super().request_finished(request)
        return delayed, told and {key: told[key] for key in told if is_shared(key)}

    def _admit_item(self, request: Request, feature: Any, *rest: Any) -> bool:
        # Of what only a client named nothing is read from another instance.
        return not is_shared(feature.identifier) or bool(
            super()._admit_item(request, feature, *rest)
        )

    def used(self, key: str) -> None:
        """Note that a request found an item in the device tier."""
        if key in self._cache.ranks:
            self._cache.ranks.hit(key)

    def cancel(self, key: str) -> None:
        """Note that the device tier gave up an item that it allocated in this pass."""
        pending = self._pending_loads.pop(key, None)
        if pending is not None:
            del self._load_acks[pending[0]]
            self._cache.unpin(key)

    def items(self) -> list[tuple[str, int]]:
        """Key and bytes of each item."""
        block, found = self._region.block_size_bytes, []
        for key in self._cache.ranks.order():
            if (entry := self._cache.get(key)) is not None:
                found.append((key, len(entry.block_ids) * block))
        return found

    def forget(self, keys: Iterable[str]) -> None:
        """Overwrite and forget items; those that a copy uses, once it has ended."""
        for key in keys:
            entry = self._cache.get(key)
            if entry is None:
                continue
            if entry.evictable:
                for block in entry.block_ids:
                    self._region.blocks[block].zero_()
                self._cache.drop(key)
            else:
                self._stale.add(key)

    def figures(self) -> dict[str, float]:
        """Counts since the start, and what the tier holds, in bytes and items."""
        cache, block = self._cache, self._region.block_size_bytes
        return {
            "hits": self._loads,
            "adds": cache.adds,
            "evictions": cache.evictions,
            "bytes": cache.used_blocks * block,
            "capacity": self._region.num_blocks * block,
            "items": len(cache.ranks),
        }

    def reset(self) -> None:
        """Forget all items: the model's weights have changed."""
        self._cache.reset()
        self._stale = set(self._cache.ranks.order())


class CudaECConnector(ECCPUConnector):  # type: ignore[misc]
    """The host tier over vLLM's own transfers between device and pinned memory."""

    def __init__(self, vllm_config: VllmConfig, role: ECConnectorRole) -> None:
        check_host_tier(vllm_config)
        parallel = vllm_config.parallel_config
        executor = parallel.distributed_executor_backend
        if parallel.pipeline_parallel_size > 1 and executor != "mp":
            # The first stage copies, and reports when it is done.
            raise HostTierError(
                "with pipeline parallelism the host tier on CUDA needs "
                f"--distributed-executor-backend mp, got {executor}: others pass on what the last "
                "stage reports"
            )
        extra = vllm_config.ec_transfer_config.ec_connector_extra_config
        if extra.get("ec_enable_nixl") and transport_of(vllm_config.ec_transfer_config) != CPU:
            raise HostTierError(
                "the host tier serves its own engine only: remove ec_enable_nixl, or name "
                f"ec_connector_extra_config.{TRANSPORT}: {CPU}"
            )
        extra["ec_cpu_bytes"] = host_bytes(vllm_config)
        super().__init__(vllm_config, role)
        if role == ECConnectorRole.SCHEDULER:
            attach_host_tier(vllm_config, self.connector_scheduler)

    def _make_scheduler(self, vllm_config: VllmConfig) -> CostAwareScheduler:
        return CostAwareScheduler(vllm_config)

    def shutdown(self) -> None:
        """Shut down as vLLM does, but for a name of the region that is gone."""
        worker = self.connector_worker
        if worker is not None and not os.path.exists(worker._region._mmap_path):
            worker._region._is_creator = False
        super().shutdown()

    def start_load_caches(self, encoder_cache: dict[str, torch.Tensor], **_: Any) -> None:
        """Load what the scheduler planned; vLLM loads all of a step into one buffer."""
        super().start_load_caches(encoder_cache)
        for key in self._get_connector_metadata().loads:
            encoder_cache[key] = owned(encoder_cache[key])

    def start_save_caches(self, encoder_cache: dict[str, torch.Tensor], **_: Any) -> None:
        """Save planned items that are on the device already: the runner does not encode them."""
        for key in self._get_connector_metadata().saves:
            if key in encoder_cache:
                self.save_caches(encoder_cache, key)
