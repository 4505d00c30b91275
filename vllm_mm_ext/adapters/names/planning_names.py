"""What of vLLM the planner (``vllm-mm plan``) relies on."""

from __future__ import annotations

from vllm_mm_ext.adapters.names.attributes_check import VllmAttributes
from vllm_mm_ext.adapters.names.names_check import Checked, VllmName

_STATE = "vllm.distributed.parallel_state"

PLANNING_NAMES: tuple[Checked, ...] = (
    VllmName("vllm.engine.arg_utils:EngineArgs.create_engine_config", ("self",)),
    VllmName(
        "vllm.engine.arg_utils:EngineArgs",
        (
            *("model", "max_model_len", "mm_processor_kwargs", "additional_config"),
            *("kv_cache_memory_bytes", "enforce_eager", "load_format"),
        ),
    ),
    VllmName("vllm.multimodal:MULTIMODAL_REGISTRY.create_processor", ("model_config",)),
    VllmName(
        "vllm.multimodal.processing:BaseDummyInputsBuilder.get_dummy_mm_data",
        ("self", "seq_len", "mm_counts", "mm_options"),
    ),
    VllmName("vllm.config:set_current_vllm_config", ("vllm_config",)),
    VllmName(
        f"{_STATE}:init_distributed_environment",
        ("world_size", "rank", "distributed_init_method", "local_rank", "backend"),
    ),
    VllmName(
        f"{_STATE}:ensure_model_parallel_initialized",
        ("tensor_model_parallel_size", "pipeline_model_parallel_size"),
    ),
    VllmName(f"{_STATE}:destroy_model_parallel"),
    VllmName(f"{_STATE}:destroy_distributed_environment"),
    VllmName("vllm.model_executor.model_loader.utils:initialize_model", ("vllm_config",)),
    VllmName("vllm.utils.torch_utils:set_default_torch_dtype", ("dtype",)),
    VllmName("vllm.model_executor.layers.rotary_embedding:_ROPE_DICT"),
    VllmName("vllm.model_executor.layers.linear:ColumnParallelLinear"),
    VllmName("vllm.model_executor.layers.linear:RowParallelLinear"),
    VllmName("vllm.model_executor.layers.linear:QKVParallelLinear"),
    VllmName("vllm.model_executor.layers.vocab_parallel_embedding:VocabParallelEmbedding"),
    VllmAttributes("vllm.config:CompilationConfig", ("static_forward_context",)),
    VllmName(
        "vllm.model_executor.layers.attention_layer_base:AttentionLayerBase.get_kv_cache_spec",
        ("vllm_config",),
    ),
    VllmAttributes(
        "vllm.v1.kv_cache_interface:FullAttentionSpec", ("num_kv_heads", "head_size", "dtype")
    ),
    VllmAttributes(
        "vllm.config:ModelConfig", ("is_multimodal_model", "architecture", "hf_text_config")
    ),
    VllmAttributes("vllm.config:VllmConfig", ("compilation_config",)),
)
