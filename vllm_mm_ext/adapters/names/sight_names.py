"""The names inside vLLM that metrics and traces rely on."""

from __future__ import annotations

from vllm_mm_ext.adapters.names.attributes_check import VllmAttributes
from vllm_mm_ext.adapters.names.names_check import Checked, VllmName

_SCHED = "vllm.v1.core.sched"
_SCHEDULER = f"{_SCHED}.scheduler:Scheduler"

STEP_NAMES: tuple[Checked, ...] = (
    VllmName(
        f"{_SCHEDULER}.__init__",
        ("vllm_config", "kv_cache_config", "structured_output_manager"),
        passed_on=True,
    ),
    VllmName(f"{_SCHEDULER}.schedule", ("throttle_prefills",)),
    VllmName(f"{_SCHEDULER}.update_from_output", ("scheduler_output", "model_runner_output")),
    VllmName(f"{_SCHEDULER}.shutdown"),
    VllmName(f"{_SCHEDULER}.get_request_counts"),
    VllmName("vllm.v1.core.block_pool:BlockPool.get_num_free_blocks"),
    VllmName("vllm.v1.request:Request.num_output_tokens"),
    VllmAttributes(
        _SCHEDULER,
        (
            "encoder_cache_manager",
            "kv_cache_manager",
            "log_stats",
            "parallel_config",
            "requests",
            "running",
            "vllm_config",
        ),
    ),
    VllmAttributes("vllm.v1.request:Request", ("arrival_time", "is_prefill_chunk", "mm_features")),
    VllmAttributes("vllm.v1.core.kv_cache_manager:KVCacheManager", ("block_pool",)),
    VllmAttributes("vllm.v1.core.block_pool:BlockPool", ("free_block_queue", "num_gpu_blocks")),
    VllmAttributes(
        f"{_SCHED}.output:SchedulerOutput",
        (
            "num_scheduled_tokens",
            "scheduled_cached_reqs",
            "scheduled_encoder_inputs",
            "scheduled_new_reqs",
            "total_num_scheduled_tokens",
        ),
    ),
    VllmAttributes(
        f"{_SCHED}.output:CachedRequestData", ("num_output_tokens", "req_ids", "resumed_req_ids")
    ),
    VllmAttributes(f"{_SCHED}.output:NewRequestData", ("req_id",)),
    VllmAttributes("vllm.multimodal.inputs:MultiModalFeatureSpec", ("mm_position", "modality")),
    VllmAttributes("vllm.multimodal.inputs:PlaceholderRange", ("get_num_embeds",)),
    VllmAttributes("vllm.config:VllmConfig", ("additional_config", "model_config")),
    VllmAttributes("vllm.config:ParallelConfig", ("data_parallel_index",)),
)

API_SERVER_NAMES: tuple[Checked, ...] = (
    VllmName("vllm.v1.engine.output_processor:OutputProcessor.do_tracing", passed_on=True),
    VllmAttributes("vllm.tracing:SpanAttributes", ("GEN_AI_REQUEST_ID",)),
    VllmAttributes(
        "vllm.v1.metrics.stats:RequestStateStats",
        (
            *("arrival_time", "queued_ts", "scheduled_ts", "first_token_ts", "last_token_ts"),
            "num_generation_tokens",
        ),
    ),
    VllmAttributes(
        "vllm.config:VllmConfig", ("model_config", "observability_config", "parallel_config")
    ),
    VllmAttributes("vllm.config:ObservabilityConfig", ("otlp_traces_endpoint",)),
    VllmAttributes("vllm.config:ParallelConfig", ("_api_process_count", "data_parallel_size")),
    VllmAttributes("vllm.engine.arg_utils:EngineArgs", ("disable_log_stats",)),
)
