"""The names inside vLLM that live sessions rely on to put prompts together and to have answers."""

from __future__ import annotations

from vllm_mm_ext.adapters.names.attributes_check import VllmAttributes
from vllm_mm_ext.adapters.names.base_names import ERROR_NAMES
from vllm_mm_ext.adapters.names.names_check import Checked, VllmName

_OPENAI = "vllm.entrypoints.openai"
_CHAT = f"{_OPENAI}.chat_completion.serving:OpenAIServingChat"
_MODELS = f"{_OPENAI}.models.serving:OpenAIServingModels"
_RENDERER = "vllm.renderers.base:BaseRenderer"
_ENGINE = "vllm.v1.engine.async_llm:AsyncLLM"

LIVE_ENGINE_NAMES: tuple[Checked, ...] = (
    VllmName(
        f"{_ENGINE}.generate",
        (
            "prompt",
            "sampling_params",
            "request_id",
            "lora_request",
            "data_parallel_rank",
            "session_id",
        ),
    ),
    VllmAttributes(_ENGINE, ("engine_core", "model_config", "renderer", "vllm_config")),
    VllmName(f"{_RENDERER}.render_cmpl_async", ("prompts",)),
    VllmName(f"{_RENDERER}.get_tokenizer"),
    VllmAttributes(_RENDERER, ("mm_processor",)),
    VllmAttributes(
        _CHAT,
        (
            "chat_template",
            "chat_template_content_format",
            "default_chat_template_kwargs",
            "default_sampling_params",
            "override_max_tokens",
        ),
    ),
    VllmName(
        "vllm.entrypoints.serve.utils.api_utils:get_max_tokens",
        (
            "max_model_len",
            "max_tokens",
            "input_length",
            "default_sampling_params",
            "override_max_tokens",
        ),
    ),
    VllmName(f"{_MODELS}.is_base_model", ("model_name",)),
    VllmName(f"{_MODELS}.resolve_lora", ("lora_name",)),
    VllmAttributes(_MODELS, ("lora_requests",)),
    VllmName("vllm.lora.request:LoRARequest"),
    VllmName("vllm.envs:VLLM_ALLOW_RUNTIME_LORA_UPDATING"),
    VllmName("vllm.envs:VLLM_SKIP_MODEL_NAME_VALIDATION"),
    VllmName(
        "vllm.renderers.hf:resolve_chat_template_content_format",
        ("chat_template", "tools", "given_format", "tokenizer", "model_config"),
    ),
    VllmName(
        "vllm.renderers.hf:safe_apply_chat_template",
        ("model_config", "tokenizer", "conversation", "chat_template", "tokenize"),
    ),
    VllmName("vllm.model_executor.model_loader:get_model_cls", ("model_config",)),
    VllmName(
        "vllm.model_executor.models.interfaces:SupportsMultiModal.get_placeholder_str",
        ("modality", "i"),
    ),
    *ERROR_NAMES,
    VllmName("vllm.v1.engine.exceptions:EngineDeadError"),
    VllmName(
        "vllm.sampling_params:SamplingParams",
        (
            "allowed_token_ids",
            "bad_words",
            "detokenize",
            "frequency_penalty",
            "logit_bias",
            "logprobs",
            "max_tokens",
            "min_p",
            "output_kind",
            "presence_penalty",
            "repetition_penalty",
            "skip_special_tokens",
            "temperature",
            "top_k",
            "top_p",
        ),
    ),
    VllmAttributes("vllm.sampling_params:RequestOutputKind", ("DELTA",)),
    VllmAttributes(
        "vllm.outputs:RequestOutput",
        ("finished", "num_cached_tokens", "outputs", "prompt_token_ids"),
    ),
    VllmAttributes(
        "vllm.outputs:CompletionOutput", ("finish_reason", "logprobs", "text", "token_ids")
    ),
    VllmAttributes("vllm.config:ModelConfig", ("architectures", "logprobs_mode", "max_model_len")),
    VllmAttributes("vllm.config:VllmConfig", ("cache_config", "parallel_config")),
    VllmAttributes("vllm.config:CacheConfig", ("enable_prefix_caching",)),
    VllmAttributes(
        "vllm.config:ParallelConfig",
        (
            "_api_process_count",
            "_api_process_rank",
            "data_parallel_size",
            "data_parallel_size_local",
            "local_engines_only",
        ),
    ),
    VllmName(
        "vllm.model_executor.models.qwen2_vl:Qwen2VLProcessingInfo.get_num_image_tokens",
        ("image_width", "image_height", "image_processor", "mm_kwargs"),
    ),
    VllmName("vllm.model_executor.models.qwen2_vl:Qwen2VLProcessingInfo.get_image_processor"),
)
