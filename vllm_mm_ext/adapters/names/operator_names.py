"""The names inside vLLM that the operator's page and takedowns rely on."""

from __future__ import annotations

from vllm_mm_ext.adapters.names.attributes_check import VllmAttributes
from vllm_mm_ext.adapters.names.kv_names import CONTROL_NAMES, POOL_NAMES
from vllm_mm_ext.adapters.names.live_route_names import LIVE_ROUTE_NAMES
from vllm_mm_ext.adapters.names.names_check import Checked, VllmName

_SCHEDULER = "vllm.v1.core.sched.scheduler:Scheduler"
_CACHE = "vllm.multimodal.cache"
_KV_CONNECTORS = "vllm.distributed.kv_transfer.kv_connector.v1"
_SPEECH = "vllm.entrypoints.speech_to_text"
_QUEUE = "vllm.distributed.device_communicators.shm_broadcast"
_SHM = "vllm.distributed.device_communicators.shm_object_storage"

OPERATOR_NAMES: tuple[Checked, ...] = (
    *CONTROL_NAMES,
    *POOL_NAMES,
    *LIVE_ROUTE_NAMES,
    VllmName("vllm.v1.engine.core_client:AsyncMPClient.call_utility_all_async", ("method",)),
    VllmName(
        f"{_SPEECH}.transcription.serving:OpenAIServingTranscription.create_transcription",
        ("audio_data",),
        passed_on=True,
    ),
    VllmName(
        f"{_SPEECH}.translation.serving:OpenAIServingTranslation.create_translation",
        ("audio_data",),
        passed_on=True,
    ),
    VllmName("vllm.v1.executor:Executor.collective_rpc", ("method", "args")),
    VllmAttributes("vllm.v1.executor:Executor", ("sleeping_tags",)),
    VllmName("vllm.v1.engine.core:EngineCore.reset_encoder_cache", ("self",)),
    VllmName("vllm.v1.engine.core:EngineCore.preprocess_add_request", ("request",)),
    VllmName(f"{_SCHEDULER}.reset_prefix_cache", ("self",)),
    VllmName(f"{_SCHEDULER}.reset_connector_cache", ("self",)),
    VllmName(f"{_KV_CONNECTORS}.base:KVConnectorBase_V1.reset_cache", ("self",)),
    VllmName(f"{_KV_CONNECTORS}.multi_connector:MultiConnector.sub_connectors", by_source=True),
    VllmAttributes(
        f"{_KV_CONNECTORS}.offloading_connector:OffloadingConnector",
        ("connector_scheduler",),
        by_source=True,
    ),
    VllmAttributes(
        f"{_KV_CONNECTORS}.offloading.scheduler:OffloadingConnectorScheduler",
        ("manager",),
        by_source=True,
    ),
    VllmAttributes(
        "vllm.v1.kv_offload.tiering.manager:TieringOffloadingManager",
        ("secondary_tiers",),
        by_source=True,
    ),
    VllmName("vllm.v1.core.block_pool:BlockPool.get_num_free_blocks", ("self",)),
    VllmName("vllm.distributed.ec_transfer:get_ec_transfer"),
    VllmName("vllm.distributed.ec_transfer:has_ec_transfer"),
    VllmName("vllm.renderers.base:BaseRenderer.mm_processor_cache"),
    VllmAttributes("vllm.renderers.base:BaseRenderer", ("_executor", "_mm_executor")),
    VllmAttributes("vllm.renderers.base:_SwappableExecutor", ("_inner",)),
    VllmName("vllm.v1.worker.gpu_model_runner:GPUModelRunner._zero_block_ids", ("block_ids",)),
    VllmName("vllm.v1.worker.gpu_model_runner:GPUModelRunner._init_kv_zero_meta", ("self",)),
    VllmName("vllm.v1.worker.gpu.model_runner:GPUModelRunner._init_kv_zero_meta", ("self",)),
    VllmName("vllm.v1.kv_cache_interface:KVCacheConfig.has_mamba_layers"),
    VllmName("vllm.v1.worker.utils:KVBlockZeroer.zero_block_ids", ("block_ids",)),
    VllmName(f"{_SHM}:SingleWriterShmRingBuffer.access_buf", ("address",)),
    VllmAttributes(
        "vllm.v1.engine.core:EngineCore", ("mm_receiver_cache", "model_executor", "scheduler")
    ),
    VllmAttributes(
        _SCHEDULER,
        (
            "connector",
            "ec_connector",
            "encoder_cache_manager",
            "kv_cache_manager",
            "parallel_config",
            "requests",
        ),
    ),
    VllmAttributes(
        "vllm.v1.core.encoder_cache_manager:EncoderCacheManager",
        ("cached", "freeable", "num_embeds_by_hash", "num_free_slots"),
    ),
    VllmAttributes(f"{_QUEUE}:MessageQueue", ("buffer",)),
    VllmAttributes(f"{_QUEUE}:ShmRingBuffer", ("max_chunk_bytes", "max_chunks")),
    VllmAttributes("vllm.v1.executor.multiproc_executor:MultiprocExecutor", ("rpc_broadcast_mq",)),
    VllmAttributes("vllm.v1.worker.worker_base:WorkerBase", ("model_runner",)),
    VllmAttributes(
        "vllm.v1.worker.gpu_model_runner:GPUModelRunner",
        ("_kv_block_zeroer", "device", "encoder_cache", "kv_cache_config"),
    ),
    VllmAttributes(
        "vllm.v1.worker.gpu.model_runner:GPUModelRunner",
        ("device", "encoder_cache", "kv_block_zeroer", "kv_cache_config"),
    ),
    VllmAttributes("vllm.v1.worker.gpu.mm.encoder_cache:EncoderCache", ("encoder_outputs",)),
    VllmAttributes(f"{_CACHE}:MultiModalProcessorOnlyCache", ("_cache",)),
    VllmAttributes(f"{_CACHE}:LruKeyReplicatedSenderCache", ("_cache",)),
    VllmAttributes(f"{_CACHE}:LruKeyReplicatedReceiverCache", ("_cache",)),
    VllmAttributes(f"{_CACHE}:ShmObjectStoreSenderCache", ("_p0_cache", "_shm_cache")),
    VllmAttributes(
        f"{_SHM}:SingleWriterShmObjectStorage",
        ("flag_bytes", "id_index", "key_index", "ring_buffer"),
    ),
    VllmAttributes("vllm.multimodal.inputs:MultiModalFieldElem", ("data",)),
    VllmAttributes("vllm.multimodal.media.base:MediaWithBytes", ("media", "original_bytes")),
    VllmAttributes(
        "vllm.config:ParallelConfig",
        ("_api_process_count", "_api_process_rank", "data_parallel_index", "data_parallel_size"),
    ),
)
