"""What of vLLM estimates and the log of steps rely on, beside what the plugin's scheduler does."""

from __future__ import annotations

from vllm_mm_ext.adapters.names.attributes_check import VllmAttributes
from vllm_mm_ext.adapters.names.names_check import Checked, VllmName

_SCHEDULER = "vllm.v1.core.sched.scheduler:Scheduler"

ESTIMATE_NAMES: tuple[Checked, ...] = (
    VllmName(f"{_SCHEDULER}.has_unfinished_requests"),
    VllmName("vllm.config:SchedulerConfig.get_scheduler_cls"),
    VllmAttributes(
        "vllm.config:SchedulerConfig", ("max_num_batched_tokens", "max_num_seqs", "scheduler_cls")
    ),
    VllmAttributes("vllm.config:CacheConfig", ("enable_prefix_caching", "num_gpu_blocks")),
    VllmAttributes("vllm.config:ModelConfig", ("max_model_len",)),
    VllmAttributes("vllm.config:VllmConfig", ("cache_config", "ec_transfer_config")),
    VllmName(
        "vllm.v1.kv_cache_interface:FullAttentionSpec",
        ("block_size", "num_kv_heads", "head_size", "dtype"),
    ),
    VllmName(
        "vllm.v1.kv_cache_interface:KVCacheConfig",
        ("num_blocks", "kv_cache_tensors", "kv_cache_groups"),
    ),
    VllmName("vllm.v1.kv_cache_interface:KVCacheGroupSpec", ("layer_names", "kv_cache_spec")),
    VllmName("vllm.v1.structured_output:StructuredOutputManager", ("vllm_config",)),
    VllmName(
        "vllm.v1.outputs:ModelRunnerOutput", ("req_ids", "req_id_to_index", "sampled_token_ids")
    ),
    VllmName(
        "vllm.multimodal.inputs:MultiModalFeatureSpec",
        ("data", "modality", "identifier", "mm_position"),
    ),
    VllmName("vllm.multimodal.inputs:PlaceholderRange", ("offset", "length")),
    VllmName("vllm.sampling_params:SamplingParams", ("max_tokens", "ignore_eos")),
    VllmName(
        "vllm.v1.request:Request",
        ("request_id", "prompt_token_ids", "sampling_params", "pooling_params", "mm_features"),
    ),
    VllmName("vllm.v1.request:Request.is_finished"),
    VllmAttributes("vllm.v1.request:Request", ("num_prompt_tokens",)),
    VllmAttributes(
        "vllm.v1.core.encoder_cache_manager:EncoderCacheManager", ("cache_size", "num_free_slots")
    ),
)
