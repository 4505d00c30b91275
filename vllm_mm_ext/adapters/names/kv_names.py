"""The names inside vLLM that the KV block pool relies on."""

from __future__ import annotations

from vllm_mm_ext.adapters.names.attributes_check import VllmAttributes
from vllm_mm_ext.adapters.names.names_check import Checked, VllmName

_CORE = "vllm.v1.core"
_POOL = f"{_CORE}.block_pool:BlockPool"
_QUEUE = f"{_CORE}.kv_cache_utils:FreeKVCacheBlockQueue"
_CACHE = ("request", "blocks", "num_cached_blocks", "num_full_blocks", "block_size")

POOL_NAMES: tuple[Checked, ...] = (
    VllmName(
        f"{_CORE}.sched.scheduler:Scheduler.__init__",
        ("vllm_config", "kv_cache_config", "structured_output_manager"),
        passed_on=True,
    ),
    VllmName(f"{_CORE}.kv_cache_coordinator:BlockPool"),
    VllmName(f"{_POOL}.__init__", ("num_gpu_blocks", "enable_caching", "hash_block_size")),
    VllmName(f"{_POOL}.cache_full_blocks", (*_CACHE, "kv_cache_group_id", "block_mask")),
    VllmName(
        f"{_POOL}.cache_partial_block",
        (
            "request",
            "block",
            "num_tokens",
            "kv_cache_group_id",
            "block_size",
            "replace_existing_hashes",
        ),
    ),
    VllmName(f"{_POOL}.get_new_blocks", ("num_blocks",)),
    VllmName(f"{_POOL}.free_blocks", ("ordered_blocks",)),
    VllmName(f"{_POOL}.touch", ("blocks",)),
    VllmName(f"{_POOL}._remove_cached_block_hashes", ("block",)),
    VllmName(f"{_POOL}.evict_blocks", ("block_ids",)),
    VllmName(f"{_POOL}.unpin_blocks", ("blocks", "on_reuse")),
    VllmName(f"{_POOL}.move_block_hashes", ("src_block", "dst_block")),
    VllmName(f"{_POOL}.reset_prefix_cache", ("self",)),
    VllmName(f"{_QUEUE}.__init__", ("blocks",)),
    VllmName(f"{_QUEUE}.popleft", ("self",)),
    VllmName(f"{_QUEUE}.popleft_n", ("n",)),
    VllmName(f"{_QUEUE}.remove", ("block",)),
    VllmName(f"{_QUEUE}.append", ("block",)),
    VllmName(f"{_QUEUE}.append_n", ("blocks",)),
    VllmName(
        f"{_CORE}.kv_cache_manager:KVCacheManager.allocate_slots",
        ("request", "num_new_tokens", "num_new_computed_tokens"),
    ),
    VllmName(f"{_CORE}.sched.scheduler:Scheduler._preempt_request", ("request",), passed_on=True),
    VllmName(f"{_CORE}.kv_cache_utils:BlockHashWithGroupId"),
    VllmName(f"{_CORE}.kv_cache_utils:KVCacheBlock.block_hash_num_tokens"),
    VllmName(f"{_CORE}.single_type_kv_cache_manager:SingleTypeKVCacheManager"),
    VllmName("vllm.config:AttentionConfig.hisparse_config"),
    # Names requests of one that asks for several answers.
    VllmName("vllm.v1.engine.parallel_sampling:ParentRequest.get_child_info", ("index",)),
    VllmName(
        "vllm.v1.request:Request.__init__",
        ("mm_features", "session_id", "cache_salt", "block_hasher"),
        passed_on=True,
    ),
    VllmName(
        "vllm.multimodal.inputs:MultiModalFeatureSpec", ("modality", "identifier"), passed_on=True
    ),
    VllmName(f"{_CORE}.kv_cache_metrics:KVCacheMetricsCollector.on_block_accessed", ("block",)),
    VllmName(f"{_CORE}.block_pool:BlockHashToBlockMap.contain", ("key", "block_id")),
    VllmName(f"{_CORE}.block_pool:BlockHashToBlockMap.get_one_block", ("key",)),
    # What objects have and the plugin reads or sets.
    VllmAttributes(
        _POOL,
        (
            "blocks",
            "cached_block_hash_to_block",
            "free_block_queue",
            "hash_block_size",
            "metrics_collector",
            "null_block",
            "num_gpu_blocks",
        ),
    ),
    VllmAttributes(_QUEUE, ("get_all_free_blocks", "num_free_blocks")),
    VllmAttributes(
        f"{_CORE}.kv_cache_utils:KVCacheBlock", ("block_hash", "block_id", "is_null", "ref_cnt")
    ),
    VllmAttributes(f"{_CORE}.kv_cache_manager:KVCacheManager", ("block_pool", "coordinator")),
    VllmAttributes(f"{_CORE}.kv_cache_coordinator:KVCacheCoordinator", ("single_type_managers",)),
    VllmAttributes(
        f"{_CORE}.single_type_kv_cache_manager:SingleTypeKVCacheManager",
        ("block_pool", "block_size", "req_to_blocks"),
    ),
    VllmAttributes(
        f"{_CORE}.sched.scheduler:Scheduler", ("encoder_cache_manager", "kv_cache_manager")
    ),
    VllmAttributes(f"{_CORE}.encoder_cache_manager:EncoderCacheManager", ("cached",)),
    VllmAttributes(
        "vllm.v1.request:Request",
        (
            "arrival_time",
            "block_hashes",
            "cache_salt",
            "mm_features",
            "num_computed_tokens",
            "num_preemptions",
            "prompt_token_ids",
            "request_id",
            "session_id",
        ),
    ),
    VllmAttributes(
        "vllm.multimodal.inputs:MultiModalFeatureSpec", ("identifier", "modality", "mm_position")
    ),
    VllmAttributes("vllm.multimodal.inputs:PlaceholderRange", ("length", "offset")),
    VllmAttributes("vllm.v1.kv_cache_interface:KVCacheConfig", ("kv_cache_tensors", "num_blocks")),
    VllmAttributes("vllm.v1.kv_cache_interface:KVCacheTensor", ("size",)),
    VllmAttributes(
        "vllm.config:VllmConfig",
        (
            *("additional_config", "attention_config", "kv_transfer_config", "model_config"),
            "num_prefill_lookahead_tokens",
        ),
    ),
    VllmAttributes("vllm.config:KVTransferConfig", ("kv_connector", "kv_connector_extra_config")),
    VllmAttributes("vllm.config:ModelConfig", ("get_hidden_size", "hf_config")),
)

