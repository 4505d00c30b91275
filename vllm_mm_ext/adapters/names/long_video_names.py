"""The names inside vLLM that answers about long videos rely on."""

from __future__ import annotations

from vllm_mm_ext.adapters.names.attributes_check import VllmAttributes
from vllm_mm_ext.adapters.names.names_check import Checked, VllmName

_OPENAI = "vllm.entrypoints.openai"
_CHAT = f"{_OPENAI}.chat_completion.serving:OpenAIServingChat"
_REQUEST = f"{_OPENAI}.chat_completion.protocol:ChatCompletionRequest"
_RENDERER = "vllm.renderers.base:BaseRenderer"
_PROTOCOL = "vllm.entrypoints.serve.engine.protocol"

# Beside those of planning and of the connector, by which a part of a video is shown.
LONG_VIDEO_NAMES: tuple[Checked, ...] = (
    VllmName(f"{_CHAT}.create_chat_completion", ("request", "raw_request")),
    VllmName(f"{_CHAT}._check_model", ("request",)),
    VllmName(
        f"{_CHAT}._with_kv_transfer_rejection_cleanup", ("awaitable", "request", "raw_request")
    ),
    VllmName(f"{_CHAT}._get_session_id", ("request", "raw_request")),
    VllmName(f"{_CHAT}._get_priority", ("request", "raw_request")),
    VllmName(f"{_CHAT}._get_data_parallel_rank", ("raw_request",)),
    VllmName(f"{_CHAT}._base_request_id", ("raw_request", "default")),
    VllmName(f"{_CHAT}._maybe_get_adapters", ("request",)),
    VllmName(f"{_CHAT}._extract_prompt_len", ("prompt",)),
    VllmName(f"{_CHAT}.create_streaming_error_response", ("message",)),
    VllmAttributes(
        _CHAT,
        (
            "chat_template",
            "chat_template_content_format",
            "default_chat_template_kwargs",
            "default_sampling_params",
            "engine_client",
            "model_config",
            "models",
            "online_renderer",
            "renderer",
        ),
    ),
    VllmAttributes("vllm.lora.request:LoRARequest", ("lora_path",)),
    VllmName(f"{_OPENAI}.models.serving:OpenAIServingModels.model_name", ("lora_request",)),
    VllmName(
        f"{_REQUEST}.build_chat_params", ("default_template", "default_template_content_format")
    ),
    VllmName(f"{_REQUEST}.build_tok_params", ("model_config",)),
    VllmAttributes(
        _REQUEST,
        (
            "allowed_token_ids",
            "cache_salt",
            "chat_template",
            "chat_template_kwargs",
            "logprobs",
            "max_completion_tokens",
            "max_tokens",
            "media_io_kwargs",
            "messages",
            "mm_processor_kwargs",
            "model",
            "priority",
            "reasoning_effort",
            "request_id",
            "return_tokens_as_token_ids",
            "session_id",
            "stream",
            "temperature",
            "tools",
            "top_logprobs",
            "use_beam_search",
        ),
    ),
    VllmAttributes(
        f"{_OPENAI}.chat_completion.protocol:ChatCompletionResponse", ("choices", "usage")
    ),
    VllmAttributes(
        f"{_OPENAI}.chat_completion.protocol:ChatCompletionResponseChoice",
        ("finish_reason", "logprobs", "message"),
    ),
    VllmAttributes(f"{_OPENAI}.chat_completion.protocol:ChatCompletionLogProbs", ("content",)),
    VllmAttributes(
        f"{_OPENAI}.chat_completion.protocol:ChatCompletionLogProbsContent",
        ("logprob", "token", "top_logprobs"),
    ),
    VllmAttributes(
        f"{_PROTOCOL}:UsageInfo",
        ("completion_tokens", "prompt_tokens", "prompt_tokens_details", "total_tokens"),
    ),
    VllmAttributes(f"{_PROTOCOL}:ErrorResponse", ("error",)),
    VllmAttributes(f"{_PROTOCOL}:ErrorInfo", ("code", "message")),
    VllmName("vllm.entrypoints.serve:create_error_response", ("message",)),
    VllmName("vllm.engine.protocol:EngineClient.get_weight_version", ("self",)),
    VllmName("vllm.engine.protocol:EngineClient.is_paused", ("self",)),
    VllmName(
        "vllm.entrypoints.generate.base.protocol:validate_request_mm_kwargs",
        ("mm_processor_kwargs", "media_io_kwargs", "trust_request_mm_kwargs"),
    ),
    VllmAttributes("vllm.renderers.online_renderer:OnlineRenderer", ("trust_request_mm_kwargs",)),
    VllmName(
        "vllm.renderers.online_renderer:OnlineRenderer.render_chat", ("request", "skip_mm_cache")
    ),
    *(
        VllmName(f"{_REQUEST}.{method}", ("max_tokens", "default_sampling_params"))
        for method in ("to_beam_search_params", "to_sampling_params")
    ),
    VllmName(
        "vllm.sampling_params:SamplingParams.verify",
        ("model_config", "speculative_config", "structured_outputs_config", "tokenizer"),
    ),
    VllmName(f"{_RENDERER}.clear_mm_cache_async", ("self",)),
    VllmName(f"{_RENDERER}.tokenize_prompts_async", ("prompts", "params")),
    VllmName(f"{_RENDERER}.default_chat_tok_params"),
    VllmName(f"{_RENDERER}.get_tokenizer"),
    VllmName(
        "vllm.renderers.params:ChatParams.with_defaults",
        ("default_chat_template_kwargs", "default_media_io_kwargs"),
    ),
    VllmAttributes(
        "vllm.config:VllmConfig",
        ("scheduler_config", "speculative_config", "structured_outputs_config"),
    ),
    VllmAttributes("vllm.config:SchedulerConfig", ("policy",)),
    VllmAttributes(
        "vllm.config:ModelConfig", ("max_logprobs", "max_model_len", "multimodal_config")
    ),
    VllmAttributes("vllm.config:MultiModalConfig", ("media_io_kwargs",)),
)
