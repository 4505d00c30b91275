"""From a request's options to its answer's report: what the wrapped OpenAI routes call."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable
from typing import Any

from vllm_mm_ext.adapters.error_answers import client_errors
from vllm_mm_ext.adapters.serving.requests import open_request, refuse_options
from vllm_mm_ext.request import report
from vllm_mm_ext.request.blocks import KEY, with_block
from vllm_mm_ext.request.trace import RequestTrace, current_trace, open_trace, resume_trace


def begin(raw: Any, session: str | None) -> None:
    """Start a request; see ``open_request``. A wrong option becomes vLLM's own 400."""
    with client_errors():
        open_request(raw, session)
    trace = current_trace() or open_trace()
    trace.asked = raw is not None


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
    """Carry the request over to wherever its events are made."""
    trace = current_trace()
    return (lambda: None) if trace is None else (lambda: resume_trace(trace))


def observer() -> Callable[[int | None], None] | None:
    """Record how much of the prompt the prefix cache held, for requests that are reported."""
    trace = _reported()
    if trace is None:
        return None

    def seen(cached_tokens: int | None) -> None:
        trace.cached_tokens = cached_tokens

    return seen


def _reported() -> RequestTrace | None:
    """The current trace if the client gets to see it: it sent media, or options."""
    trace = current_trace()
    if trace is None or not (trace.asked or report.has_media(trace)):
        return None
    return trace
