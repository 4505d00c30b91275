"""Wrappers around vLLM's HTTP routes, and around the engine client that they call.

Each can be called again without doing more, and each calls what it wraps.
"""

from __future__ import annotations

import asyncio
import importlib.util
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from contextlib import aclosing
from typing import Any, Protocol

from vllm_mm_ext.adapters.patches import wrap

Stream = AsyncGenerator[str, None]


def around_chat(
    begin: Callable[[Any, str | None, Any], None],
    answer: Callable[[Any], None],
    stream: Callable[[Stream, int], Stream],
) -> None:
    """Follow requests of ``/v1/chat/completions``.

    Args:
        begin: Called with the body's `mm_ext` (None without one), the session id, and the body's
            ``kv_transfer_params``; may raise.
        answer: Called with the response object of a request that is not streamed.
        stream: Called with the chunks of a streamed answer and its number of choices; returns the
            chunks to send. Not called for routes that turn them into events of another API.
    """
    from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionResponse
    from vllm.entrypoints.openai.chat_completion.serving import OpenAIServingChat

    def make(original: Callable[..., Any]) -> Callable[..., Any]:
        async def create_chat_completion(
            self: Any, request: Any, raw_request: Any = None, *args: Any, **kwargs: Any
        ) -> Any:
            await _begun(begin, self, request, raw_request)
            result = await original(self, request, raw_request, *args, **kwargs)
            if isinstance(result, ChatCompletionResponse):
                answer(result)
            return result

        return create_chat_completion

    def make_stream(original: Callable[..., Any]) -> Callable[..., Any]:
        # Where OpenAI's chunks are made. What ``create_chat_completion`` returns is something else
        # for the subclasses of other APIs (vLLM 0.33).
        def chat_completion_stream_generator(
            self: Any, request: Any, *args: Any, **kwargs: Any
        ) -> Any:
            return stream(original(self, request, *args, **kwargs), request.n or 1)

        return chat_completion_stream_generator

    wrap(OpenAIServingChat, "create_chat_completion", make)
    wrap(OpenAIServingChat, "chat_completion_stream_generator", make_stream)


def instead_of_chat(answer: Callable[[Any, Any, Any, Callable[..., Any]], Any]) -> None:
    """Let requests of ``/v1/chat/completions`` be answered in another way.

    To be wrapped before ``around_chat`` wraps it, so that requests have been read by then.

    Args:
        answer: Called with the handler, the request, the HTTP request or None, and the method as it
            was; returns what the method would.
    """
    from vllm.entrypoints.openai.chat_completion.serving import OpenAIServingChat

    def make(original: Callable[..., Any]) -> Callable[..., Any]:
        async def create_chat_completion(self: Any, request: Any, raw_request: Any = None) -> Any:
            return await answer(self, request, raw_request, original)

        return create_chat_completion

    wrap(OpenAIServingChat, "create_chat_completion", make)


def around_responses(
    begin: Callable[[Any, str | None, Any], None],
    resume: Callable[[], Callable[[], None]],
    answer: Callable[[Any], None],
    goes_on: Callable[[asyncio.Task[Any]], None],
) -> None:
    """Follow requests of ``/v1/responses``, streamed, stored and in the background alike.

    Args:
        begin: As in ``around_chat``.
        resume: Called in the request's context; what it returns is called wherever its events
            are made, which may be another context.
        answer: Called with the finished response object, before it is sent or stored.
        goes_on: Called with the task that makes a response in the background.
    """
    from vllm.entrypoints.openai.responses.protocol import ResponsesResponse
    from vllm.entrypoints.openai.responses.serving import OpenAIServingResponses

    def make_create(original: Callable[..., Any]) -> Callable[..., Any]:
        async def create_responses(
            self: Any, request: Any, raw_request: Any = None, *args: Any, **kwargs: Any
        ) -> Any:
            await _begun(begin, self, request, raw_request)
            response = await original(self, request, raw_request, *args, **kwargs)
            if request.background:
                task = self.background_tasks.get(request.request_id)
                if task is not None:
                    goes_on(task)
            return response

        return create_responses

    def make_stream(original: Callable[..., Any]) -> Callable[..., Any]:
        # A plain function, so that it runs at once: the events are made later and elsewhere.
        def responses_stream_generator(self: Any, *args: Any, **kwargs: Any) -> Any:
            return _resumed(original(self, *args, **kwargs), resume())

        return responses_stream_generator

    def make_full(original: Callable[..., Any]) -> Callable[..., Any]:
        async def responses_full_generator(self: Any, *args: Any, **kwargs: Any) -> Any:
            result = await original(self, *args, **kwargs)
            if isinstance(result, ResponsesResponse):
                answer(result)
            return result

        return responses_full_generator

    wrap(OpenAIServingResponses, "create_responses", make_create)
    wrap(OpenAIServingResponses, "responses_stream_generator", make_stream)
    wrap(OpenAIServingResponses, "responses_full_generator", make_full)


