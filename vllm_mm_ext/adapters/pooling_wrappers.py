"""Wrappers around vLLM's rendering of requests for pooling: embeddings, classes and scores.

vLLM renders each prompt of such a request as a whole on its thread for texts, with its media
fetched there; of scores by embeddings it even fetches them on its event loop. Here media are
fetched as for chats: asynchronously, so that nothing waits for a slow origin or for room in the
media budget but the prompt itself.
"""

from __future__ import annotations

import contextvars
from collections.abc import Awaitable, Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

from vllm_mm_ext.adapters.error_answers import client_errors
from vllm_mm_ext.adapters.patches import set_on, wrap
from vllm_mm_ext.adapters.placeholder_counts import check_places
from vllm_mm_ext.adapters.rendering_wrappers import ENDS, drop_tracebacks
from vllm_mm_ext.base.tasks import to_its_end
from vllm_mm_ext.fleet.encode_request import has_media
from vllm_mm_ext.request.context import (
    RequestContext,
    claim_while_rendered,
    current_request,
    enter_request,
)
from vllm_mm_ext.request.conversation import list_contents

# Key of a prompt whose text and media are still to be read.
_UNREAD = "mm_ext_unread"


class _Unread(NamedTuple):
    """What is compared with a score: the parts of a query or a document."""

    parts: Any
    role: str


class _Read(NamedTuple):
    """What vLLM's ``parse_score_data`` makes of a query and a document."""

    query: str
    document: str
    mm_data: Any
    mm_uuids: Any


def install(begun: Callable[[], None]) -> None:
    """Wrap rendering for pooling. Idempotent.

    Args:
        begun: Called in the task that waits for a prompt. The task ends when nothing is done for
            the prompt any more.
    """
    from vllm.entrypoints.pooling.base.io_processor import PoolingIOProcessor
    from vllm.entrypoints.pooling.scoring import io_processor

    def make(original: Callable[..., Any]) -> Callable[..., Any]:
        def init(self: Any, *args: Any, **kwargs: Any) -> None:
            original(self, *args, **kwargs)

            async def render(params: Any) -> Any:
                begun()
                request = current_request() or RequestContext()
                salt = (params.get("prompt_extras") or {}).get("cache_salt")
                # Each prompt has a place of its own among those that wait for room for media.
                enter_request(request.conversation(self.renderer, salt))
                try:
                    with claim_while_rendered():
                        return await _rendered(self, params)
                except ENDS as error:
                    drop_tracebacks(error)
                    raise

            set_on(
                self,
                "vllm.entrypoints.pooling.base.io_processor:PoolingIOProcessor.render_async",
                render,
            )

        return init

    wrap(PoolingIOProcessor, "__init__", make)
    wrap(PoolingIOProcessor, "render", _reading)
    wrap(io_processor, "score_data_to_prompts", _unread)
    wrap(io_processor, "parse_score_data", _already_read)
    wrap(io_processor.CrossEncoderIOProcessor, "get_score_prompt", _with_places)


async def _rendered(processor: Any, params: Mapping[str, Any]) -> Any:
    """What vLLM's ``render`` makes of a prompt, without media being fetched on a thread."""
    renderer = processor.renderer
    options = {name: params.get(name) for name in ("tok_params", "prompt_extras", "skip_mm_cache")}
    conversation = params.get("conversations") or ()
    with client_errors():
        list_contents(conversation)
    if has_media(conversation):
        chat = renderer.render_chat_async([conversation], params["chat_params"], **options)
        return _made(params, (await chat)[1])
    if "prompts" in params:
        prompt = params["prompts"]
        if isinstance(prompt, dict) and _UNREAD in prompt:
            prompt = await _read(renderer, prompt[_UNREAD])
        if isinstance(prompt, dict) and prompt.get("multi_modal_data"):
            return _made(params, await renderer.render_cmpl_async([prompt], **options))
        params = {**params, "prompts": prompt}
    elif not all(isinstance(params.get(side), str | None) for side in ("data_1", "data_2")):
        pair = await _read_pair(renderer, params["data_1"], params["data_2"])
        return await _on_both_threads(processor, {**params, "data_1": pair})
    run = partial(contextvars.copy_context().run, processor.render, params)
    return await to_its_end(renderer._executor.submit(run))


