"""Wrappers around vLLM's request path: OpenAI routes, rendering, preprocessing, engine client.

Like those in ``vllm_compat``, each is idempotent and calls the original.
"""

from __future__ import annotations

import asyncio
import contextvars
import importlib.util
import logging
import time
from collections.abc import (
    AsyncGenerator,
    AsyncIterator,
    Awaitable,
    Callable,
    Mapping,
    Sequence,
)
from contextlib import AbstractContextManager, aclosing
from functools import partial
from typing import Any, NamedTuple, TypeVar

import aiohttp

from vllm_mm_ext.adapters.error_answers import client_errors
from vllm_mm_ext.adapters.patches import wrap
from vllm_mm_ext.base.tasks import all_or_none

logger = logging.getLogger("vllm.mm_ext")

Stream = AsyncGenerator[str, None]
T = TypeVar("T")


class Span(NamedTuple):
    """An mm item in a prompt: the range of its placeholder, and how many of those are embeddings.

    They differ where text or another item's tokens stand between (sound in video).
    """

    start: int
    end: int
    embeddings: int


def around_chat(
    begin: Callable[[Any, str | None], None],
    answer: Callable[[Any], None],
    stream: Callable[[Stream, int], Stream],
) -> None:
    """Follow requests of ``/v1/chat/completions``.

    Args:
        begin: Called with the body's `mm_ext` (None without one) and the session id; may raise.
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
            begin(_block(request), self._get_session_id(request, raw_request))
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


def around_responses(
    begin: Callable[[Any, str | None], None],
    resume: Callable[[], Callable[[], None]],
    answer: Callable[[Any], None],
) -> None:
    """Follow requests of ``/v1/responses``, streamed, stored and in the background alike.

    Args:
        begin: As in ``around_chat``.
        resume: Called in the request's context; what it returns is called wherever its events
            are made, which may be another context.
        answer: Called with the finished response object, before it is sent or stored.
    """
    from vllm.entrypoints.openai.responses.protocol import ResponsesResponse
    from vllm.entrypoints.openai.responses.serving import OpenAIServingResponses

    def make_create(original: Callable[..., Any]) -> Callable[..., Any]:
        async def create_responses(
            self: Any, request: Any, raw_request: Any = None, *args: Any, **kwargs: Any
        ) -> Any:
            begin(_block(request), self._get_session_id(request, raw_request))
            return await original(self, request, raw_request, *args, **kwargs)

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
    from vllm.entrypoints.openai.chat_completion.batch_serving import OpenAIServingChatBatch
    from vllm.entrypoints.openai.completion.serving import OpenAIServingCompletion
    from vllm.entrypoints.pooling.base.serving import PoolingBaseServing
    from vllm.entrypoints.scale_out.render.serving import ServingRender
    from vllm.entrypoints.serve.tokenize.serving import ServingTokenization

    def on_route(route: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
        def make(original: Callable[..., Any]) -> Callable[..., Any]:
            async def create(
                self: Any, request: Any, raw_request: Any = None, *args: Any, **kwargs: Any
            ) -> Any:
                # Pooling has many routes; without an HTTP request (a batch) none has a path.
                path = route or (raw_request.url.path if raw_request else "pooling")
                begin(await _block_sent(request, raw_request), path)
                return await original(self, request, raw_request, *args, **kwargs)

            return create

        return make

    batch, render = "create_batch_chat_completion", "render_chat_request"
    wrap(OpenAIServingCompletion, "create_completion", on_route("/v1/completions"))
    wrap(OpenAIServingChatBatch, batch, on_route("/v1/chat/completions/batch"))
    wrap(ServingRender, render, on_route("/v1/chat/completions/render"))
    wrap(ServingTokenization, "create_tokenize", on_route("/tokenize"))
    wrap(PoolingBaseServing, "__call__", on_route(""))
    wrap(AnthropicServingMessages, "create_messages", on_route("/v1/messages"))
    wrap(AnthropicServingMessages, "count_tokens", on_route("/v1/messages/count_tokens"))
    # vLLM has this route where Cohere's package is installed.
    if importlib.util.find_spec("cohere") is not None:
        from vllm.entrypoints.cohere.serving import CohereServingChatV2

        wrap(CohereServingChatV2, "create_chat_v2", on_route("/cohere/v2/chat"))


def _block(request: Any) -> Any:
    return (request.model_extra or {}).get("mm_ext")


async def _block_sent(request: Any, raw_request: Any) -> Any:
    """The block of a request, also where vLLM's class for it drops fields that it does not know."""
    if request.model_extra is not None or raw_request is None:
        return _block(request)
    # Starlette keeps the body that FastAPI has parsed.
    body = await raw_request.json()
    return body.get("mm_ext") if isinstance(body, dict) else None


