"""The features of the HTTP and chat side, and the vLLM names that each of them relies on."""

from __future__ import annotations

from vllm_mm_ext.adapters.names.attributes_check import VllmAttributes
from vllm_mm_ext.adapters.names.base_names import PROCESSING_INFO
from vllm_mm_ext.adapters.names.frontend_names import CONNECTOR_NAMES
from vllm_mm_ext.adapters.names.long_video_names import LONG_VIDEO_NAMES
from vllm_mm_ext.adapters.names.names_check import Checked, VllmName
from vllm_mm_ext.adapters.vllm_compat import Feature

_RENDERER = "vllm.renderers.base:BaseRenderer"
_OPENAI = "vllm.entrypoints.openai"
_CHAT = f"{_OPENAI}.chat_completion.serving:OpenAIServingChat"
_RESPONSES = f"{_OPENAI}.responses.serving:OpenAIServingResponses"
_MESSAGES = "vllm.entrypoints.anthropic.serving:AnthropicServingMessages"
_POOLING = "vllm.entrypoints.pooling.base.io_processor:PoolingIOProcessor"
_SCORING = "vllm.entrypoints.pooling.scoring"
_ROUTE = ("request", "raw_request")
_CLEANUP = "_with_kv_transfer_rejection_cleanup"
_PROTOCOL = f"{_OPENAI}.chat_completion.protocol"
_RENDER = ("conversations", "chat_params", "tok_params")


def _install_timing() -> None:
    from vllm_mm_ext.adapters import rendering_wrappers
    from vllm_mm_ext.adapters.serving.preprocessing import finished, started
    from vllm_mm_ext.request.context import claim_while_rendered

    rendering_wrappers.around_preprocessing(started, finished, claim_while_rendered)


def _install_long_video() -> None:
    from vllm_mm_ext.adapters import rendering_wrappers, route_wrappers
    from vllm_mm_ext.adapters.long_video.long_chat import answer, forget_notes

    route_wrappers.instead_of_chat(answer)
    rendering_wrappers.after_clearing(forget_notes)


def _install_options() -> None:
    from vllm_mm_ext.adapters import route_wrappers
    from vllm_mm_ext.adapters.serving import answers

    route_wrappers.around_chat(answers.begin, answers.answered, answers.streamed)
    route_wrappers.around_responses(
        answers.begin_response, answers.resume, answers.answered, answers.goes_on
    )
    route_wrappers.before_other_routes(answers.begin_without_options)


def _install_planning() -> None:
    from vllm_mm_ext.adapters import rendering_wrappers
    from vllm_mm_ext.adapters.serving.planning import plan, plan_blocking
    from vllm_mm_ext.adapters.serving.recorded_requests import rendered
    from vllm_mm_ext.request.context import claim_while_rendered

    rendering_wrappers.around_chat_rendering(plan, plan_blocking, claim_while_rendered, rendered)


def _install_placeholder_text() -> None:
    from vllm_mm_ext.adapters import placeholder_wrappers

    placeholder_wrappers.install()


def _install_cache_reports() -> None:
    from vllm_mm_ext.adapters import rendering_wrappers, route_wrappers
    from vllm_mm_ext.adapters.serving.answers import observer
    from vllm_mm_ext.adapters.serving.preprocessing import looked_up
    from vllm_mm_ext.errors import UnheldMediaError

    rendering_wrappers.preprocess_in_context()
    rendering_wrappers.after_cache_lookup(looked_up, UnheldMediaError.of)
    route_wrappers.around_generation(observer)


def _install_pooling() -> None:
    from vllm_mm_ext.adapters import pooling_wrappers
    from vllm_mm_ext.adapters.serving.answers import note_task

    pooling_wrappers.install(note_task)


def _install_health() -> None:
    from vllm_mm_ext.adapters.serving.endpoints import MMExtEndpointPlugin

    MMExtEndpointPlugin.health_checks = True


def _install_cache_drift() -> None:
    from vllm_mm_ext.adapters.serving import cache_drift

    cache_drift.install()


def _install_sent_inputs() -> None:
    from vllm_mm_ext.adapters.serving import sent_inputs

    sent_inputs.install()


