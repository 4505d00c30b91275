"""OpenTelemetry spans of a request's stages, as children of the span that vLLM makes of it.

vLLM makes its span ``llm_request`` when the request's last output is there, by a function that
keeps the span to itself. A span processor sees each span of the process end, and so learns which
span is whose. The stages become its children once the caller has the last output, too.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from opentelemetry import trace
from opentelemetry.sdk.trace import ReadableSpan, SpanProcessor, TracerProvider
from vllm.tracing import SpanAttributes

from vllm_mm_ext.request.stage_times import StageTime

_VLLM_SPAN = "llm_request"
_NS = 1_000_000_000


class RequestSpans(SpanProcessor):
    """Makes the spans. vLLM ends its spans and requests on one event loop.

    Args:
        provider: Where vLLM's spans come from, and these go to.
    """

    def __init__(self, provider: TracerProvider) -> None:
        self._tracer = provider.get_tracer("vllm_mm_ext")
        # By request id; None until vLLM has made its span.
        self._parents: dict[str, trace.SpanContext | None] = {}
        provider.add_span_processor(self)

    def expect(self, request_id: str) -> None:
        """Look out for vLLM's span of a request."""
        self._parents[request_id] = None

    def on_end(self, span: ReadableSpan) -> None:
        """Note a span of vLLM's that is awaited."""
        if span.name != _VLLM_SPAN or span.attributes is None:
            return
        request_id: Any = span.attributes.get(SpanAttributes.GEN_AI_REQUEST_ID)
        if request_id in self._parents:
            self._parents[request_id] = span.get_span_context()

    def emit(self, request_id: str, stages: Iterable[StageTime]) -> None:
        """Make the spans of a request; none if vLLM made none.

        Args:
            request_id: vLLM's id of the request.
            stages: Its stages.
        """
        parent = self._parents.pop(request_id, None)
        if parent is None:
            return
        context = trace.set_span_in_context(trace.NonRecordingSpan(parent))
        for stage in stages:
            attributes: dict[str, str | int] = {}
            if stage.item is not None:
                attributes = {"mm_ext.item": stage.item, "mm_ext.modality": stage.modality}
            span = self._tracer.start_span(
                f"mm_ext.{stage.stage}",
                context,
                start_time=int(stage.began * _NS),
                attributes=attributes,
            )
            span.end(int((stage.began + stage.seconds) * _NS))


def spans_of_process() -> RequestSpans | None:
    """Spans beside those that vLLM exports from this process; None if it exports none."""
    provider = trace.get_tracer_provider()
    return RequestSpans(provider) if isinstance(provider, TracerProvider) else None
