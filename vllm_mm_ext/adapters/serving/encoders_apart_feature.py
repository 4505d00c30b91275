"""Encoding apart as a feature of the plugin, and the vLLM names that it relies on."""

from __future__ import annotations

from vllm_mm_ext.adapters.names.attributes_check import VllmAttributes
from vllm_mm_ext.adapters.names.encoder_cache_names import SHARED_NAMES
from vllm_mm_ext.adapters.names.names_check import VllmName
from vllm_mm_ext.adapters.vllm_compat import Feature

_CHAT = "vllm.entrypoints.openai.chat_completion.serving:OpenAIServingChat"
_REQUEST = "vllm.entrypoints.openai.chat_completion.protocol:ChatCompletionRequest"
_ASYNC = "vllm.v1.engine.async_llm:AsyncLLM"


def _install() -> None:
    from vllm_mm_ext.adapters.serving import encoders_apart
    from vllm_mm_ext.adapters.serving.endpoints import MMExtEndpointPlugin

    encoders_apart.install()
    MMExtEndpointPlugin.encoders_apart = True


ENCODERS_APART_FEATURE = Feature(
    "encoders apart",
    "no encoder instance is asked, and one that is configured answers clients with empty text",
    (
        *SHARED_NAMES,
        VllmName(f"{_CHAT}.create_chat_completion", ("request", "raw_request")),
        VllmName(f"{_ASYNC}.generate", ("prompt", "sampling_params", "request_id"), passed_on=True),
        VllmName("vllm.v1.engine.core_client:AsyncMPClient.call_utility_all_async", ("method",)),
        VllmAttributes(_CHAT, ("engine_client",)),
        VllmAttributes(_REQUEST, ("kv_transfer_params",)),
        VllmAttributes(_ASYNC, ("engine_core", "renderer", "vllm_config")),
        VllmAttributes("vllm.v1.engine.core:EngineCore", ("scheduler",)),
        VllmAttributes("vllm.v1.core.sched.scheduler:Scheduler", ("ec_connector",)),
        VllmAttributes("vllm.config:ECTransferConfig", ("is_ec_consumer", "is_ec_producer")),
        VllmAttributes("vllm.sampling_params:SamplingParams", ("extra_args",)),
    ),
    _install,
)