_PLANNING_NAMES: tuple[Checked, ...] = (
    VllmName(f"{_RENDERER}.render_chat_async", _RENDER),
    VllmName(f"{_RENDERER}.render_chat", _RENDER),
    VllmName(f"{_RENDERER}.tokenize_prompt_async", ("prompt", "params")),
    VllmName(f"{_RENDERER}.tokenize_prompt", ("prompt", "params")),
    VllmName(f"{_RENDERER}.default_chat_tok_params"),
    VllmName("vllm.multimodal.media:MEDIA_CONNECTOR_REGISTRY.load", ("cls_name",)),
    VllmName("vllm.transformers_utils.processor:get_video_processor_cls_name", ("model_config",)),
    VllmName(
        "vllm.multimodal.processing:BaseProcessingInfo.validate_num_items",
        ("modality", "num_items"),
    ),
    VllmName("vllm.exceptions:VLLMError"),
    VllmAttributes(
        _RENDERER, ("_executor", "_mm_executor", "config", "mm_processor", "model_config")
    ),
    VllmAttributes("vllm.renderers.params:ChatParams", ("chat_template_kwargs", "media_io_kwargs")),
    VllmAttributes(
        "vllm.renderers.params:TokenizeParams", ("max_output_tokens", "max_total_tokens")
    ),
    VllmAttributes(
        "vllm.config:VllmConfig", ("model_config", "parallel_config", "scheduler_config")
    ),
    VllmAttributes(
        "vllm.config:ModelConfig",
        (
            "allowed_local_media_path",
            "allowed_media_domains",
            "max_model_len",
            "multimodal_config",
            "runner_type",
        ),
    ),
    VllmAttributes("vllm.config:MultiModalConfig", ("media_io_kwargs",)),
    VllmAttributes("vllm.config:ParallelConfig", ("_api_process_count", "data_parallel_size")),
    VllmAttributes("vllm.config:SchedulerConfig", ("max_num_batched_tokens",)),
    VllmName("vllm.envs:VLLM_VIDEO_FETCH_TIMEOUT"),
)

_OUTPUTS = "vllm.v1.engine.output_processor"

