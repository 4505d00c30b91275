"""The names inside vLLM that the encoder cache relies on."""

from __future__ import annotations

from vllm_mm_ext.adapters.names.names_check import VllmName

_MANAGER = "vllm.v1.core.encoder_cache_manager:EncoderCacheManager"
_CONNECTORS = "vllm.distributed.ec_transfer.ec_connector"
_BASE = f"{_CONNECTORS}.base:ECConnectorBase"
_CPU = f"{_CONNECTORS}.cpu"

DEVICE_TIER_NAMES = (
    VllmName(f"{_MANAGER}.create_manager", ("cache_size", "vllm_config")),
    VllmName(f"{_MANAGER}.check_and_update_cache", ("request", "input_id")),
    VllmName(f"{_MANAGER}.get_cached_num_encoder_embeds", ("request", "input_id")),
    VllmName(
        f"{_MANAGER}.can_allocate",
        ("request", "input_id", "encoder_compute_budget", "num_embeds_to_schedule"),
    ),
    VllmName(f"{_MANAGER}.allocate", ("request", "input_id")),
    VllmName(f"{_MANAGER}.get_cached_input_ids", ("request",)),
    VllmName(f"{_MANAGER}.free_encoder_input", ("request", "input_id")),
    VllmName(f"{_MANAGER}.free", ("request",)),
    VllmName(f"{_MANAGER}.get_freed_mm_hashes"),
    VllmName(f"{_MANAGER}.get_manager_metadata"),
    VllmName(f"{_MANAGER}.reset"),
    VllmName("vllm.v1.core.encoder_cache_manager:EncoderDecoderCacheManager", ("cache_size",)),
    VllmName("vllm.v1.request:Request.get_num_encoder_embeds", ("input_id",)),
    VllmName("vllm.multimodal.inputs:PlaceholderRange", ("offset", "length")),
    VllmName("vllm.config:ModelConfig.get_inputs_embeds_size"),
)

HOST_TIER_NAMES = (
    VllmName(f"{_BASE}.__init__", ("vllm_config", "role")),
    VllmName(f"{_BASE}.start_load_caches", ("encoder_cache",)),
    VllmName(f"{_BASE}.save_caches", ("encoder_cache", "mm_hash")),
    VllmName(f"{_BASE}.has_cache_item", ("identifier",)),
    VllmName(f"{_BASE}.update_state_after_alloc", ("request", "index")),
    VllmName(f"{_BASE}.build_connector_meta", ("scheduler_output",)),
)

CUDA_HOST_TIER_NAMES = (
    *HOST_TIER_NAMES,
    VllmName(f"{_BASE}.start_save_caches"),
    VllmName(f"{_CPU}.connector:ECCPUConnector._make_scheduler", ("vllm_config",)),
    VllmName(f"{_CPU}.scheduler:ECCPUScheduler.update_state_after_alloc", ("request", "index")),
    VllmName(f"{_CPU}.scheduler:ECCPUScheduler.build_connector_meta", ("scheduler_output",)),
    VllmName(f"{_CPU}.scheduler:ECCPUScheduler.update_connector_output", ("connector_output",)),
    VllmName(
        f"{_CPU}.scheduler.embedding_cache:EmbeddingCache.alloc", ("key", "n_blocks", "shape")
    ),
    VllmName(f"{_CPU}.scheduler.embedding_cache:EmbeddingCache.discard", ("key",)),
    VllmName(f"{_CPU}.scheduler.embedding_cache:EmbeddingCache._evict_until", ("n_blocks",)),
    VllmName(
        f"{_CPU}.worker:ECCPUWorker.save_caches", ("encoder_cache", "mm_hash", "connector_metadata")
    ),
)

EMBEDS_NAMES = (VllmName("vllm.config:VllmConfig._resolve_mm_embedding_inputs", ("self",)),)
