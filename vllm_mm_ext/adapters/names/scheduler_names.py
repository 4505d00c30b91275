"""The names inside vLLM that the scheduler overrides, calls and sets."""

from __future__ import annotations

from vllm_mm_ext.adapters.names.attributes_check import VllmAttributes
from vllm_mm_ext.adapters.names.names_check import Checked, VllmName

_SCHEDULER = "vllm.v1.core.sched.scheduler:Scheduler"
_ENCODER = (
    "request",
    "num_computed_tokens",
    "num_new_tokens",
    "encoder_compute_budget",
    "shift_computed_tokens",
)
_MANAGER = "vllm.v1.core.encoder_cache_manager:EncoderCacheManager"

SCHEDULER_NAMES: tuple[Checked, ...] = (
    VllmName(
        _SCHEDULER,
        ("vllm_config", "kv_cache_config", "structured_output_manager"),
        passed_on=True,
    ),
    VllmName(f"{_SCHEDULER}.add_request", ("request",)),
    VllmName(f"{_SCHEDULER}.schedule", ("throttle_prefills",)),
    VllmName(f"{_SCHEDULER}.shutdown"),
    VllmName(f"{_SCHEDULER}.update_from_output", ("scheduler_output", "model_runner_output")),
    VllmName(f"{_SCHEDULER}._try_schedule_encoder_inputs", _ENCODER),
    VllmName(
        f"{_SCHEDULER}._reserve_prefill_lookahead",
        ("request", "num_computed_tokens", "num_new_tokens"),
    ),
    VllmName(f"{_SCHEDULER}._handle_blocked_waiting_request", ("request",)),
    VllmName(f"{_SCHEDULER}._is_blocked_waiting_status", ("status",)),
    VllmName(f"{_SCHEDULER}._free_encoder_inputs", ("request",)),
    VllmName(f"{_SCHEDULER}._free_request", ("request",)),
    VllmName(f"{_SCHEDULER}._update_request_as_session", ("session", "update")),
    VllmName(f"{_SCHEDULER}._request_remaining_blocks", ("request",)),
    VllmName("vllm.v1.core.block_pool:BlockPool.get_num_free_blocks"),
    VllmName(f"{_SCHEDULER}.get_request_counts"),
    VllmName("vllm.v1.core.sched.async_scheduler:AsyncScheduler"),
    VllmName("vllm.v1.core.sched.request_queue:RequestQueue"),
    VllmName("vllm.v1.core.sched.request_queue:SchedulingPolicy.PRIORITY"),
    VllmName(
        "vllm.v1.core.kv_cache_manager:KVCacheManager.prefix_cache_lookup_enabled", ("request",)
    ),
    VllmName("vllm.v1.request:Request.get_num_encoder_embeds", ("input_id",)),
    VllmName("vllm.v1.request:Request.has_encoder_inputs"),
    VllmName("vllm.v1.request:Request.num_tokens"),
    VllmName("vllm.v1.request:Request.num_tokens_with_spec"),
    VllmName(
        "vllm.v1.core.kv_cache_coordinator:KVCacheCoordinator.find_longest_cache_hit",
        ("block_hashes", "max_cache_hit_length"),
    ),
    VllmName("vllm.v1.request:RequestStatus.PREEMPTED"),
    VllmName(f"{_MANAGER}.get_cached_num_encoder_embeds", ("request", "input_id")),
    VllmName(f"{_MANAGER}.check_and_update_cache", ("request", "input_id")),
    VllmName(
        f"{_MANAGER}.can_allocate",
        ("request", "input_id", "encoder_compute_budget", "num_embeds_to_schedule"),
    ),
    VllmName(f"{_MANAGER}.free", ("request",)),
    VllmName(f"{_SCHEDULER}.pause_state"),
    # What objects have and the plugin reads or sets.
    VllmAttributes("vllm.v1.core.sched.interface:PauseState", ("PAUSED_ALL", "UNPAUSED")),
    VllmAttributes(
        _SCHEDULER,
        (
            "connector",
            "current_step",
            "deferred_waiting",
            "ec_connector",
            "encoder_cache_manager",
            "encoder_cache_mismatch_reqs",
            "is_encoder_decoder",
            "kv_cache_manager",
            "kv_holding_waiting",
            "lora_config",
            "max_num_active_reqs",
            "max_num_encoder_input_tokens",
            "max_num_scheduled_tokens",
            "need_mamba_block_aligned_split",
            "num_prefill_lookahead",
            "num_waiting_for_streaming_input",
            "parallel_config",
            "policy",
            "prefill_capacity_bound",
            "recompute_kv_load_failures",
            "requests",
            "running",
            "scheduler_config",
            "use_v2_model_runner",
            "vllm_config",
            "waiting",
        ),
    ),
    VllmAttributes(
        "vllm.v1.request:Request",
        (
            "arrival_time",
            "block_hashes",
            "is_prefill_chunk",
            "kv_transfer_params",
            "lora_request",
            "max_tokens",
            "mm_features",
            "num_computed_tokens",
            "num_output_placeholders",
            "num_stale_output_tokens",
            "pooling_params",
            "priority",
            "request_id",
            "status",
        ),
    ),
    VllmAttributes("vllm.v1.request:RequestStatus", ("RUNNING",)),
    VllmAttributes(
        "vllm.v1.core.kv_cache_manager:KVCacheManager", ("block_pool", "coordinator", "usage")
    ),
    VllmAttributes(_MANAGER, ("num_freeable_slots",)),
    VllmAttributes("vllm.v1.core.sched.request_queue:RequestQueue", ("peek_request",)),
    VllmAttributes(
        "vllm.v1.core.sched.output:SchedulerOutput",
        (
            "num_scheduled_tokens",
            "scheduled_encoder_inputs",
            "scheduled_new_reqs",
            "total_num_scheduled_tokens",
        ),
    ),
    VllmAttributes("vllm.v1.core.sched.output:NewRequestData", ("mm_features", "req_id")),
    VllmAttributes("vllm.v1.outputs:ModelRunnerOutput", ("kv_connector_output",)),
    VllmAttributes("vllm.v1.outputs:KVConnectorOutput", ("invalid_block_ids",)),
    VllmAttributes("vllm.multimodal.inputs:MultiModalFeatureSpec", ("identifier", "mm_position")),
    VllmAttributes(
        "vllm.multimodal.inputs:PlaceholderRange", ("get_num_embeds", "length", "offset")
    ),
    VllmAttributes(
        "vllm.config:VllmConfig",
        (
            *("additional_config", "model_config", "num_prefill_lookahead_tokens"),
            "scheduler_config",
        ),
    ),
    VllmAttributes("vllm.config:ModelConfig", ("is_diffusion",)),
    VllmAttributes(
        "vllm.config:SchedulerConfig",
        ("async_scheduling", "disable_chunked_mm_input", "enable_chunked_prefill"),
    ),
    VllmAttributes("vllm.config:ParallelConfig", ("data_parallel_index", "pipeline_parallel_size")),
    VllmAttributes("vllm.config:LoRAConfig", ("max_loras",)),
    VllmAttributes("vllm.lora.request:LoRARequest", ("lora_int_id",)),
)

# What ``Scheduler.__init__`` sets from vLLM 0.33 on, where ``--prefill-schedule-interval`` acts on
# engines that are not part of a data-parallel group: the interval in steps, the last step with
# prefill, and steps so far.
CADENCE_ATTRIBUTES = ("local_prefill_interval", "last_prefill_step", "num_executed_steps")

# What vLLM asks of a waiting queue.
QUEUE_METHODS = (
    "__bool__",
    "__iter__",
    "__len__",
    "add_request",
    "peek_request",
    "pop_request",
    "prepend_request",
    "prepend_requests",
    "remove_request",
    "remove_requests",
)