async def _begun(
    begin: Callable[[Any, str | None, Any], None], serving: Any, request: Any, raw_request: Any
) -> None:
    async def read() -> None:
        session = serving._get_session_id(request, raw_request)
        begin(_block(request), session, request.kv_transfer_params)

    # If this refuses the request, the server that has prefilled its prompt must learn of it. vLLM
    # tells that server of what fails further in.
    await serving._with_kv_transfer_rejection_cleanup(read(), request, raw_request)


async def _resumed(events: AsyncGenerator[Any, None], resume: Callable[[], None]) -> Any:
    resume()
    async with aclosing(events):
        async for event in events:
            yield event


def before_other_routes(begin: Callable[[Any, str], None]) -> None:
    """Call ``begin`` with the `mm_ext` of each request to routes without options.

    It is given the route's path as well, and may raise. These are the routes that take media or
    that clients of ``/v1/chat/completions`` use beside it.
    """
    from vllm.entrypoints.anthropic.serving import AnthropicServingMessages
    from vllm.entrypoints.generate.generative_scoring.serving import ServingGenerativeScoring
    from vllm.entrypoints.generate.structured_decisions.serving import ServingStructuredDecisions
    from vllm.entrypoints.openai.chat_completion.batch_serving import OpenAIServingChatBatch
    from vllm.entrypoints.openai.completion.serving import OpenAIServingCompletion
    from vllm.entrypoints.pooling.base.serving import PoolingBaseServing
    from vllm.entrypoints.pooling.scoring.serving import ServingScores
    from vllm.entrypoints.scale_out.render.serving import ServingRender
    from vllm.entrypoints.scale_out.token_in_token_out.serving import ServingTokens
    from vllm.entrypoints.serve.tokenize.serving import ServingTokenization
    from vllm.entrypoints.speech_to_text.transcription.serving import OpenAIServingTranscription
    from vllm.entrypoints.speech_to_text.translation.serving import OpenAIServingTranslation

    def on_route(route: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
        def make(original: Callable[..., Any]) -> Callable[..., Any]:
            async def create(self: Any, request: Any, *args: Any, **kwargs: Any) -> Any:
                raw_request = args[0] if args else kwargs.get("raw_request")
                # Pooling has many routes; without an HTTP request (a batch) none has a path.
                path = route or (raw_request.url.path if raw_request else "pooling")
                begin(await _block_sent(request, raw_request), path)
                return await original(self, request, *args, **kwargs)

            return create

        return make

    def on_form(route: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
        def make(original: Callable[..., Any]) -> Callable[..., Any]:
            async def create(
                self: Any, audio_data: Any, request: Any, *args: Any, **kwargs: Any
            ) -> Any:
                begin(_block(request), route)
                return await original(self, audio_data, request, *args, **kwargs)

            return create

        return make

    batch = "create_batch_chat_completion"
    transcriptions, translations = "/v1/audio/transcriptions", "/v1/audio/translations"
    wrap(OpenAIServingCompletion, "create_completion", on_route("/v1/completions"))
    wrap(OpenAIServingChatBatch, batch, on_route("/v1/chat/completions/batch"))
    wrap(ServingRender, "render_chat_request", on_route("/v1/chat/completions/render"))
    wrap(ServingRender, "render_messages_request", on_route("/v1/messages/render"))
    wrap(ServingRender, "render_completion_request", on_route("/v1/completions/render"))
    wrap(ServingRender, "render_responses_request", on_route("/v1/responses/render"))
    wrap(ServingTokens, "serve_tokens", on_route("/inference/v1/generate"))
    wrap(ServingStructuredDecisions, "create_decision", on_route("/v1/systemone"))
    wrap(ServingGenerativeScoring, "create_generative_scoring", on_route("/generative_scoring"))
    wrap(OpenAIServingTranscription, "create_transcription", on_form(transcriptions))
    wrap(OpenAIServingTranslation, "create_translation", on_form(translations))
    wrap(ServingTokenization, "create_tokenize", on_route("/tokenize"))
    wrap(PoolingBaseServing, "__call__", on_route(""))
    wrap(ServingScores, "__call__", on_route(""))
    wrap(AnthropicServingMessages, "create_messages", on_route("/v1/messages"))
    wrap(AnthropicServingMessages, "count_tokens", on_route("/v1/messages/count_tokens"))
    # vLLM has this route where Cohere's package is installed.
    if importlib.util.find_spec("cohere") is not None:
        from vllm.entrypoints.cohere.serving import CohereServingChatV2

        wrap(CohereServingChatV2, "create_chat_v2", on_route("/cohere/v2/chat"))


def before_transcription(begin: Callable[[bytes], Awaitable[None]]) -> None:
    """Await ``begin`` with the file that came with a request to transcribe or translate sound."""
    from vllm.entrypoints.speech_to_text.transcription.serving import OpenAIServingTranscription
    from vllm.entrypoints.speech_to_text.translation.serving import OpenAIServingTranslation

    def make(original: Callable[..., Any]) -> Callable[..., Any]:
        async def create(self: Any, audio_data: bytes, *args: Any, **kwargs: Any) -> Any:
            await begin(audio_data)
            return await original(self, audio_data, *args, **kwargs)

        return create

    wrap(OpenAIServingTranscription, "create_transcription", make)
    wrap(OpenAIServingTranslation, "create_translation", make)


def _block(request: Any) -> Any:
    return (request.model_extra or {}).get("mm_ext")


async def _block_sent(request: Any, raw_request: Any) -> Any:
    """The block of a request, also where vLLM's class for it drops fields that it does not know."""
    if request.model_extra is not None or raw_request is None:
        return _block(request)
    # Starlette keeps the body that FastAPI has parsed.
    body = await raw_request.json()
    return body.get("mm_ext") if isinstance(body, dict) else None


class EngineObserver(Protocol):
    """Follows one request through the engine."""

    def sent(self) -> None:
        """The request goes to the engine."""

    def first(self, output: Any) -> None:
        """The engine's first ``RequestOutput`` is there."""

    def ended(self) -> None:
        """The last output is there, or nobody waits for it any more."""


def around_generation(observer: Callable[[str, Any], EngineObserver | None]) -> None:
    """Follow requests through the engine.

    Args:
        observer: Called with vLLM's id of a request and its prompt, in the caller's context. None
            leaves the request alone.
    """
    from vllm.v1.engine.async_llm import AsyncLLM

    def make(original: Callable[..., Any]) -> Callable[..., Any]:
        def generate(
            self: Any, prompt: Any, sampling_params: Any, request_id: str, *args: Any, **kwargs: Any
        ) -> Any:
            outputs = original(self, prompt, sampling_params, request_id, *args, **kwargs)
            seen = observer(request_id, prompt)
            return outputs if seen is None else _observed(outputs, seen)

        return generate

    wrap(AsyncLLM, "generate", make)


async def _observed(outputs: AsyncGenerator[Any, None], seen: EngineObserver) -> AsyncIterator[Any]:
    first = True
    seen.sent()
    try:
        async with aclosing(outputs):
            async for output in outputs:
                if first:
                    seen.first(output)
                    first = False
                yield output
    finally:
        seen.ended()
