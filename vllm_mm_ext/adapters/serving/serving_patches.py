"""Changes to vLLM's HTTP and chat side, and why they are made (``patch_list``)."""

from __future__ import annotations

from vllm_mm_ext.adapters.patch_entry import Patch

_RENDERER = "vllm.renderers.base:BaseRenderer"
_ENTRYPOINTS = "vllm.entrypoints"
_OPENAI = f"{_ENTRYPOINTS}.openai"
_CHAT = f"{_OPENAI}.chat_completion.serving:OpenAIServingChat"
_ASYNC = "vllm.v1.engine.async_llm:AsyncLLM"
_PROCESSOR = "vllm.multimodal.processing.processor:BaseMultiModalProcessor"
_SPEECH = f"{_ENTRYPOINTS}.speech_to_text"
_POOLING = f"{_ENTRYPOINTS}.pooling"
_SCORING = f"{_POOLING}.scoring.io_processor"

SERVING_PATCHES: tuple[Patch, ...] = (
    Patch(
        "stage times",
        (f"{_RENDERER}.process_for_engine_async", f"{_RENDERER}.process_for_engine"),
        "The time that preprocessing takes and the tokens that it makes are noted, and its errors "
        "get their status.",
        "vLLM reports the stages of a request's preprocessing",
    ),
    Patch(
        "long video",
        (f"{_CHAT}.create_chat_completion",),
        "A question about hours of video is answered window by window.",
        "vLLM lets a plugin answer a chat completion by requests of its own",
    ),
    Patch(
        "long video",
        (f"{_RENDERER}.clear_mm_cache_async",),
        "What a model with other weights noted about videos is forgotten.",
        "vLLM tells plugins when a model's weights change",
    ),
    Patch(
        "request options",
        (
            f"{_CHAT}.create_chat_completion",
            f"{_OPENAI}.chat_completion.serving:OpenAIServingChat.chat_completion_stream_generator",
            f"{_OPENAI}.responses.serving:OpenAIServingResponses.create_responses",
            f"{_OPENAI}.responses.serving:OpenAIServingResponses.responses_stream_generator",
            f"{_OPENAI}.responses.serving:OpenAIServingResponses.responses_full_generator",
        ),
        "A request's mm_ext block is read, and its answer gets one.",
        "plugins can read and add fields of requests and answers",
    ),
    Patch(
        "request options",
        (
            f"{_OPENAI}.completion.serving:OpenAIServingCompletion.create_completion",
            f"{_SPEECH}.transcription.serving:OpenAIServingTranscription.create_transcription",
            f"{_SPEECH}.translation.serving:OpenAIServingTranslation.create_translation",
            f"{_OPENAI}.chat_completion.batch_serving:OpenAIServingChatBatch"
            ".create_batch_chat_completion",
            *(
                f"{_ENTRYPOINTS}.scale_out.render.serving:ServingRender.render_{of}_request"
                for of in ("chat", "messages", "completion", "responses")
            ),
            f"{_ENTRYPOINTS}.generate.generative_scoring.serving:ServingGenerativeScoring"
            ".create_generative_scoring",
            f"{_ENTRYPOINTS}.scale_out.token_in_token_out.serving:ServingTokens.serve_tokens",
            f"{_ENTRYPOINTS}.generate.structured_decisions.serving:ServingStructuredDecisions"
            ".create_decision",
            f"{_ENTRYPOINTS}.serve.tokenize.serving:ServingTokenization.create_tokenize",
            f"{_POOLING}.base.serving:PoolingBaseServing.__call__",
            f"{_POOLING}.scoring.serving:ServingScores.__call__",
            f"{_ENTRYPOINTS}.anthropic.serving:AnthropicServingMessages.create_messages",
            f"{_ENTRYPOINTS}.anthropic.serving:AnthropicServingMessages.count_tokens",
        ),
        "An mm_ext block on a route that has no options is refused, not ignored.",
        "plugins can read fields of requests on every route",
    ),
    Patch(
        "request options",
        (f"{_ENTRYPOINTS}.cohere.serving:CohereServingChatV2.create_chat_v2",),
        "As for the routes above; only where Cohere's package is installed.",
        "plugins can read fields of requests on every route",
    ),
    Patch(
        "planning",
        (f"{_RENDERER}.render_chat_async", f"{_RENDERER}.render_chat"),
        "All videos of a conversation are planned together, before any is fetched.",
        "vLLM calls a hook with a conversation before its media are fetched",
    ),
    Patch(
        "placeholder text",
        (
            f"{_RENDERER}.render_chat_async",
            f"{_RENDERER}.render_chat",
            f"{_RENDERER}._tokenize_prompt",
            "vllm.renderers.hf:safe_apply_chat_template",
        ),
        "Text of a client that reads like a placeholder of media stays text.",
        "vLLM tokenizes the text of messages without special tokens",
    ),
    Patch(
        "cache reports",
        (f"{_RENDERER}.__init__",),
        "Preprocessing is put into the context of its request (next line).",
        "vLLM's renderer copies the context to its preprocessing thread",
    ),
    Patch(
        "cache reports",
        (f"{_RENDERER}._process_multimodal_async",),
        "vLLM preprocesses on a thread, which sees no context variables.",
        "vLLM's renderer copies the context to its preprocessing thread",
        later=True,
    ),
    Patch(
        "pooling requests",
        (f"{_POOLING}.base.io_processor:PoolingIOProcessor.__init__",),
        "Prompts for pooling are rendered by the plugin (next line).",
        "vLLM renders prompts for pooling as it renders chats",
    ),
    Patch(
        "pooling requests",
        (f"{_POOLING}.base.io_processor:PoolingIOProcessor.render_async",),
        "vLLM fetches the media of prompts for pooling on the thread that renders them.",
        "vLLM renders prompts for pooling as it renders chats",
        later=True,
    ),
    Patch(
        "pooling requests",
        (
            f"{_POOLING}.base.io_processor:PoolingIOProcessor.render",
            f"{_SCORING}:score_data_to_prompts",
            f"{_SCORING}:parse_score_data",
        ),
        "vLLM fetches the media of scores on its event loop, or on that thread.",
        "vLLM fetches the media of scores as it fetches those of chats",
    ),
    Patch(
        "pooling requests",
        (f"{_SCORING}:CrossEncoderIOProcessor.get_score_prompt",),
        "A text that reads like a placeholder could stand for the media of another text.",
        "vLLM tokenizes the texts of scores without special tokens",
    ),
    Patch(
        "cache reports",
        (f"{_PROCESSOR}._get_cache_missing_items", f"{_ASYNC}.generate"),
        "Answers say what the processor cache and the prefix cache held.",
        "vLLM reports processor cache hits per request, and cached tokens with the first output",
    ),
    Patch(
        "lost inputs",
        (
            "vllm.v1.engine.output_processor:OutputProcessor.process_outputs",
            f"{_PROCESSOR}._merge_mm_kwargs",
        ),
        "A request whose preprocessed media the engine lost is answered 503, not 500.",
        "vLLM answers 503 itself on all routes, as it does on those of pooling",
    ),
    Patch(
        "sent inputs",
        (f"{_CHAT}.create_chat_completion", f"{_ASYNC}.add_request"),
        "vLLM's chat route keeps the encoders' inputs of each request until its answer ends.",
        "vLLM lets go of a prompt's multimodal inputs when the engine has them",
    ),
    Patch(
        "shared encoder outputs",
        (
            "vllm.engine.arg_utils:EngineArgs.create_engine_config",
            f"{_PROCESSOR}._get_mm_hashes",
            f"{_RENDERER}._process_mm_uuids",
            "vllm.v1.core.sched.scheduler:Scheduler.update_from_output",
        ),
        "Instances that share encoder outputs name them alike: by content, wherever the model is. "
        "What an engine computed without an output that it could not read is dropped.",
        "vLLM's EC connectors pair instances by model, name items by content and survive failures",
    ),
    Patch(
        "shared encoder outputs",
        ("vllm.multimodal.cache.base:BaseMultiModalReceiverCache.get_and_update_features",),
        "Items that come without what the encoder takes stay out of the engine's processor cache.",
        "vLLM's processor cache keeps only items that can be encoded, or an engine can ask for one",
    ),
    Patch(
        "shared encoder outputs",
        ("vllm.config:ModelConfig.mm_ext_plan",),
        "vLLM hands multimodal processors nothing but the ModelConfig.",
        "vLLM gives multimodal processors the whole configuration",
        later=True,
    ),
    Patch(
        "encoders apart",
        (f"{_CHAT}.create_chat_completion", f"{_ASYNC}.generate"),
        "Encoder instances are asked, and their empty answers reach no client.",
        "vLLM asks encoder instances itself, and refuses questions to them",
    ),
    Patch(
        "encoders apart",
        ("vllm.v1.engine.core:EngineCore.mm_ext_encode_over",),
        "API servers tell the engine that nothing more comes of what an encoder was asked for.",
        "vLLM lets plugins add utility calls to the engine",
    ),
    Patch(
        "client ids",
        (
            f"{_RENDERER}._process_mm_uuids",
            "vllm.v1.engine.input_processor:InputProcessor.process_inputs",
            f"{_ENTRYPOINTS}.scale_out.token_in_token_out.serving:ServingTokens.serve_tokens",
        ),
        "Ids that clients choose are kept at a bounded length.",
        "vLLM bounds the length of uuids, session ids and hashes that clients send",
    ),
)