def around_chat_rendering(
    plan: Callable[[Any, Sequence[Any], Any, Any, str | None], Awaitable[None]],
    plan_blocking: Callable[[Any, Sequence[Any], Any, Any, str | None], None],
    scope: Callable[[], AbstractContextManager[None]],
) -> None:
    """Call a planner for each conversation, before any of its media is fetched.

    Requests arrive before they are planned, so that vLLM's latency metrics hold planning as well.
    The plugin's errors become vLLM's (``error_answers``).

    Args:
        plan: Called with ``(renderer, messages, chat_params, tok_params, cache_salt)``, of which
            the last two may be None. Its context is that in which the conversation is then
            rendered.
        plan_blocking: The same for ``LLM.chat``, which renders without an event loop.
        scope: What it returns is open while a conversation is planned and rendered.
    """
    from vllm.exceptions import VLLMError
    from vllm.renderers.base import BaseRenderer

    ends = (VLLMError, ValueError, OSError, aiohttp.ClientError, asyncio.CancelledError)

    def make_async(original: Callable[..., Any]) -> Callable[..., Any]:
        async def render_chat_async(
            self: Any, conversations: Any, chat_params: Any, tok_params: Any = None, **kwargs: Any
        ) -> Any:
            arrived = time.time()
            salt = (kwargs.get("prompt_extras") or {}).get("cache_salt")

            async def one(messages: Any) -> Any:
                try:
                    with client_errors(), scope():
                        await plan(self, messages, chat_params, tok_params, salt)
                        rendered = await original(
                            self, [messages], chat_params, tok_params, **kwargs
                        )
                except ends as error:
                    _drop_tracebacks(error)
                    raise
                return _arrived_at(arrived, rendered)

            if len(conversations) == 1:
                return await one(conversations[0])
            return _joined(await all_or_none(map(one, conversations)))

        return render_chat_async

    def make_sync(original: Callable[..., Any]) -> Callable[..., Any]:
        def render_chat(
            self: Any, conversations: Any, chat_params: Any, tok_params: Any = None, **kwargs: Any
        ) -> Any:
            arrived = time.time()
            salt = (kwargs.get("prompt_extras") or {}).get("cache_salt")

            def one(messages: Any) -> Any:
                with client_errors(), scope():
                    plan_blocking(self, messages, chat_params, tok_params, salt)
                    rendered = original(self, [messages], chat_params, tok_params, **kwargs)
                return _arrived_at(arrived, rendered)

            return _joined(
                [contextvars.copy_context().run(one, messages) for messages in conversations]
            )

        return render_chat

    wrap(BaseRenderer, "render_chat_async", make_async)
    wrap(BaseRenderer, "render_chat", make_sync)


def _drop_tracebacks(error: BaseException) -> None:
    """Drop the tracebacks of an error and of those that led to it.

    They lead to the frames in which the request's media were in hand. vLLM's frames above and
    below lead to the error in turn (``with_cancellation``, ``resolve_items``, vLLM 0.32), so the
    media would stay until the garbage collector comes to them.
    """
    logger.debug("A chat request ends while it is rendered", exc_info=error)
    seen: BaseException | None = error
    while seen is not None and seen.__traceback__ is not None:
        seen.__traceback__ = None
        seen = seen.__cause__ or seen.__context__


def _arrived_at(
    seconds: float, rendered: tuple[list[Any], list[Any]]
) -> tuple[list[Any], list[Any]]:
    for engine_input in rendered[1]:
        engine_input["arrival_time"] = seconds
    return rendered


