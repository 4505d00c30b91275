"""Reads a request's options and adds the report to its answer, around vLLM's OpenAI routes."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Mapping
from typing import Any

from blake3 import blake3

from vllm_mm_ext.adapters.error_answers import client_errors
from vllm_mm_ext.adapters.rendering_wrappers import part_with_media
from vllm_mm_ext.adapters.runtime import runtime_of
from vllm_mm_ext.adapters.serving.requests import (
    moves_kv,
    read_options,
    refuse_long_video,
    refuse_options,
)
from vllm_mm_ext.adapters.sight.recorder import Recorder
from vllm_mm_ext.request import report
from vllm_mm_ext.request.blocks import KEY, with_block
from vllm_mm_ext.request.context import RequestContext, current_request, enter_request
from vllm_mm_ext.request.media_items import MediaItem
from vllm_mm_ext.request.trace import RequestTrace


def begin(raw: Any, session: str | None, transfer: Mapping[str, Any] | None = None) -> None:
    """Put a request's options and session into its context, which the middleware opened.

    Without the middleware (vLLM used in Python) a new context is opened for each request, also
    where one coroutine sends several.

    Args:
        raw: Value of `mm_ext` in the request's body; None if the body has none.
        session: Session id of the request; None if it has none.
        transfer: The request's ``kv_transfer_params``.

    Raises:
        VLLMValidationError: An option is wrong (a 400).
    """
    context = current_request()
    if context is None or context.is_begun:
        context = enter_request(RequestContext())
    context.is_begun = True
    with client_errors():
        context.options = read_options(raw)
    context.session = session
    context.disaggregated |= moves_kv(transfer)
    # A key is for routers; gateways add it for clients.
    context.trace.asked = raw is not None and raw.keys() != {"key"}
    context.trace.note_task()


def begin_response(
    raw: Any, session: str | None, transfer: Mapping[str, Any] | None = None
) -> None:
    """Start a request of ``/v1/responses``, which has all options but `long_video`.

    Args:
        raw, session, transfer: As of ``begin``.

    Raises:
        VLLMValidationError: An option is wrong (a 400).
    """
    begin(raw, session, transfer)
    with client_errors():
        if isinstance(raw, dict) and raw.get("long_video") is not None:
            refuse_long_video("/v1/responses")


def goes_on(task: asyncio.Task[Any]) -> None:
    """Note the task that makes a response of the current request in the background."""
    if (context := current_request()) is not None:
        context.trace.note_task(task)


def note_task() -> None:
    """Note that the current task serves the current request."""
    if (context := current_request()) is not None:
        context.trace.note_task()


def begin_without_options(raw: Any, route: str) -> None:
    """Start a request of a route that takes no options.

    What a route makes that only renders a prompt is sent to ``/inference/v1/generate``, which
    refuses items that share tokens, as a video and its sound do.

    Args:
        raw: Value of `mm_ext` in the request's body; None if the body has none.
        route: Path of the route, for the message.

    Raises:
        VLLMValidationError: The body has a block (a 400).
    """
    note_task()
    with client_errors():
        refuse_options(raw, route)
    if route.endswith("/render"):
        (current_request() or enter_request(RequestContext())).silent = True


async def begin_with_file(sound: bytes) -> None:
    """Start a request that came with a sound file; takedowns know the file by its digest.

    Args:
        sound: The file.
    """
    note_task()
    context = current_request()
    if context is None or not context.trace.watched:
        return
    item = MediaItem("audio", "")
    context.add([item])
    item.digest = await asyncio.to_thread(lambda: str(blake3(sound).hexdigest()))


def answered(response: Any) -> None:
    """Add the `mm_ext` block to vLLM's response object of an answer that is not streamed."""
    with client_errors():
        if trace := _reported():
            setattr(response, KEY, report.block(trace))


def streamed(chunks: AsyncGenerator[str, None], choices: int) -> AsyncGenerator[str, None]:
    """Add the `mm_ext` block to the last chunk of a stream.

    Args:
        chunks: Server-sent events of the answer.
        choices: Number of choices of the answer.
    """
    trace = _reported()
    if trace is None:
        return chunks
    if trace.long_video is not None:
        return with_block(chunks, choices, lambda: report.block(trace), trace.long_video.hear)
    return with_block(chunks, choices, lambda: report.block(trace))


def resume() -> Callable[[], None]:
    """A function that makes the current request current again in another task.

    vLLM makes the events of some streams in a task that does not have the request's context.
    """
    context = current_request()

    def enter() -> None:
        if context is not None:
            enter_request(context)

    return enter


class _Followed:
    """A prompt of a request with media on its way through the engine.

    Args:
        whole: Trace of the request.
        trace: The same as it tells of this prompt.
        recorder: Takes note of requests.
    """

    def __init__(self, whole: RequestTrace, trace: RequestTrace, recorder: Recorder | None) -> None:
        self._whole = whole
        self._trace = trace
        self._recorder = recorder

    def sent(self) -> None:
        if self._recorder is not None:
            self._recorder.sent(self._trace)

    def first(self, output: Any) -> None:
        self._whole.cached_tokens = self._trace.cached_tokens = output.num_cached_tokens
        if self._recorder is not None:
            self._recorder.answered(self._trace, output)

    def ended(self) -> None:
        if self._recorder is not None:
            self._recorder.left_engine(self._trace)


def observer(request_id: str, prompt: Any) -> _Followed | None:
    """Follows a prompt through the engine; None where the answer gets no block.

    The steps of a beam search, which are prompts to the engine, are not followed but for the first:
    none of them is rendered, and a rendered prompt begins without ``cached_tokens``.

    Args:
        request_id: vLLM's id of the prompt.
        prompt: vLLM's input for the engine.
    """
    trace, context = _reported(), current_request()
    if trace is None or context is None or trace.cached_tokens is not None:
        return None
    trace.request_id = request_id
    own = trace.of_prompt(part_with_media(prompt).get("prompt_token_ids"), request_id)
    return _Followed(trace, own, runtime_of(context.renderer).recorder)


def _reported() -> RequestTrace | None:
    """The current request's trace if its answer gets a block: it has media or options."""
    context = current_request()
    if context is None or not (context.trace.asked or report.has_media(context.trace)):
        return None
    return context.trace