CONTROL_NAMES: tuple[Checked, ...] = (
    VllmName("vllm.v1.engine.core:EngineCore.reset_prefix_cache", ("self",)),
    VllmName("vllm.v1.engine.core_client:AsyncMPClient.call_utility_async", ("method",)),
    VllmAttributes("vllm.v1.engine.core:EngineCore", ("scheduler",)),
    VllmAttributes(f"{_CORE}.sched.scheduler:Scheduler", ("kv_cache_manager",)),
    VllmAttributes(f"{_CORE}.kv_cache_manager:KVCacheManager", ("block_pool",)),
)

_POLICY = "vllm.v1.kv_offload.cpu.policies.base:CachePolicy"

# What the eviction policy of the host tier overrides and calls. vLLM 0.33 gives ``insert`` a
# ``req_context``, which 0.32 does not have.
OFFLOAD_NAMES: tuple[Checked, ...] = (
    VllmName(f"{_POLICY}.__init__", ("cache_capacity",)),
    VllmName(f"{_POLICY}.get", ("key",)),
    VllmName(f"{_POLICY}.insert", ("key", "chunk"), passed_on=True),
    VllmName(f"{_POLICY}.remove", ("key",)),
    VllmName(f"{_POLICY}.touch", ("keys", "req_context")),
    VllmName(f"{_POLICY}.on_store_miss", ("keys", "req_context")),
    VllmName(
        f"{_POLICY}.on_request_finished",
        ("key_groups", "insertion_only_keys", "reused_keys", "req_context"),
    ),
    VllmName(f"{_POLICY}.evict", ("n", "protected")),
    VllmName(f"{_POLICY}.clear"),
    VllmName(f"{_POLICY}.mark_evictable", ("key",)),
    VllmName(f"{_POLICY}.mark_non_evictable", ("key",)),
    VllmName(
        "vllm.v1.kv_offload.cpu.policies.base:order_request_keys", ("key_groups", "req_context")
    ),
    VllmName("vllm.v1.kv_offload.base:ReqContext.get_offload_key_position", ("key",)),
    VllmName("vllm.v1.kv_offload.base:OffloadKey"),
    VllmAttributes(_POLICY, ("cache_capacity",)),
    VllmAttributes("vllm.v1.kv_offload.cpu.policies.base:ChunkStatus", ("ref_cnt",)),
)

# What vLLM wants of every cache policy.
KNOWN_POLICY_METHODS = ("clear", "evict", "get", "insert", "remove", "touch")