def _joined(rendered: Sequence[tuple[list[Any], list[Any]]]) -> tuple[list[Any], list[Any]]:
    return [c for both in rendered for c in both[0]], [p for both in rendered for p in both[1]]


def preprocess_in_context() -> None:
    """Let preprocessing run in the context of its request.

    vLLM hands it to a thread of its own, which sees no context variables.
    """
    from vllm.renderers.base import BaseRenderer

    def make(original: Callable[..., Any]) -> Callable[..., Any]:
        def init(self: Any, *args: Any, **kwargs: Any) -> None:
            original(self, *args, **kwargs)
            in_thread = self._process_multimodal
            executor = self._mm_executor

            async def process(*args: Any, **kwargs: Any) -> Any:
                run = partial(contextvars.copy_context().run, in_thread, *args, **kwargs)
                return await asyncio.get_running_loop().run_in_executor(executor, run)

            self._process_multimodal_async = process

        return init

    wrap(BaseRenderer, "__init__", make)


async def on_processor_thread(renderer: Any, work: Callable[[], T]) -> T:
    """Result of work that uses a renderer's multimodal processor, done where vLLM uses it.

    The processor and its tokenizer are not for several threads; vLLM keeps them to one.

    Args:
        renderer: vLLM's renderer.
        work: Runs without the caller's context variables.
    """
    return await asyncio.get_running_loop().run_in_executor(renderer._mm_executor, work)


def after_cache_lookup(seen: Callable[[Mapping[str, list[bool]]], None]) -> None:
    """Call ``seen`` with which items of a request the processor cache holds, per modality."""
    from vllm.multimodal.processing import BaseMultiModalProcessor

    def make(original: Callable[..., Any]) -> Callable[..., Any]:
        def _get_cache_missing_items(self: Any, *args: Any, **kwargs: Any) -> Any:
            is_cached, missing = original(self, *args, **kwargs)
            seen(is_cached)
            return is_cached, missing

        return _get_cache_missing_items

    wrap(BaseMultiModalProcessor, "_get_cache_missing_items", make)


def around_preprocessing(
    before: Callable[[], Any],
    after: Callable[[Any, Any, Mapping[str, list[Span]], Sequence[int]], None],
) -> None:
    """Observe the step that turns media into model inputs; its errors become vLLM's.

    ``before()`` runs first and its result comes back to ``after(token, renderer, spans, prompt)``,
    with the mm items of each modality in their order and the prompt's token ids.
    """
    from vllm.renderers.base import BaseRenderer

    def make(original: Callable[..., Any]) -> Callable[..., Any]:
        async def process_for_engine_async(self: Any, *args: Any, **kwargs: Any) -> Any:
            with client_errors():
                token = before()
                engine_input = await original(self, *args, **kwargs)
                spans = {
                    modality: [
                        Span(p.offset, p.offset + p.length, int(p.get_num_embeds())) for p in ranges
                    ]
                    for modality, ranges in (engine_input.get("mm_placeholders") or {}).items()
                }
                after(token, self, spans, engine_input.get("prompt_token_ids") or ())
                return engine_input

        return process_for_engine_async

    wrap(BaseRenderer, "process_for_engine_async", make)


def after_first_output(observer: Callable[[], Callable[[int | None], None] | None]) -> None:
    """Learn how much of a prompt the prefix cache held.

    Args:
        observer: Called when a request goes to the engine, in the caller's context; what it
            returns is called with the number of cached prompt tokens at the first output.
            None leaves the request alone.
    """
    from vllm.v1.engine.async_llm import AsyncLLM

    def make(original: Callable[..., Any]) -> Callable[..., Any]:
        def generate(self: Any, *args: Any, **kwargs: Any) -> Any:
            outputs = original(self, *args, **kwargs)
            seen = observer()
            return outputs if seen is None else _observed(outputs, seen)

        return generate

    wrap(AsyncLLM, "generate", make)


async def _observed(
    outputs: AsyncGenerator[Any, None], seen: Callable[[int | None], None]
) -> AsyncIterator[Any]:
    first = True
    async with aclosing(outputs):
        async for output in outputs:
            if first:
                seen(output.num_cached_tokens)
                first = False
            yield output
