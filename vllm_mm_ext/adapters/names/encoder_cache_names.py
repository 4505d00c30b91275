"""The names inside vLLM that the encoder cache relies on."""

from __future__ import annotations

from vllm_mm_ext.adapters.names.attributes_check import VllmAttributes
from vllm_mm_ext.adapters.names.base_names import PROCESSOR_CACHE_NAMES
from vllm_mm_ext.adapters.names.names_check import Checked, VllmName

_MANAGER = "vllm.v1.core.encoder_cache_manager:EncoderCacheManager"
_CONNECTORS = "vllm.distributed.ec_transfer.ec_connector"
_BASE = f"{_CONNECTORS}.base:ECConnectorBase"
_SCHEDULER = "vllm.v1.core.sched.scheduler:Scheduler"
_CPU = f"{_CONNECTORS}.cpu"

DEVICE_TIER_NAMES: tuple[Checked, ...] = (
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
    VllmName(f"{_SCHEDULER}._free_encoder_inputs", ("request",)),
    # What objects have and the plugin reads or sets.
    VllmAttributes(_MANAGER, ("cache_size", "num_freeable_slots")),
    VllmAttributes(
        "vllm.v1.request:Request", ("mm_features", "num_computed_tokens", "request_id", "status")
    ),
    VllmAttributes("vllm.v1.request:RequestStatus", ("RUNNING",)),
    VllmAttributes(
        "vllm.multimodal.inputs:MultiModalFeatureSpec",
        ("data", "identifier", "mm_position", "modality"),
    ),
    VllmAttributes(
        "vllm.multimodal.inputs:PlaceholderRange", ("get_num_embeds", "length", "offset")
    ),
    VllmAttributes(
        "vllm.config:VllmConfig",
        (
            "additional_config",
            "ec_transfer_config",
            "model_config",
            "num_prefill_lookahead_tokens",
            "scheduler_config",
        ),
    ),
    VllmAttributes("vllm.config:ModelConfig", ("dtype", "hf_config", "is_encoder_decoder")),
    VllmAttributes("vllm.config:SchedulerConfig", ("policy",)),
    VllmAttributes("vllm.config:ECTransferConfig", ("mm_encoder_output_widths",)),
)

HOST_TIER_NAMES: tuple[Checked, ...] = (
    VllmName(f"{_BASE}.__init__", ("vllm_config", "role")),
    VllmName(f"{_BASE}.start_load_caches", ("encoder_cache",)),
    VllmName(f"{_BASE}.save_caches", ("encoder_cache", "mm_hash")),
    VllmName(f"{_BASE}.has_cache_item", ("identifier",)),
    VllmName(f"{_BASE}.update_state_after_alloc", ("request", "index")),
    VllmName(f"{_BASE}.build_connector_meta", ("scheduler_output",)),
    VllmName(f"{_BASE}._get_connector_metadata"),
    VllmName(f"{_CONNECTORS}.base:ECConnectorMetadata"),
    VllmAttributes(f"{_CONNECTORS}.base:ECConnectorRole", ("SCHEDULER",)),
    VllmAttributes(
        "vllm.v1.core.sched.output:SchedulerOutput",
        ("scheduled_encoder_inputs", "total_num_scheduled_tokens"),
    ),
    VllmAttributes(
        "vllm.config:VllmConfig",
        ("ec_manager_config", "kv_transfer_config", "parallel_config", "use_v2_model_runner"),
    ),
    VllmAttributes(
        "vllm.config:ECTransferConfig",
        ("ec_connector_extra_config", "ec_role", "is_ec_consumer", "is_ec_producer"),
    ),
    VllmAttributes("vllm.config:EncoderCacheManagerConfig", ("encoder_cache_manager_cls",)),
    VllmAttributes("vllm.config:KVTransferConfig", ("is_kv_consumer",)),
    VllmAttributes("vllm.config:ModelConfig", ("multimodal_config",)),
    VllmAttributes("vllm.config:MultiModalConfig", ("allow_missing_mm_embeddings",)),
)

