"""Wrappers around vLLM's rendering: chat templates, media, tokens and multimodal preprocessing.

Each can be called again without doing more, and each calls what it wraps.
"""

from __future__ import annotations

import asyncio
import contextvars
import logging
import time
from collections.abc import Awaitable, Callable, Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from typing import Any, NamedTuple, TypeVar

import aiohttp
from vllm.exceptions import VLLMError

from vllm_mm_ext.adapters.error_answers import client_errors
from vllm_mm_ext.adapters.patches import set_on, wrap
from vllm_mm_ext.adapters.placeholder_counts import cut_off, lacks_places
from vllm_mm_ext.base.tasks import all_or_none

logger = logging.getLogger("vllm.mm_ext")

T = TypeVar("T")

# How requests end while they are rendered. Other errors are faults, whose tracebacks are needed.
ENDS = (VLLMError, ValueError, OSError, aiohttp.ClientError, asyncio.CancelledError)


class Span(NamedTuple):
    """An mm item in a prompt: the range of its placeholder, and how many of those are embeddings.

    They differ where text or another item's tokens stand between (sound in video). ``mm_hash`` is
    vLLM's hash of the item.
    """

    start: int
    end: int
    embeddings: int
    mm_hash: str = ""


def around_chat_rendering(
    plan: Callable[[Any, Sequence[Any], Any, Any, Mapping[str, Any]], Awaitable[None]],
    plan_blocking: Callable[[Any, Sequence[Any], Any, Any, Mapping[str, Any]], None],
    scope: Callable[[], AbstractContextManager[None]],
    rendered: Callable[[Callable[[], Awaitable[Any]]], Awaitable[Any]],
) -> None:
    """Call a planner for each conversation, before any of its media is fetched.

    Requests arrive before they are planned, so that vLLM's latency metrics hold planning as well.
    The plugin's errors become vLLM's (``error_answers``).

    Args:
        plan: Called with ``(renderer, messages, chat_params, tok_params, extras)``. The fourth may
            be None; the last are the fields of the request that vLLM adds to the prompt
            (``cache_salt``, ``mm_processor_kwargs``). Its context is that in which the conversation
            is then rendered.
        plan_blocking: The same for ``LLM.chat``, which renders without an event loop.
        scope: What it returns is open while a conversation is planned and rendered.
        rendered: Called with what renders a conversation, once or more, and returns what came out.
    """
    from vllm.renderers.base import BaseRenderer

    def make_async(original: Callable[..., Any]) -> Callable[..., Any]:
        async def render_chat_async(
            self: Any, conversations: Any, chat_params: Any, tok_params: Any = None, **kwargs: Any
        ) -> Any:
            arrived = time.time()
            extras = kwargs.get("prompt_extras") or {}

            async def one(messages: Any) -> Any:
                async def render() -> Any:
                    with client_errors(), scope():
                        found = await original(self, [messages], chat_params, tok_params, **kwargs)
                    return _arrived_at(arrived, found)

                try:
                    with client_errors(), scope():
                        await plan(self, messages, chat_params, tok_params, extras)
                        return await rendered(render)
                except ENDS as error:
                    drop_tracebacks(error)
                    raise

            if len(conversations) == 1:
                return await one(conversations[0])
            return _joined(await all_or_none(map(one, conversations)))

        return render_chat_async

    def make_sync(original: Callable[..., Any]) -> Callable[..., Any]:
        def render_chat(
            self: Any, conversations: Any, chat_params: Any, tok_params: Any = None, **kwargs: Any
        ) -> Any:
            arrived = time.time()
            extras = kwargs.get("prompt_extras") or {}

            def one(messages: Any) -> Any:
                with client_errors(), scope():
                    plan_blocking(self, messages, chat_params, tok_params, extras)
                    rendered = original(self, [messages], chat_params, tok_params, **kwargs)
                return _arrived_at(arrived, rendered)

            return _joined(
                [contextvars.copy_context().run(one, messages) for messages in conversations]
            )

        return render_chat

    wrap(BaseRenderer, "render_chat_async", make_async)
    wrap(BaseRenderer, "render_chat", make_sync)


def drop_tracebacks(error: BaseException) -> None:
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

            set_on(self, "vllm.renderers.base:BaseRenderer._process_multimodal_async", process)

        return init

    wrap(BaseRenderer, "__init__", make)


async def on_processor_thread(renderer: Any, work: Callable[[], T]) -> T:
    """Result of work that uses a renderer's multimodal processor, done where vLLM uses it.

    The processor and its tokenizer are not for several threads; vLLM keeps them to one.

    Args:
        renderer: vLLM's renderer.
        work: Runs without the caller's context variables.
    """
    loop = asyncio.get_running_loop()
    if renderer.model_config.runner_type != "pooling":
        return await loop.run_in_executor(renderer._mm_executor, work)
    # Prompts for pooling are rendered on the thread for texts.
    return await loop.run_in_executor(
        renderer._executor, lambda: renderer._mm_executor.submit(work).result()
    )


