"""Puts the plugin's block pool into vLLM, and tells the pool what vLLM's scheduler does."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

from vllm_mm_ext.adapters.patches import replace_attribute, set_meanwhile, wrap
from vllm_mm_ext.adapters.vllm_compat import logger
from vllm_mm_ext.config.kv_settings import KVSettings
from vllm_mm_ext.config.root import MMExtConfig
from vllm_mm_ext.policies.kv.control import KVControl

GIB = 1 << 30
_SIMPLE_OFFLOAD = "SimpleCPUOffloadConnector"
# Made of the connectors that its ``kv_connector_extra_config`` lists.
_MULTI = "MultiConnector"


def install() -> None:
    """Give the plugin's block pool to every scheduler that is built from now on. Idempotent."""
    from vllm.v1.core.kv_cache_manager import KVCacheManager
    from vllm.v1.core.sched.scheduler import Scheduler

    wrap(Scheduler, "__init__", _with_pool)
    wrap(Scheduler, "_preempt_request", _without_uncomputed_blocks)
    wrap(KVCacheManager, "allocate_slots", _noting_hits)


def install_control() -> None:
    """Let API processes reach the block pool (``control.KVClient``). Idempotent."""
    from vllm.v1.engine.core import EngineCore

    from vllm_mm_ext.policies.kv import control

    def mm_ext_kv(self: Any, action: str, session_id: str) -> Any:
        return control.answer(control_of(self.scheduler), action, session_id)

    replace_attribute(EngineCore, control.UTILITY, mm_ext_kv)


def control_of(scheduler: Any) -> KVControl | None:
    """The control of a scheduler's block pool; None if the pool is not the plugin's."""
    from vllm_mm_ext.adapters.kv.block_pool import MMExtBlockPool

    pool = scheduler.kv_cache_manager.block_pool
    return KVControl(pool) if isinstance(pool, MMExtBlockPool) else None


def _with_pool(original: Callable[..., Any]) -> Callable[..., Any]:
    def init(self: Any, vllm_config: Any, kv_cache_config: Any, *args: Any, **kwargs: Any) -> None:
        settings = MMExtConfig.from_additional_config(vllm_config.additional_config).kv
        user = user_of_vllms_pool(vllm_config)
        if user is not None and settings.enabled:
            logger.warning("mm_ext: kv is off, %s needs vLLM's own block pool", user)
        if user is not None or not settings.enabled:
            original(self, vllm_config, kv_cache_config, *args, **kwargs)
            return
        model = vllm_config.model_config
        factory = pool_factory(
            settings,
            kv_cache_config,
            model.get_hidden_size(),
            # Only the composer has sound inside its video items.
            getattr(model.hf_config, "audio_pad_token_id", None),
            vllm_config.num_prefill_lookahead_tokens,
        )
        with pools_of(factory):
            original(self, vllm_config, kv_cache_config, *args, **kwargs)
        outputs = self.encoder_cache_manager
        # The plugin's manager knows of the host tier, too; that of encoder-decoders keeps nothing.
        holds = getattr(outputs, "holds", None) or getattr(outputs, "cached", {}).__contains__
        self.kv_cache_manager.block_pool.ask_for_outputs(holds)

    return init


def user_of_vllms_pool(vllm_config: Any) -> str | None:
    """What in an engine cannot work with the plugin's block pool; None if nothing is there."""
    if vllm_config.attention_config.hisparse_config is not None:
        # Moves blocks between pools of its own.
        return "HiSparse"
    transfer = vllm_config.kv_transfer_config
    if transfer is not None and _offloads_lazily(
        transfer.kv_connector, transfer.kv_connector_extra_config
    ):
        # Copies cached blocks from vLLM's list of free ones, and the plugin's pool keeps cached
        # blocks out of that list until they are needed.
        return f"{_SIMPLE_OFFLOAD} with lazy_offload"
    return None