CUDA_HOST_TIER_NAMES: tuple[Checked, ...] = (
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
    VllmName(
        f"{_CPU}.scheduler:ECCPUScheduler._admit_item", ("request", "feature"), passed_on=True
    ),
    VllmName(f"{_CPU}.scheduler:ECCPUScheduler.request_finished", ("request",)),
    VllmName(f"{_CPU}.connector:ECCPUConnector.shutdown"),
    VllmAttributes(f"{_CPU}.connector:ECCPUConnector", ("connector_scheduler", "connector_worker")),
    VllmAttributes(f"{_CPU}.common:ECCPUConnectorMetadata", ("loads", "saves")),
    VllmAttributes(f"{_CPU}.session:ProducerSession", ("_cache",)),
    VllmAttributes(f"{_CPU}.worker:ECCPUWorker", ("_region",)),
    VllmAttributes(
        f"{_CPU}.scheduler:ECCPUScheduler",
        (
            *("_cache", "_load_acks", "_pending_loads", "_producer_session", "_region"),
            "has_cache_item",
        ),
    ),
    VllmAttributes(
        f"{_CPU}.ec_shared_region:ECSharedRegion",
        ("_is_creator", "_mmap_path", "block_size_bytes", "blocks", "num_blocks"),
    ),
    VllmAttributes(
        f"{_CPU}.scheduler.embedding_cache:EmbeddingCache",
        (
            "_entries",
            "_entries_free_list",
            "_evictable_block_count",
            "_free_blocks",
            "_lock",
            "_num_blocks",
            "get",
            "unpin",
        ),
    ),
    VllmAttributes(
        f"{_CPU}.scheduler.embedding_cache:CacheEntry", ("block_ids", "evictable", "shape")
    ),
    VllmAttributes(
        "vllm.config:ParallelConfig", ("distributed_executor_backend", "pipeline_parallel_size")
    ),
)

EMBEDS_NAMES: tuple[Checked, ...] = (
    VllmName("vllm.config:VllmConfig._resolve_mm_embedding_inputs", ("self",)),
    VllmAttributes("vllm.config:VllmConfig", ("ec_transfer_config",)),
    VllmAttributes("vllm.config:ECTransferConfig", ("ec_connector",)),
)

TRANSPORT_NAMES: tuple[Checked, ...] = (
    VllmName(f"{_BASE}.ensure_cache_available", ("request", "num_computed_tokens")),
    VllmName(f"{_BASE}.update_state_after_free", ("request", "index")),
    VllmName(f"{_BASE}.update_connector_output", ("connector_output",)),
    VllmName(f"{_BASE}.take_unavailable_requests"),
    VllmName(f"{_BASE}.request_finished", ("request",)),
    VllmName(f"{_BASE}.has_pending_push_work"),
    VllmName(f"{_BASE}.shutdown"),
    VllmName(f"{_BASE}.register_caches", ("ec_caches",)),
    VllmName(f"{_BASE}.start_worker_services"),
    VllmName(f"{_BASE}.bind_connector_metadata", ("connector_metadata",)),
    VllmName(f"{_BASE}.clear_connector_metadata"),
    VllmName(f"{_BASE}.start_save_caches"),
    VllmName(f"{_BASE}.get_finished", ("finished_req_ids",)),
    VllmName(f"{_BASE}.build_connector_worker_meta"),
    VllmName(f"{_CONNECTORS}.example_connector:ECExampleConnector", ("vllm_config", "role")),
    VllmName(f"{_CONNECTORS}.mooncake_ec_connector:ECMooncakeConnector", ("vllm_config", "role")),
    VllmName("vllm.utils.gpu_sync_debug:gpu_sync_allowed"),
    VllmName("vllm.platforms:current_platform"),
    VllmAttributes(_BASE, ("is_consumer", "is_producer")),
    VllmAttributes("vllm.v1.request:Request", ("ec_transfer_params", "num_prompt_tokens")),
    VllmAttributes("vllm.config:ECTransferConfig", ("engine_id",)),
    VllmAttributes("vllm.config:ParallelConfig", ("data_parallel_index", "rank")),
    VllmAttributes("vllm.config:VllmConfig", ("max_concurrent_batches",)),
    VllmAttributes("vllm.platforms.interface:Platform", ("device_type", "is_cuda_alike")),
)

