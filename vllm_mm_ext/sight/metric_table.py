"""All metrics of the plugin, by name: what each counts, its labels and their values.

``python -m vllm_mm_ext.sight.metric_table`` prints the table that ``docs/watching.md`` has.
Dashboards and alerts use its names.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Final, Literal

from vllm_mm_ext.base.engine_figures import MODALITIES, STEP_KINDS, TIERS
from vllm_mm_ext.request.stage_times import STAGES

Kind = Literal["counter", "gauge", "histogram"]

#: Where a label has no list of values: the index of an engine, the number of a load tier. The
#: configuration bounds both.
NUMBER: Final[tuple[str, ...]] = ()
#: What a value becomes that is not in the list of its label.
OTHER: Final = "other"

# Seconds: from what a cache takes to what a client hardly waits for.
_SECONDS: Final = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
_CODECS: Final = (
    *("h264", "hevc", "vp8", "vp9", "av1", "mpeg4", "mpeg2video", "mjpeg", "gif", "prores"),
    *("aac", "mp3", "opus", "vorbis", "flac", "pcm_s16le", OTHER),
)
_REASONS: Final = (
    *("media_error", "forbidden", "unreachable", "origin_error", "origin_timeout", "too_large"),
    *("too_long", "unreadable", "unsupported_format", "no_stream", "decode_timeout"),
    *("decode_crash", "over_budget", "option", "busy", "internal", OTHER),
)

_STAGE = ("stage", STAGES)
_MODALITY = ("modality", ("video", "audio", "image", "text", OTHER))
_CODEC = ("codec", _CODECS)
_CACHE = ("cache", ("encoded", "decoded"))
_ENGINE = ("engine", NUMBER)
_TIER = ("tier", TIERS)


@dataclass(frozen=True)
class Metric:
    """One metric family.

    Attributes:
        name: As scraped; counters end with ``_total``.
        kind: Prometheus' type.
        help: What the metric tells, in a sentence.
        labels: The values that each label can have; ``NUMBER`` for numbers.
        mode: Of a gauge, how several API servers' values become one: ``livesum`` where each has
            its own, ``mostrecent`` where all tell the same.
        buckets: Upper bounds of a histogram's buckets.
    """

    name: str
    kind: Kind
    help: str
    labels: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    mode: Literal["", "livesum", "mostrecent"] = ""
    buckets: tuple[float, ...] = ()


_Labels = tuple[str, tuple[str, ...]]


def _counter(name: str, text: str, *labels: _Labels) -> Metric:
    return Metric(name, "counter", text, dict(labels))


def _gauge(name: str, text: str, *labels: _Labels) -> Metric:
    return Metric(name, "gauge", text, dict(labels), "livesum")


def _of_service(name: str, text: str, *labels: _Labels) -> Metric:
    return Metric(name, "gauge", text, dict(labels), "mostrecent")


_OF_REQUESTS: Final = (
    Metric(
        "mm_ext_stage_seconds",
        "histogram",
        "Seconds of a stage: of one media item, or (modality request) of a request with media.",
        dict([_STAGE, ("modality", ("video", "audio", "image", "request", OTHER))]),
        buckets=_SECONDS,
    ),
    _counter(
        "mm_ext_media_items_total",
        "Media that requests got: decoded for them, from the decoded cache, or downloaded for "
        "vLLM's own decoders (images).",
        _MODALITY,
        _CODEC,
        ("source", ("decoder", "cache", "vllm")),
    ),
    _counter(
        "mm_ext_media_seconds_total",
        "Seconds of media, at its own speed, that requests got.",
        _MODALITY,
        _CODEC,
    ),
    _counter(
        "mm_ext_media_bytes_total",
        "Encoded bytes of the media that requests got.",
        _MODALITY,
        _CODEC,
    ),
    _counter(
        "mm_ext_frames_total",
        "Frames of video that requests got.",
        ("policy", ("uniform", "keyframe", "adaptive", "explicit", "stock", OTHER)),
    ),
    _counter(
        "mm_ext_prompt_tokens_total",
        "Prompt tokens of requests with media; text is what no item stands for.",
        _MODALITY,
        ("source", ("computed", "prefix_cache")),
    ),
    _counter(
        "mm_ext_prompt_items_total",
        "Media items in prompts (a segment of a video is one), and whether the processor cache "
        "held their model inputs.",
        _MODALITY,
        ("inputs", ("computed", "cached")),
    ),
    _counter(
        "mm_ext_videos_total", "Videos by the load tier that served them.", ("load_tier", NUMBER)
    ),
    _counter(
        "mm_ext_lowered_total",
        "What videos got less of than was asked for, and why.",
        ("what", ("frames", "resolution", "reduction", OTHER)),
        ("why", ("load", "total_tokens", "context", "limit", OTHER)),
    ),
    _counter(
        "mm_ext_refused_requests_total",
        "Requests that the plugin refused, by reason.",
        ("reason", _REASONS),
    ),
    _counter(
        "mm_ext_long_video_windows_total",
        "Windows of long videos, and what came of them.",
        ("outcome", ("seen", "note_kept", "failed", "left_out")),
    ),
)

_OF_API_SERVERS: Final = (
    _gauge("mm_ext_long_video_requests", "Requests about long videos under way."),
    _gauge("mm_ext_long_video_notes_bytes", "Bytes of notes about windows that are kept."),
    _gauge("mm_ext_live_sessions", "Live sessions that are open."),
    _counter("mm_ext_live_sessions_opened_total", "Live sessions that were opened."),
    _counter("mm_ext_live_sessions_refused_total", "Live sessions refused, as there are too many."),
    _counter("mm_ext_live_units_total", "Units of sound and frames that live sessions appended."),
    _counter("mm_ext_live_late_units_total", "Those of them that came too late to keep up."),
    _counter("mm_ext_cache_hits_total", "Lookups that an API server's cache answered.", _CACHE),
    _counter("mm_ext_cache_misses_total", "Lookups that it could not answer.", _CACHE),
    _counter("mm_ext_cache_evictions_total", "Entries dropped to make room for others.", _CACHE),
    _gauge("mm_ext_cache_bytes", "Bytes in an API server's caches.", _CACHE),
    _gauge("mm_ext_cache_max_bytes", "Bytes that these caches may hold.", _CACHE),
    _gauge("mm_ext_cache_entries", "Entries in an API server's caches.", _CACHE),
    _counter(
        "mm_ext_fetches_total",
        "Media behind URLs that were read, and that were known without reading.",
        ("source", ("http", "file", "data", "download_cache")),
        ("outcome", ("read", "known")),
    ),
    _counter(
        "mm_ext_encoder_asks_total",
        "Requests for whose media encoder instances were asked, by what became of it.",
        ("outcome", ("encoded", "refused", "failed", "ended", "none_up")),
    ),
    _counter(
        "mm_ext_recorded_videos_total",
        "Videos for which an encoder instance was asked: taken by its record without decoding, "
        "decoded here for lack of one, and decoded after all for lack of an output.",
        ("outcome", ("recorded", "decoded", "decoded_later")),
    ),
    _counter("mm_ext_fetched_bytes_total", "Bytes downloaded over HTTP."),
    _gauge("mm_ext_media_budget_bytes", "Bytes of media that requests hold outside of caches."),
    _gauge("mm_ext_media_budget_max_bytes", "Bytes of media that they may hold."),
    _gauge("mm_ext_media_budget_waiting", "Media that wait for bytes of the media budget."),
    _gauge(
        "mm_ext_decode_jobs",
        "Probes and decodes that run, and that wait for a worker.",
        ("state", ("running", "waiting")),
    ),
    _counter("mm_ext_decode_jobs_started_total", "Probes and decodes that workers were given."),
    _counter(
        "mm_ext_decode_worker_exits_total",
        "Decode workers that ended during a job.",
        ("cause", ("died", "timed_out", "cancelled")),
    ),
)

_OF_ENGINES: Final = (
    _of_service("mm_ext_load_tier", "Load tier of the service; 0 is full quality."),
    _counter(
        "mm_ext_engine_steps_total",
        "Steps by what they did; encode: with encoder work, whatever else they did.",
        _ENGINE,
        ("work", STEP_KINDS),
    ),
    _counter(
        "mm_ext_engine_step_seconds_total",
        "Seconds of these steps; of overlapping steps, from the end of the one before.",
        _ENGINE,
        ("work", STEP_KINDS),
    ),
    _counter(
        "mm_ext_engine_tokens_total",
        "Tokens that steps computed, of prompts and of answers.",
        _ENGINE,
        ("kind", ("prefill", "decode")),
    ),
    _counter(
        "mm_ext_encoder_tokens_total",
        "Encoder outputs that were computed, in tokens.",
        _ENGINE,
        ("modality", MODALITIES),
    ),
    _counter("mm_ext_encoder_items_total", "Media items that were encoded.", _ENGINE),
    _counter(
        "mm_ext_encoder_cache_hits_total",
        "Encoder outputs of earlier requests found on the device, and loaded from the host.",
        _ENGINE,
        _TIER,
    ),
    _counter(
        "mm_ext_encoder_cache_adds_total", "Encoder outputs that a tier took in.", _ENGINE, _TIER
    ),
    _counter(
        "mm_ext_encoder_cache_evictions_total",
        "Encoder outputs dropped to make room for others.",
        _ENGINE,
        _TIER,
    ),
    _counter(
        "mm_ext_encoder_transfer_items_total",
        "Media items of an instance that shares encoder outputs: loaded from elsewhere, and not "
        "there, so encoded here.",
        _ENGINE,
        ("outcome", ("loaded", "missed")),
    ),
    _counter(
        "mm_ext_encoder_waits_ended_total",
        "Requests that stopped waiting for an encoder instance, of which nothing came.",
        _ENGINE,
    ),
    _of_service(
        "mm_ext_encoder_cache_bytes", "Bytes of encoder outputs in a tier.", _ENGINE, _TIER
    ),
    _of_service("mm_ext_encoder_cache_max_bytes", "Bytes that a tier may hold.", _ENGINE, _TIER),
    _of_service("mm_ext_encoder_cache_items", "Encoder outputs in a tier.", _ENGINE, _TIER),
    _of_service(
        "mm_ext_kv_blocks",
        "KV blocks that requests use, that are kept for media, and all others.",
        _ENGINE,
        ("state", ("used", "kept", "free")),
    ),
    _of_service(
        "mm_ext_kv_media_tokens",
        "Tokens of media in the KV cache, in use or kept; text is that of their markers, and what "
        "is kept with them.",
        _ENGINE,
        ("modality", MODALITIES),
    ),
    _of_service("mm_ext_kv_pressure", "Share of KV blocks that are used or kept, 0 to 1.", _ENGINE),
    _of_service("mm_ext_kv_media_items", "Media in the KV cache, in use or kept.", _ENGINE),
    _counter(
        "mm_ext_kv_evictions_total",
        "Pieces of prompts, mm items and text, of which the pool gave KV blocks up.",
        _ENGINE,
    ),
    _of_service(
        "mm_ext_engine_requests",
        "Requests in an engine.",
        _ENGINE,
        ("state", ("running", "waiting")),
    ),
    _of_service(
        "mm_ext_encoder_backlog_tokens",
        "Encoder outputs that requests still need (with the plugin's scheduler).",
        _ENGINE,
    ),
    _of_service(
        "mm_ext_encoder_backlog_seconds",
        "Seconds of encoding that these take, at this engine's measured price.",
        _ENGINE,
    ),
    _of_service(
        "mm_ext_decode_step_seconds",
        "Average seconds of steps in which some request decodes (with the plugin's scheduler).",
        _ENGINE,
    ),
)

METRICS: Final[dict[str, Metric]] = {
    metric.name: metric for metric in (*_OF_REQUESTS, *_OF_API_SERVERS, *_OF_ENGINES)
}


def to_markdown() -> str:
    """The table of metrics for ``docs/watching.md``."""
    lines = ["| metric | type | labels | tells |", "| --- | --- | --- | --- |"]
    for metric in METRICS.values():
        labels = "; ".join(
            f"`{label}`: {', '.join(values) or 'a number'}"
            for label, values in metric.labels.items()
        )
        lines.append(f"| `{metric.name}` | {metric.kind} | {labels} | {metric.help} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    print(to_markdown(), end="")
