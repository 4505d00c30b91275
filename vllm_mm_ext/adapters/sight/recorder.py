"""Puts what happens to requests into the metrics and the traces of this API server."""

from __future__ import annotations

import time
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from vllm_mm_ext.base.engine_figures import EngineBoard, EngineTimes
from vllm_mm_ext.request.media_items import AudioReport, MediaItem, VideoReport
from vllm_mm_ext.request.stage_times import StageTime
from vllm_mm_ext.request.trace import RequestTrace
from vllm_mm_ext.sight.harmless import harmless
from vllm_mm_ext.sight.metric_table import OTHER
from vllm_mm_ext.sight.prometheus import Metrics

if TYPE_CHECKING:
    from vllm_mm_ext.adapters.sight.request_spans import RequestSpans


class Recorder:
    """What one API server tells of its requests.

    Args:
        metrics: The metrics of this process; None if they are off.
        board: The figures of the service's engines.
        spans: Makes spans of the stages of requests; None if nobody traces.
    """

    def __init__(
        self, metrics: Metrics | None, board: EngineBoard, spans: RequestSpans | None
    ) -> None:
        self._metrics = metrics
        self._board = board
        self._spans = spans

    @harmless
    def stages(self, times: Iterable[StageTime]) -> None:
        """Count stages of a request."""
        if self._metrics is not None:
            for time_ in times:
                self._metrics.observe(
                    "mm_ext_stage_seconds",
                    max(0.0, time_.seconds),
                    stage=time_.stage,
                    modality=time_.modality or "request",
                )

    @harmless
    def delivered(self, item: MediaItem, codec: str, num_bytes: int) -> None:
        """Count a media item that a request got.

        Args:
            item: The item, with its report.
            codec: FFmpeg's name of the codec of its frames, or of a sound.
            num_bytes: Encoded size.
        """
        metrics, report = self._metrics, item.report
        if metrics is None or report is None:
            return
        of: dict[str, str] = {"modality": item.modality, "codec": codec}
        source = "cache" if report.cached else "decoder"
        metrics.add("mm_ext_media_items_total", 1.0, **of, source=source)
        seconds = report.seconds if isinstance(report, AudioReport) else report.duration_s
        metrics.add("mm_ext_media_seconds_total", seconds or 0.0, **of)
        metrics.add("mm_ext_media_bytes_total", num_bytes, **of)
        if isinstance(report, VideoReport):
            metrics.add("mm_ext_frames_total", report.frames, policy=report.policy)
            metrics.add("mm_ext_videos_total", load_tier=str(item.decision.level))
            for lowered in item.decision.lowered:
                metrics.add("mm_ext_lowered_total", what=lowered["what"], why=lowered["why"])

    @harmless
    def surveyed(self, codec: str, num_bytes: int) -> None:
        """Count the file of a long video, of which a request gets windows.

        Args:
            codec: FFmpeg's name of the codec of its frames.
            num_bytes: Encoded size.
        """
        if self._metrics is not None:
            of: dict[str, str] = {"modality": "video", "codec": codec}
            self._metrics.add("mm_ext_media_bytes_total", num_bytes, **of)

    @harmless
    def downloaded(self, modality: str, num_bytes: int) -> None:
        """Count media that vLLM itself decodes; nobody has looked at its codec or length."""
        if self._metrics is not None:
            labels: dict[str, str] = {"modality": modality, "codec": OTHER}
            self._metrics.add("mm_ext_media_items_total", 1.0, **labels, source="vllm")
            self._metrics.add("mm_ext_media_bytes_total", num_bytes, **labels)

    @harmless
    def rendered(self, trace: RequestTrace) -> None:
        """Count the mm items of a prompt."""
        if self._metrics is not None:
            for item in trace.items:
                inputs = "cached" if item.preprocessed else "computed"
                self._metrics.add(
                    "mm_ext_prompt_items_total", modality=item.modality, inputs=inputs
                )

    @harmless
    def sent(self, trace: RequestTrace) -> None:
        """Note that a request with media goes to the engine."""
        if self._spans is not None and trace.items:
            self._spans.expect(trace.request_id)

    @harmless
    def answered(self, trace: RequestTrace, output: Any) -> None:
        """Note the engine's first output for a request.

        Args:
            trace: Of the request, with its cached tokens.
            output: vLLM's ``RequestOutput``.
        """
        if not trace.items:
            return
        stats = output.metrics
        if stats is not None:
            stages = _engine_stages(stats, self._board.times(stats.arrival_time), time.time())
            trace.timeline += stages
            self.stages(stages)
            if not stats.num_generation_tokens:
                # Nobody knows how much of the prompt was computed before the request ended.
                return
        if self._metrics is not None:
            cached = trace.cached_by_modality()
            for modality, tokens in trace.tokens.items():
                held = cached[modality]
                for source, count in (("computed", tokens - held), ("prefix_cache", held)):
                    self._metrics.add(
                        "mm_ext_prompt_tokens_total", count, modality=modality, source=source
                    )

    @harmless
    def left_engine(self, trace: RequestTrace) -> None:
        """Note that a request's last output is there, or that nobody waits for it any more."""
        if self._spans is not None and trace.items:
            self._spans.emit(trace.request_id, trace.timeline)

    @harmless
    def ended(self, trace: RequestTrace) -> None:
        """Count how an HTTP request ended."""
        metrics = self._metrics
        if metrics is None:
            return
        if trace.refused:
            metrics.add("mm_ext_refused_requests_total", reason=trace.refused)
        outcome = None if trace.long_video is None else trace.long_video.outcome
        if outcome is not None:
            windows = "mm_ext_long_video_windows_total"
            for seen in outcome.windows:
                kept = "note_kept" if seen.is_kept else "seen"
                metrics.add(windows, outcome="failed" if seen.failed else kept)
            metrics.add(windows, len(outcome.left_out), outcome="left_out")


def _engine_stages(stats: Any, times: EngineTimes | None, now: float) -> list[StageTime]:
    """Stages in the engine, up to the first token.

    The engine's clock may be that of another machine, so stages are placed by their distance to
    the last token, which has just come. Steps for the encoder and for the prompt alternate; their
    stages are placed one after the other. A request that ended before its first token has waited
    at most.

    Args:
        stats: vLLM's ``RequestStateStats``.
        times: What the engine tells of the request, if it does.
        now: Seconds since the epoch.
    """
    if not (stats.queued_ts and stats.scheduled_ts):
        return []
    waited = stats.scheduled_ts - stats.queued_ts
    total = stats.first_token_ts - stats.scheduled_ts
    # An answer that is not streamed comes with its last token alone.
    began = now - (stats.last_token_ts - stats.scheduled_ts)
    queued = StageTime("queue", began - waited, waited)
    if not stats.num_generation_tokens:
        return [queued]
    if times is None:
        return [queued, StageTime("prefill", began, total)]
    found = [queued]
    for stage, seconds in (
        ("encode", times.encode_s),
        ("prefill_wait", times.wait_s),
        ("prefill", times.prefill_s),
    ):
        found.append(StageTime(stage, began, seconds))
        began += seconds
    return found
