"""Spans of a request's stages, below the span that vLLM itself makes of the request."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from opentelemetry import trace
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from vllm.v1.engine.output_processor import OutputProcessor
from vllm.v1.metrics.stats import IterationStats, RequestStateStats

from vllm_mm_ext.adapters.sight.request_spans import RequestSpans
from vllm_mm_ext.request.stage_times import StageTime

STAGES = [
    StageTime("fetch", 1000.0, 0.25, "video", 0),
    StageTime("decode", 1000.25, 1.5, "video", 0),
    StageTime("preprocess", 1002.0, 0.125),
]
CLIENT = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"


@pytest.fixture
def exported(monkeypatch: pytest.MonkeyPatch) -> tuple[TracerProvider, InMemorySpanExporter]:
    provider, exporter = TracerProvider(), InMemorySpanExporter()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    # As ``set_tracer_provider`` does, which works once in a process.
    monkeypatch.setattr(trace, "_TRACER_PROVIDER", provider)
    return provider, exporter


def _vllm_traces(request_id: str, headers: dict[str, str] | None = None) -> None:
    state = SimpleNamespace(
        stats=RequestStateStats(arrival_time=1000.0),
        external_req_id=request_id,
        prompt_token_ids=[1, 2],
        prompt_embeds=None,
        **dict.fromkeys(("top_p", "max_tokens_param", "temperature", "n")),
    )
    output = SimpleNamespace(trace_headers=headers)
    OutputProcessor.do_tracing(SimpleNamespace(), output, state, IterationStats())


def _named(exporter: InMemorySpanExporter, name: str) -> ReadableSpan:
    (found,) = (span for span in exporter.get_finished_spans() if span.name == name)
    return found


def _trace_id(span: ReadableSpan) -> str:
    context = span.get_span_context()
    assert context is not None
    return f"{context.trace_id:032x}"


def test_stages_are_children_of_the_span_that_vllm_makes(
    exported: tuple[TracerProvider, InMemorySpanExporter],
) -> None:
    provider, exporter = exported
    spans = RequestSpans(provider)
    spans.expect("chat-1")
    _vllm_traces("chat-1", {"traceparent": CLIENT})
    spans.emit("chat-1", STAGES)
    parent = _named(exporter, "llm_request")
    decode = _named(exporter, "mm_ext.decode")
    assert decode.parent == parent.get_span_context()
    assert _trace_id(decode) == _trace_id(parent) == CLIENT.split("-")[1]
    assert (decode.start_time, decode.end_time) == (1000_250_000_000, 1001_750_000_000)
    assert decode.attributes == {"mm_ext.item": 0, "mm_ext.modality": "video"}
    assert not _named(exporter, "mm_ext.preprocess").attributes
    assert len(exporter.get_finished_spans()) == 1 + len(STAGES)


def test_a_request_that_vllm_does_not_trace_has_no_spans(
    exported: tuple[TracerProvider, InMemorySpanExporter],
) -> None:
    provider, exporter = exported
    spans = RequestSpans(provider)
    spans.expect("aborted")
    spans.emit("aborted", STAGES)
    _vllm_traces("text only")
    spans.emit("text only", STAGES)
    assert [span.name for span in exporter.get_finished_spans()] == ["llm_request"]
    assert not spans._parents