SERVING_FEATURES: tuple[Feature, ...] = (
    # Before what answers chats in another way, so that its own requests let go as well.
    Feature(
        "sent inputs",
        "an API server keeps the model inputs of chats until their answers end",
        (
            VllmName(f"{_CHAT}.create_chat_completion", ("request",), passed_on=True),
            VllmName(
                "vllm.v1.engine.async_llm:AsyncLLM.add_request",
                ("request_id", "prompt"),
                passed_on=True,
            ),
            VllmAttributes(f"{_PROTOCOL}:ChatCompletionRequest", ("use_beam_search",)),
        ),
        _install_sent_inputs,
    ),
    Feature(
        "stage times",
        "response headers lack preprocessing time and token counts",
        (
            *(
                VllmName(f"{_RENDERER}.{method}", ("prompt", "arrival_time", "tok_params"))
                for method in ("process_for_engine_async", "process_for_engine")
            ),
            VllmAttributes(
                "vllm.renderers.params:TokenizeParams",
                ("max_truncation_tokens", "truncate_prompt_tokens"),
            ),
            VllmAttributes(
                "vllm.multimodal.inputs:PlaceholderRange", ("get_num_embeds", "length", "offset")
            ),
        ),
        _install_timing,
    ),
    # Before the options, whose wrapper then is around this one's.
    Feature(
        "long video",
        "questions about long videos are answered in one prompt",
        (*LONG_VIDEO_NAMES, *_PLANNING_NAMES, *CONNECTOR_NAMES),
        _install_long_video,
    ),
    Feature(
        "request options",
        "an mm_ext block in a request is ignored, and answers have none",
        (
            VllmName(f"{_CHAT}.create_chat_completion", _ROUTE),
            VllmName(f"{_CHAT}.chat_completion_stream_generator", ("request",), passed_on=True),
            VllmName(f"{_CHAT}._get_session_id", _ROUTE),
            VllmName(f"{_PROTOCOL}:ChatCompletionResponse"),
            VllmAttributes(f"{_PROTOCOL}:ChatCompletionRequest", ("kv_transfer_params",)),
            VllmName(f"{_RESPONSES}.create_responses", _ROUTE),
            VllmName(f"{_RESPONSES}._get_session_id", _ROUTE),
            *(
                VllmName(f"{serving}.{_CLEANUP}", ("awaitable", *_ROUTE))
                for serving in (_CHAT, _RESPONSES)
            ),
            *(
                VllmName(f"{_RESPONSES}.{method}", ("request", "context"), passed_on=True)
                for method in ("responses_stream_generator", "responses_full_generator")
            ),
            VllmName(f"{_OPENAI}.responses.protocol:ResponsesResponse"),
            VllmAttributes(
                f"{_OPENAI}.responses.protocol:ResponsesRequest",
                ("background", "kv_transfer_params", "request_id"),
            ),
            VllmAttributes(_RESPONSES, ("background_tasks",)),
            VllmName(
                f"{_OPENAI}.completion.serving:OpenAIServingCompletion.create_completion", _ROUTE
            ),
            VllmName(
                f"{_OPENAI}.chat_completion.batch_serving:OpenAIServingChatBatch"
                ".create_batch_chat_completion",
                _ROUTE,
            ),
            *(
                VllmName(
                    f"vllm.entrypoints.scale_out.render.serving:ServingRender.{method}", _ROUTE
                )
                for method in (
                    *("render_chat_request", "render_messages_request"),
                    "render_completion_request",
                )
            ),
            VllmName(
                "vllm.entrypoints.scale_out.render.serving:ServingRender.render_responses_request",
                ("request",),
            ),
            VllmName(
                "vllm.entrypoints.generate.generative_scoring.serving:ServingGenerativeScoring"
                ".create_generative_scoring",
                _ROUTE,
            ),
            *(
                VllmName(
                    f"vllm.entrypoints.speech_to_text.{kind}.serving:{method}",
                    ("audio_data", *_ROUTE),
                )
                for kind, method in (
                    ("transcription", "OpenAIServingTranscription.create_transcription"),
                    ("translation", "OpenAIServingTranslation.create_translation"),
                )
            ),
            VllmName(
                "vllm.entrypoints.serve.tokenize.serving:ServingTokenization.create_tokenize",
                _ROUTE,
            ),
            VllmName(
                "vllm.entrypoints.scale_out.token_in_token_out.serving:ServingTokens.serve_tokens",
                _ROUTE,
            ),
            VllmName(
                "vllm.entrypoints.generate.structured_decisions.serving:ServingStructuredDecisions"
                ".create_decision",
                _ROUTE,
            ),
            VllmName("vllm.entrypoints.pooling.base.serving:PoolingBaseServing.__call__", _ROUTE),
            VllmName("vllm.entrypoints.pooling.scoring.serving:ServingScores.__call__"),
            VllmName(f"{_MESSAGES}.create_messages", _ROUTE),
            VllmName(f"{_MESSAGES}.count_tokens", _ROUTE),
        ),
        _install_options,
    ),
    Feature(
        "planning",
        "videos get what the server's settings say, whatever the context, the budget and the load",
        _PLANNING_NAMES,
        _install_planning,
    ),
    Feature(
        "placeholder text",
        "text of a client that reads like a placeholder can stand for a media item of its request",
        (
            VllmName(f"{_RENDERER}.render_chat_async", _RENDER),
            VllmName(f"{_RENDERER}.render_chat", _RENDER),
            VllmName(f"{_RENDERER}._tokenize_prompt", ("prompt", "params")),
            VllmName(
                "vllm.renderers.hf:safe_apply_chat_template",
                ("model_config", "tokenizer", "conversation", "tokenize"),
                passed_on=True,
            ),
            VllmName("vllm.utils.mistral:is_mistral_tokenizer", ("obj",)),
            VllmAttributes(_RENDERER, ("mm_processor", "tokenizer")),
            VllmAttributes("vllm.renderers.params:TokenizeParams", ("add_special_tokens",)),
            VllmAttributes("vllm.renderers.params:ChatParams", ("chat_template_kwargs",)),
            PROCESSING_INFO,
        ),
        _install_placeholder_text,
    ),
    Feature(
        "cache reports",
        "answers do not say what the processor cache and the prefix cache held",
        (
            VllmName(f"{_RENDERER}.__init__", ("config", "tokenizer")),
            VllmName(
                f"{_RENDERER}._process_multimodal",
                ("prompt", "mm_data", "mm_processor_kwargs"),
                passed_on=True,
            ),
            VllmAttributes(_RENDERER, ("_mm_executor", "_process_multimodal_async")),
            VllmAttributes("vllm.outputs:RequestOutput", ("metrics", "num_cached_tokens")),
            VllmAttributes(
                "vllm.v1.metrics.stats:RequestStateStats",
                ("arrival_time", "first_token_ts", "queued_ts", "scheduled_ts"),
            ),
            VllmName(
                "vllm.multimodal.processing:BaseMultiModalProcessor._get_cache_missing_items",
                ("cache", "mm_data_items", "mm_hashes"),
            ),
            VllmName(
                "vllm.v1.engine.async_llm:AsyncLLM.generate",
                ("prompt", "sampling_params", "request_id"),
                passed_on=True,
            ),
        ),
        _install_cache_reports,
    ),
    Feature(
        "pooling requests",
        "media of /score are fetched on the event loop, and a document can move a query's media",
        (
            VllmName(f"{_POOLING}.__init__", ("vllm_config", "renderer", "chat_template_config")),
            VllmName(f"{_POOLING}.render", ("render_params",)),
            VllmAttributes(_POOLING, ("model_config", "render_async", "renderer")),
            VllmAttributes(
                _RENDERER, ("_executor", "_mm_executor", "mm_processor", "model_config")
            ),
            VllmName(
                f"{_RENDERER}.render_chat_async",
                ("conversations", "chat_params", "tok_params", "prompt_extras", "skip_mm_cache"),
            ),
            VllmName(
                f"{_RENDERER}.render_cmpl_async",
                ("prompts", "tok_params", "prompt_extras", "skip_mm_cache"),
            ),
            VllmName("vllm.renderers.chat_utils:AsyncMultiModalItemTracker.resolve_items"),
            VllmName(
                f"{_SCORING}.io_processor:score_data_to_prompts",
                ("data_list", "role", "model_config"),
            ),
            VllmName(
                f"{_SCORING}.io_processor:parse_score_data", ("data_1", "data_2", "model_config")
            ),
            VllmName(
                f"{_SCORING}.io_processor:CrossEncoderIOProcessor.get_score_prompt",
                ("data_1", "data_2"),
                passed_on=True,
            ),
            VllmName(f"{_SCORING}.utils:parse_score_data_single", ("data", "role", "model_config")),
            VllmName(f"{_SCORING}.utils:_parse_score_content", ("role", "data", "mm_tracker")),
            VllmName(f"{_SCORING}.utils:_ensure_str", ("content",)),
            VllmName("vllm.model_executor.model_loader:get_model_cls", ("model_config",)),
            VllmName(
                "vllm.model_executor.models.interfaces:SupportsMultiModal.get_placeholder_str",
                ("modality", "i"),
            ),
        ),
        _install_pooling,
    ),
    Feature(
        "lost inputs",
        "a request whose media the engine's processor cache lost is answered 500 instead of 503",
        (
            VllmName(f"{_OUTPUTS}:OutputProcessor.process_outputs", ("engine_core_outputs",)),
            VllmName(f"{_OUTPUTS}:RequestOutputCollector.put", ("output",)),
            VllmAttributes(f"{_OUTPUTS}:OutputProcessor", ("request_states",)),
            VllmAttributes(f"{_OUTPUTS}:RequestState", ("detokenizer", "queue")),
            VllmName(
                "vllm.v1.engine:EngineCoreOutput",
                ("request_id", "mm_cache_miss_hashes"),
                passed_on=True,
            ),
            VllmName(
                "vllm.multimodal.processing:BaseMultiModalProcessor._merge_mm_kwargs",
                ("cache", "mm_hashes", "mm_is_cached"),
                passed_on=True,
            ),
            VllmName(
                "vllm.multimodal.cache:BaseMultiModalProcessorCache.is_cached_item", ("mm_hash",)
            ),
            VllmName("vllm.exceptions:GracefulHTTPError", ("message", "http_status")),
            VllmName("vllm.exceptions:RetryableRequestError", ("message",)),
        ),
        _install_cache_drift,
    ),
    Feature(
        "health checks",
        "the server has no route /mm_ext/health",
        (
            VllmName("vllm.engine.protocol:EngineClient.check_health"),
            VllmName("vllm.v1.engine.exceptions:EngineDeadError"),
            VllmAttributes(_RENDERER, ("mm_processor",)),
        ),
        _install_health,
    ),
)
