"""From a request's options to its answer's report: what the wrapped OpenAI routes call."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable
from typing import Any

from vllm_mm_ext.adapters.error_answers import client_errors
from vllm_mm_ext.adapters.serving.requests import read_options, refuse_options
from vllm_mm_ext.request import report
from vllm_mm_ext.request.blocks import KEY, with_block
from vllm_mm_ext.request.context import RequestContext, current_request, enter_request
from vllm_mm_ext.request.trace import RequestTrace


def begin(raw: Any, session: str | None) -> None:
    """Note what a request asks, in the context that the middleware opened for it, or in a new one.

    Args:
        raw: Value of the body's `mm_ext`; None when it has none.
        session: Session id of the request.

    Raises:
        VLLMValidationError: An option is wrong (a 400).
    """
    context = current_request() or enter_request(RequestContext())
    with client_errors():
        context.options = read_options(raw)
    context.session = session
    context.trace.asked = raw is not None


def begin_without_options(raw: Any, route: str) -> None:
    """Start a request of a route that takes none; a block becomes vLLM's own 400."""
    with client_errors():
        refuse_options(raw, route)


def answered(response: Any) -> None:
    """Add the block to a response object of vLLM's."""
    with client_errors():
        if trace := _reported():
            setattr(response, KEY, report.block(trace))


def streamed(chunks: AsyncGenerator[str, None], choices: int) -> AsyncGenerator[str, None]:
    """Add the block to the last chunk of a stream."""
    trace = _reported()
    if trace is None:
        return chunks
    return with_block(chunks, choices, lambda: report.block(trace))


def resume() -> Callable[[], None]:
    """What takes the request over to wherever its events are made."""
    context = current_request()

    def enter() -> None:
        if context is not None:
            enter_request(context)

    return enter


def observer() -> Callable[[int | None], None] | None:
    """What notes how much of the prompt the prefix cache held, for requests that are reported."""
    trace = _reported()
    if trace is None:
        return None

    def seen(cached_tokens: int | None) -> None:
        trace.cached_tokens = cached_tokens

    return seen


def _reported() -> RequestTrace | None:
    """The current request's trace if the client gets to see it: it sent media, or options."""
    context = current_request()
    if context is None or not (context.trace.asked or report.has_media(context.trace)):
        return None
    return context.trace