def _made(params: Mapping[str, Any], inputs: Any) -> dict[str, Any]:
    """vLLM's ``PoolingEngineInput``."""
    (prompt,) = inputs
    return {
        "prompts": prompt,
        **{name: params[name] for name in ("params", "lora_requests", "priorities")},
    }


def _on_both_threads(processor: Any, params: Mapping[str, Any]) -> Awaitable[Any]:
    """vLLM's ``render`` of a prompt with media, which uses the tokenizer and the processor.

    Each of them is for one thread only.
    """
    renderer = processor.renderer
    run = partial(contextvars.copy_context().run, processor.render, params)
    return to_its_end(renderer._executor.submit(lambda: renderer._mm_executor.submit(run).result()))


# --- scores ---------------------------------------------------------------------------------------


def _unread(_: Callable[..., Any]) -> Callable[..., Any]:
    def score_data_to_prompts(data_list: Any, role: str, model_config: Any) -> list[Any]:  # noqa: ARG001
        # vLLM calls this on its event loop.
        return [
            data if isinstance(data, str) else {"prompt": "", _UNREAD: _Unread(data, role)}
            for data in data_list
        ]

    return score_data_to_prompts


async def _read(renderer: Any, unread: _Unread) -> dict[str, Any]:
    """A query or a document as a prompt of vLLM's, with its media fetched."""
    tracker = _tracker(renderer.model_config)
    text = _text(unread, tracker)
    return _prompt(renderer, text, *await tracker.resolve_items())


async def _read_pair(renderer: Any, query: Any, document: Any) -> _Read:
    """A query and a document with their media fetched."""
    tracker = _tracker(renderer.model_config)
    texts = [_text(_Unread(query, "query"), tracker), _text(_Unread(document, "document"), tracker)]
    return _Read(*texts, *await tracker.resolve_items())


def _tracker(model_config: Any) -> Any:
    from vllm.renderers.chat_utils import AsyncMultiModalItemTracker

    return AsyncMultiModalItemTracker(model_config)


def _text(unread: _Unread, tracker: Any) -> str:
    from vllm.entrypoints.pooling.scoring import utils

    content = utils._parse_score_content(unread.role, unread.parts, tracker)
    text: str = utils._ensure_str(content)
    return text


def _prompt(renderer: Any, text: str, mm_data: Any, mm_uuids: Any) -> dict[str, Any]:
    with client_errors():
        check_places(renderer, text, mm_data)
    media = {"multi_modal_data": mm_data, "multi_modal_uuids": mm_uuids}
    return {"prompt": text, **{name: value for name, value in media.items() if value is not None}}


def _reading(original: Callable[..., Any]) -> Callable[..., Any]:
    def render(self: Any, render_params: Any) -> Any:
        from vllm.entrypoints.pooling.scoring.utils import parse_score_data_single

        prompt = render_params.get("prompts")
        if isinstance(prompt, dict) and _UNREAD in prompt:
            # ``LLM.score``, which renders without an event loop.
            found = parse_score_data_single(*prompt[_UNREAD], self.model_config)
            render_params = {**render_params, "prompts": _prompt(self.renderer, *found)}
        return original(self, render_params)

    return render


def _already_read(original: Callable[..., Any]) -> Callable[..., Any]:
    def parse_score_data(data_1: Any, data_2: Any, model_config: Any) -> Any:
        return data_1 if isinstance(data_1, _Read) else original(data_1, data_2, model_config)

    return parse_score_data


def _with_places(original: Callable[..., Any]) -> Callable[..., Any]:
    def get_score_prompt(self: Any, *args: Any, **kwargs: Any) -> Any:
        text, prompt = original(self, *args, **kwargs)
        limits = [
            name for name in ("max_tokens_per_doc", "max_tokens_per_query") if kwargs.get(name)
        ]
        limit = (*limits, "truncate_prompt_tokens")[0]
        with client_errors():
            check_places(self.renderer, text, prompt.get("multi_modal_data"), limit)
        return text, prompt

    return get_score_prompt