_RENDERER = "vllm.renderers.base:BaseRenderer"
_PROCESSING = "vllm.multimodal.processing"

# Items of videos that another instance has decoded.
BARE_NAMES: tuple[Checked, ...] = (
    VllmName(
        "vllm.multimodal.cache.base:BaseMultiModalReceiverCache.get_and_update_features",
        ("mm_features",),
    ),
    *PROCESSOR_CACHE_NAMES,
    VllmAttributes("vllm.multimodal.inputs:MultiModalFieldElem", ("data",)),
    VllmAttributes("vllm.outputs:RequestOutput", ("outputs",)),
    VllmAttributes("vllm.outputs:CompletionOutput", ("finish_reason", "token_ids")),
)

SHARED_NAMES: tuple[Checked, ...] = (
    VllmName("vllm.engine.arg_utils:EngineArgs.create_engine_config", ("self",)),
    VllmName(f"{_PROCESSING}.processor:BaseMultiModalProcessor._get_mm_hashes", ("inputs",)),
    VllmName(f"{_PROCESSING}.inputs:ProcessorInputs.get_mm_hashes", ("model_id", "hash_algorithm")),
    VllmName(
        f"{_RENDERER}._process_mm_uuids",
        ("mm_data", "mm_data_items", "mm_uuid_items"),
        passed_on=True,
    ),
    VllmName(f"{_RENDERER}._validate_mm_uuids", ("mm_data", "mm_data_items", "mm_uuid_items")),
    VllmName(f"{_PROCESSING}.context:InputProcessingContext.get_mm_config"),
    *BARE_NAMES,
    # What a failed load of an output undoes.
    VllmName(f"{_SCHEDULER}.update_from_output", ("scheduler_output", "model_runner_output")),
    VllmName(f"{_SCHEDULER}.reset_prefix_cache", ("reset_running_requests",)),
    VllmName(f"{_BASE}.build_connector_worker_meta"),
    VllmName(f"{_CONNECTORS}.base:ECConnectorWorkerMetadata.aggregate", ("other",)),
    VllmName(f"{_SCHEDULER}._free_request_blocks", ("request",)),
    VllmAttributes(
        _SCHEDULER,
        (
            *("connector", "ec_connector", "encoder_cache_manager", "encoder_cache_mismatch_reqs"),
            *("kv_holding_waiting", "requests"),
        ),
    ),
    VllmAttributes(
        "vllm.v1.request:Request",
        ("drop_stale_output", "num_computed_tokens", "num_stale_output_tokens", "status"),
    ),
    VllmAttributes("vllm.v1.request:RequestStatus", ("WAITING_FOR_STREAMING_REQ",)),
    VllmAttributes("vllm.v1.outputs:ModelRunnerOutput", ("ec_connector_output",)),
    VllmAttributes("vllm.v1.outputs:ECConnectorOutput", ("ec_connector_worker_meta",)),
    VllmAttributes(_RENDERER, ("model_config",)),
    VllmAttributes(
        "vllm.config:VllmConfig",
        ("additional_config", "ec_transfer_config", "model_config", "scheduler_config"),
    ),
    VllmAttributes("vllm.config:SchedulerConfig", ("max_num_batched_tokens",)),
    VllmName("vllm.version:__version__"),
    VllmAttributes("vllm.config:ECTransferConfig", ("ec_connector", "ec_connector_extra_config")),
    VllmAttributes(
        "vllm.config:ModelConfig",
        (
            *("dtype", "hf_overrides", "max_model_len", "model", "multimodal_config"),
            *("quantization", "revision"),
        ),
    ),
    VllmAttributes(
        "vllm.config:MultiModalConfig",
        (
            *("media_io_kwargs", "mm_encoder_attn_dtype", "mm_encoder_fp8_scale_path"),
            *("mm_hasher_algorithm", "mm_processor_kwargs", "video_pruning_rate"),
        ),
    ),
)