def _offloads_lazily(connector: str | None, extra: Mapping[str, Any]) -> bool:
    """Whether a KV connector, or one of those that it is made of, has ``lazy_offload`` set."""
    if connector == _MULTI:
        return any(
            _offloads_lazily(
                child.get("kv_connector"), child.get("kv_connector_extra_config") or {}
            )
            for child in extra.get("connectors") or ()
        )
    return connector == _SIMPLE_OFFLOAD and bool(extra.get("lazy_offload"))


@contextmanager
def pools_of(factory: Callable[..., Any]) -> Iterator[None]:
    """Let vLLM's KV cache coordinators build their block pool with ``factory``."""
    from vllm.v1.core import kv_cache_coordinator

    with set_meanwhile(
        kv_cache_coordinator, "vllm.v1.core.kv_cache_coordinator:BlockPool", factory
    ):
        yield


def pool_factory(
    settings: KVSettings,
    kv_cache_config: Any,
    hidden_size: int,
    audio_token: int | None = None,
    read_ahead: int = 0,
) -> partial[Any]:
    """A factory of block pools with these settings.

    Args:
        settings: The section ``kv``.
        kv_cache_config: vLLM's ``KVCacheConfig``.
        hidden_size: Hidden size of the language model.
        audio_token: The token that stands for sound inside a video item, if the model has one.
        read_ahead: Tokens after a token that a drafter makes the KV of this token of.
    """
    from vllm_mm_ext.adapters.kv.block_pool import MMExtBlockPool
    from vllm_mm_ext.adapters.kv.pool_limits import Limits

    # All tensors are views of one allocation, and each tensor tells the size of that allocation.
    total = max((tensor.size for tensor in kv_cache_config.kv_cache_tensors), default=0)
    # One block is vLLM's null block.
    blocks = kv_cache_config.num_blocks - 1
    block_bytes = total // kv_cache_config.num_blocks
    quota = int(settings.max_visual_cache_share * blocks)
    if settings.max_visual_cache_gb is not None:
        quota = min(blocks, int(settings.max_visual_cache_gb * GIB) // max(1, block_bytes))
    limits = Limits(
        quota=quota,
        floor=round((1.0 - settings.pressure_limit) * blocks),
        min_items=settings.min_items,
        hidden_size=hidden_size,
        block_bytes=block_bytes,
    )
    return partial(MMExtBlockPool, limits=limits, audio_token=audio_token, read_ahead=read_ahead)


def _noting_hits(original: Callable[..., Any]) -> Callable[..., Any]:
    from vllm_mm_ext.adapters.kv.block_pool import MMExtBlockPool

    def allocate_slots(
        self: Any,
        request: Any,
        num_new_tokens: int,
        num_new_computed_tokens: int = 0,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        made = original(self, request, num_new_tokens, num_new_computed_tokens, *args, **kwargs)
        pool = self.block_pool
        # Of a request that is being admitted nothing is computed yet.
        if made is None or request.num_computed_tokens or not isinstance(pool, MMExtBlockPool):
            return made
        if num_new_computed_tokens:
            for group, manager in enumerate(self.coordinator.single_type_managers):
                found = num_new_computed_tokens // manager.block_size
                blocks = manager.req_to_blocks[request.request_id][:found]
                pool.found(request, blocks, manager.block_size, group)
        pool.admitted(request)
        return made

    return allocate_slots


def _without_uncomputed_blocks(original: Callable[..., Any]) -> Callable[..., Any]:
    """Take blocks that were cached, and will not be computed, out of the prefix cache.

    vLLM caches a request's blocks when it schedules their tokens. A priority scheduler may preempt
    the request later in the same pass. vLLM then leaves the blocks in the prefix cache, although
    no model run will fill them.
    """

    def preempt_request(self: Any, request: Any, *args: Any, **kwargs: Any) -> Any:
        # A pass adds the tokens that it schedules to these only at its end.
        computed = request.num_computed_tokens
        for manager in self.kv_cache_manager.coordinator.single_type_managers:
            uncomputed = {
                block.block_id
                for block in manager.req_to_blocks.get(request.request_id, ())
                if (block.block_hash_num_tokens or 0) > computed
            }
            manager.block_pool.evict_blocks(uncomputed)
        return original(self, request, *args, **kwargs)

    return preempt_request
