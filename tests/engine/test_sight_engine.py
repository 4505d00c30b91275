"""Metrics and spans of a real server with two API servers."""

from __future__ import annotations

import gzip
import shutil
import subprocess
import threading
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import openai
import pytest
from dashboard_queries import ADDED, queries, series_of
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.proto.trace.v1.trace_pb2 import Span

from vllm_mm_ext.sight.metric_table import METRICS
from vllm_mm_ext.testing.checkpoints import checkpoint
from vllm_mm_ext.testing.media import make_clip
from vllm_mm_ext.testing.scraped import Scraped
from vllm_mm_ext.testing.server import Server, serve

pytestmark = [pytest.mark.engine, pytest.mark.slow]

CLIPS = 3
REQUESTS = 6
SCRAPES = 6
PROMTOOL = shutil.which("promtool")


@contextmanager
def _collector() -> Iterator[tuple[str, list[Span]]]:
    """An OTLP collector over HTTP, and the spans that it got."""
    spans: list[Span] = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["content-length"]))
            if self.headers.get("content-encoding") == "gzip":
                body = gzip.decompress(body)
            sent = ExportTraceServiceRequest.FromString(body)
            spans.extend(
                span
                for resource in sent.resource_spans
                for scope in resource.scope_spans
                for span in scope.spans
            )
            self.send_response(200)
            self.end_headers()

        def log_message(self, *_: object) -> None:
            """Nothing on stderr."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/v1/traces", spans
    finally:
        server.shutdown()
        server.server_close()


def _ask(server: Server, url: str, question: str) -> int:
    """Prompt tokens of one question about a video."""
    with server.client() as client:
        answer = client.chat.completions.create(
            model=server.model,
            messages=[
                {
                    "role": "user",
                    "content": [
                        {"type": "video_url", "video_url": {"url": url}},  # type: ignore[list-item]
                        {"type": "text", "text": question},
                    ],
                }
            ],
            max_tokens=4,
        )
    assert answer.usage is not None
    return answer.usage.prompt_tokens


def test_every_scrape_and_every_trace_is_whole(tmp_path: Path) -> None:
    clips = [tmp_path / f"{number}.mp4" for number in range(CLIPS)]
    for number, clip in enumerate(clips):
        make_clip(clip, duration=3.0, seed=number, fps=10)
    (tmp_path / "text.mp4").write_text("not a video")
    with (
        _collector() as (collector, spans),
        serve(
            checkpoint("qwen2_5_vl"),
            plugin=True,
            args=[
                *("--api-server-count", "2", "--max-model-len", "2048"),
                *("--allowed-local-media-path", str(tmp_path)),
                *("--otlp-traces-endpoint", collector),
                *("--scheduler-cls", "vllm_mm_ext.scheduler.MMExtScheduler"),
                "--ec-manager-config",
                '{"encoder_cache_manager_cls":'
                ' "vllm_mm_ext.encoder_cache.MMExtEncoderCacheManager"}',
            ],
            # Two API servers and an engine start at once.
            timeout_s=400.0,
            env={
                "OTEL_EXPORTER_OTLP_TRACES_PROTOCOL": "http/protobuf",
                "OTEL_BSP_SCHEDULE_DELAY": "200",
            },
        ) as server,
    ):
        with ThreadPoolExecutor(REQUESTS) as pool:
            prompts = list(
                pool.map(
                    lambda number: _ask(server, clips[number % CLIPS].as_uri(), f"{number}?"),
                    range(REQUESTS),
                )
            )
        with pytest.raises(openai.UnprocessableEntityError):
            _ask(server, (tmp_path / "text.mp4").as_uri(), "What?")
        with pytest.raises(openai.BadRequestError):
            _ask(server, "file:///etc/passwd", "What?")
        # What an API server keeps for itself is told every second.
        time.sleep(1.5)
        scrapes = [server.get("/metrics") for _ in range(SCRAPES)]
        time.sleep(1.0)
    for text in scrapes:
        _check_sums(Scraped(text), prompts)
    _check_names(Scraped(scrapes[-1]))
    _check_by_promtool(scrapes[-1])
    _check_spans(spans)


def _check_sums(found: Scraped, prompts: list[int]) -> None:
    assert found.sum("mm_ext_media_items_total", modality="video") == REQUESTS
    assert found.sum("mm_ext_prompt_tokens_total") == sum(prompts)
    cached = found.sum("mm_ext_prompt_tokens_total", source="prefix_cache")
    # Whichever API servers were scraped before, the engine's work is there, and there once.
    assert found.sum("mm_ext_engine_tokens_total", kind="prefill") == sum(prompts) - cached
    decoded = found.sum("mm_ext_engine_tokens_total", kind="decode")
    assert 3 * REQUESTS <= decoded <= 5 * REQUESTS
    video = found.sum("mm_ext_prompt_tokens_total", modality="video")
    encoded = found.sum("mm_ext_encoder_tokens_total", modality="video")
    assert video / REQUESTS * CLIPS <= encoded <= video
    for reason, count in (("unreadable", 1), ("forbidden", 1), ("busy", 0)):
        assert found.sum("mm_ext_refused_requests_total", reason=reason) == count
    for stage in ("queue", "encode", "prefill_wait", "prefill", "preprocess", "plan"):
        assert found.sum("mm_ext_stage_seconds_count", stage=stage) == REQUESTS, stage
    assert found.sum("mm_ext_engine_requests", state="running") == 0
    assert found.sum("mm_ext_kv_media_tokens", modality="video") > 0
    assert found.sum("mm_ext_encoder_cache_items", tier="device") > 0
    assert found.sum("mm_ext_cache_entries", cache="decoded") >= CLIPS
    hits = found.sum("mm_ext_cache_hits_total", cache="decoded")
    misses = found.sum("mm_ext_cache_misses_total", cache="decoded")
    assert hits + misses >= REQUESTS


def _check_names(found: Scraped) -> None:
    labels = found.labels()
    assert not any("pid" in names for names in labels.values())
    assert {name for name, metric in METRICS.items() if metric.kind != "histogram"} <= set(labels)
    for query in queries():
        for name, wanted in series_of(query):
            assert wanted <= labels[name] | ADDED, (name, query)


def _check_by_promtool(text: str) -> None:
    if PROMTOOL is None:
        return
    own = "\n".join(
        line
        for line in text.splitlines()
        if line.removeprefix("# HELP ").startswith("mm_ext_") or line.startswith("# TYPE mm_ext_")
    )
    checked = subprocess.run(
        [PROMTOOL, "check", "metrics"],
        input=own + "\n",
        text=True,
        capture_output=True,
        check=False,
    )
    assert (checked.returncode, checked.stderr) == (0, "")


def _check_spans(spans: list[Span]) -> None:
    requests = {span.span_id: span for span in spans if span.name == "llm_request"}
    assert len(requests) == REQUESTS
    stages: dict[bytes, Counter[str]] = {span: Counter() for span in requests}
    for span in spans:
        if span.name.startswith("mm_ext."):
            parent = requests[span.parent_span_id]
            assert span.trace_id == parent.trace_id
            stages[span.parent_span_id][span.name] += 1
            # A fetch begins before vLLM counts the request as arrived; nothing ends after it.
            assert span.end_time_unix_nano <= parent.end_time_unix_nano + 1_000_000_000
    for found in stages.values():
        assert {"mm_ext.fetch", "mm_ext.preprocess", "mm_ext.queue", "mm_ext.encode"} <= set(found)
    assert sum("mm_ext.decode" in found for found in stages.values()) >= CLIPS