def after_cache_lookup(
    seen: Callable[[Mapping[str, list[bool]], Mapping[str, list[str]], Collection[str]], None],
    unheld: Callable[[Sequence[str]], Exception],
) -> None:
    """Hear of which items of a request the processor cache holds.

    Args:
        seen: Called with whether it holds each item and with vLLM's hashes of them, per modality,
            and with the hashes of the items that the request names by their `uuid` alone.
        unheld: Makes the error of a request that names an item by its `uuid` alone, which the cache
            does not hold, of the modalities of the items without media.
    """
    from vllm.multimodal.processing import BaseMultiModalProcessor

    def make(original: Callable[..., Any]) -> Callable[..., Any]:
        def _get_cache_missing_items(
            self: Any, cache: Any, mm_data_items: Any, mm_hashes: Any
        ) -> Any:
            try:
                is_cached, missing = original(self, cache, mm_data_items, mm_hashes)
            except ValueError as error:
                bare = [m for m, items in mm_data_items.items() if any(i is None for i in items)]
                if bare:
                    raise unheld(bare) from error
                raise
            # Only what is cached may come without data.
            brought = {
                mm_hashes[modality][index]
                for modality, hits in is_cached.items()
                for index, hit in enumerate(hits)
                if not hit or mm_data_items[modality][index] is not None
            }
            seen(is_cached, mm_hashes, set().union(*mm_hashes.values()) - brought)
            return is_cached, missing

        return _get_cache_missing_items

    wrap(BaseMultiModalProcessor, "_get_cache_missing_items", make)


def after_clearing(cleared: Callable[[Any], None]) -> None:
    """Hear that an API server forgets its media, as it does where the model's weights change.

    Args:
        cleared: Called with vLLM's renderer on vLLM's event loop, before the engine is told: what
            the engine gets later, it computes later.
    """
    from vllm.renderers.base import BaseRenderer

    def make(original: Callable[..., Any]) -> Callable[..., Any]:
        async def clear_mm_cache_async(self: Any) -> None:
            await original(self)
            cleared(self)

        return clear_mm_cache_async

    wrap(BaseRenderer, "clear_mm_cache_async", make)


def part_with_media(engine_input: Any) -> Mapping[str, Any]:
    """The part of vLLM's input for the engine that has the media: an encoder-decoder's decoder.

    Empty where a text, or nothing, stands in its place.
    """
    part = engine_input
    if isinstance(part, Mapping):
        part = part.get("decoder_prompt", part)
    return part if isinstance(part, Mapping) else {}


def around_preprocessing(
    before: Callable[[], Any],
    after: Callable[[Any, Any, Mapping[str, list[Span]], Sequence[int]], None],
    scope: Callable[[], AbstractContextManager[None]],
) -> None:
    """Observe the step that turns media into model inputs; its errors become vLLM's.

    ``before()`` runs first and its result comes back to ``after(token, renderer, spans, prompt)``,
    with the mm items of each modality in their order and the prompt's token ids. What ``scope()``
    returns is open meanwhile: some routes fetch media outside ``around_chat_rendering``.
    """
    from vllm.renderers.base import BaseRenderer

    @contextmanager
    def observed(renderer: Any, prompt: Any, tok_params: Any) -> Iterator[Callable[[Any], None]]:
        def told(engine_input: Any) -> None:
            engine_input = part_with_media(engine_input)
            hashes = engine_input.get("mm_hashes") or {}
            spans = {
                modality: [
                    Span(p.offset, p.offset + p.length, int(p.get_num_embeds()), mm_hash or "")
                    for p, mm_hash in zip(ranges, hashes[modality], strict=True)
                ]
                for modality, ranges in (engine_input.get("mm_placeholders") or {}).items()
            }
            after(token, renderer, spans, engine_input.get("prompt_token_ids") or ())

        with client_errors(), scope():
            token = before()
            with _placeholders_cut_off(renderer, prompt, tok_params):
                yield told

    def make_async(original: Callable[..., Any]) -> Callable[..., Any]:
        async def process_for_engine_async(
            self: Any, prompt: Any, *args: Any, tok_params: Any = None, **kwargs: Any
        ) -> Any:
            with observed(self, prompt, tok_params) as told:
                made = await original(self, prompt, *args, tok_params=tok_params, **kwargs)
                told(made)
            return made

        return process_for_engine_async

    def make_sync(original: Callable[..., Any]) -> Callable[..., Any]:
        def process_for_engine(
            self: Any, prompt: Any, *args: Any, tok_params: Any = None, **kwargs: Any
        ) -> Any:
            with observed(self, prompt, tok_params) as told:
                made = original(self, prompt, *args, tok_params=tok_params, **kwargs)
                told(made)
            return made

        return process_for_engine

    wrap(BaseRenderer, "process_for_engine_async", make_async)
    wrap(BaseRenderer, "process_for_engine", make_sync)


@contextmanager
def _placeholders_cut_off(renderer: Any, prompt: Any, tok_params: Any) -> Iterator[None]:
    """Say so where a prompt does not match its media because ``truncate_prompt_tokens`` cut it.

    vLLM refuses to cut the tokens of media (``_truncate_expanded_prompt``). But before media have
    tokens it cuts the text, and with it the places where the media belong.
    """
    try:
        yield
    except (AssertionError, RuntimeError) as error:
        if not prompt.get("multi_modal_data"):
            raise
        limit = None
        if tok_params is not None:
            limit = tok_params.truncate_prompt_tokens
            if limit is None:
                raise
            most = tok_params.max_truncation_tokens if limit < 0 else limit
            if len(prompt.get("prompt_token_ids") or ()) != most:
                raise
        elif not lacks_places(renderer, prompt):
            # vLLM does not tell how it has cut the pair of a score.
            raise
        raise cut_off("truncate_prompt_tokens", limit) from error
