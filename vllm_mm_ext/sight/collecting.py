"""Brings figures that are kept elsewhere into the metrics: of an API server, and of the engines."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from vllm_mm_ext.base.engine_figures import MODALITIES, STEP_KINDS, TIERS
from vllm_mm_ext.base.shared_state import EngineLoad
from vllm_mm_ext.sight.prometheus import Metrics

# What a fetcher counts: what was read, and what was known without reading.
_FETCHES: Final = {
    "http_bodies": ("http", "read"),
    "http_fresh": ("http", "known"),
    "http_not_modified": ("http", "known"),
    "file_reads": ("file", "read"),
    "file_unchanged": ("file", "known"),
    "data_decodes": ("data", "read"),
    "data_known": ("data", "known"),
    "disk_hits": ("download_cache", "read"),
}

# Of an engine's counters: the metric of each, and its labels besides the engine.
_ENGINE_COUNTERS: Final[dict[str, tuple[str, dict[str, str]]]] = {
    **{f"steps_{kind}": ("mm_ext_engine_steps_total", {"work": kind}) for kind in STEP_KINDS},
    **{
        f"step_s_{kind}": ("mm_ext_engine_step_seconds_total", {"work": kind})
        for kind in STEP_KINDS
    },
    "prefill_tokens": ("mm_ext_engine_tokens_total", {"kind": "prefill"}),
    "decode_tokens": ("mm_ext_engine_tokens_total", {"kind": "decode"}),
    **{
        f"encoder_tokens_{modality}": ("mm_ext_encoder_tokens_total", {"modality": modality})
        for modality in MODALITIES
    },
    "encoder_items": ("mm_ext_encoder_items_total", {}),
    **{
        f"{tier}_{what}": (f"mm_ext_encoder_cache_{what}_total", {"tier": tier})
        for tier in TIERS
        for what in ("hits", "adds", "evictions")
    },
    "transfer_loaded": ("mm_ext_encoder_transfer_items_total", {"outcome": "loaded"}),
    "transfer_missed": ("mm_ext_encoder_transfer_items_total", {"outcome": "missed"}),
    "transfer_waits_ended": ("mm_ext_encoder_waits_ended_total", {}),
    "kv_evictions": ("mm_ext_kv_evictions_total", {}),
}

_ENGINE_GAUGES: Final[dict[str, tuple[str, dict[str, str]]]] = {
    **{
        f"{tier}_{what}": (f"mm_ext_encoder_cache_{metric}", {"tier": tier})
        for tier in TIERS
        for what, metric in (("bytes", "bytes"), ("capacity", "max_bytes"), ("items", "items"))
    },
    "kv_used_blocks": ("mm_ext_kv_blocks", {"state": "used"}),
    "kv_kept_blocks": ("mm_ext_kv_blocks", {"state": "kept"}),
    "kv_media_items": ("mm_ext_kv_media_items", {}),
    "kv_pressure": ("mm_ext_kv_pressure", {}),
    **{
        f"kv_media_tokens_{modality}": ("mm_ext_kv_media_tokens", {"modality": modality})
        for modality in MODALITIES
    },
    "running": ("mm_ext_engine_requests", {"state": "running"}),
    "waiting": ("mm_ext_engine_requests", {"state": "waiting"}),
}


def collect_engine(
    metrics: Metrics,
    engine: int,
    grown: Mapping[str, float],
    figures: Mapping[str, float],
    load: EngineLoad | None,
) -> None:
    """Bring an engine's figures in.

    Args:
        metrics: The metrics of this process.
        engine: Index of the engine.
        grown: By how much its counters have grown since they were last brought in.
        figures: All its figures.
        load: What it says of its load, if it does.
    """
    of = {"engine": str(engine)}
    for name, amount in grown.items():
        metric, labels = _ENGINE_COUNTERS[name]
        metrics.add(metric, amount, **of, **labels)
    for name, (metric, labels) in _ENGINE_GAUGES.items():
        metrics.set(metric, figures[name], **of, **labels)
    taken = figures["kv_used_blocks"] + figures["kv_kept_blocks"]
    metrics.set("mm_ext_kv_blocks", figures["kv_blocks"] - taken, **of, state="free")
    if load is not None and load.by_engine:
        metrics.set("mm_ext_encoder_backlog_tokens", load.backlog_tokens or 0.0, **of)
        metrics.set("mm_ext_encoder_backlog_seconds", load.backlog_s or 0.0, **of)
        metrics.set("mm_ext_decode_step_seconds", load.itl_s or 0.0, **of)


def collect_api_server(metrics: Metrics, server: object, stats: Mapping[str, Any]) -> None:
    """Bring the figures of an API server in, which ``GET /mm_ext/stats`` has too.

    Args:
        metrics: The metrics of this process.
        server: Whose figures they are; hashable.
        stats: The figures.
    """

    def follow(name: str, count: float, **labels: str) -> None:
        metrics.follow(server, name, count, **labels)

    for cache in ("encoded", "decoded"):
        held = stats[f"{cache}_cache"]
        follow("mm_ext_cache_hits_total", held["hits"], cache=cache)
        follow("mm_ext_cache_misses_total", held["misses"], cache=cache)
        follow("mm_ext_cache_evictions_total", held["evicted"], cache=cache)
        metrics.set("mm_ext_cache_bytes", held["num_bytes"], cache=cache)
        metrics.set("mm_ext_cache_max_bytes", held["max_bytes"], cache=cache)
        metrics.set("mm_ext_cache_entries", held["entries"], cache=cache)
    fetches = dict.fromkeys(_FETCHES.values(), 0)
    for name, count in stats["fetch"].items():
        if name in _FETCHES:
            fetches[_FETCHES[name]] += count
    for (source, outcome), count in fetches.items():
        follow("mm_ext_fetches_total", count, source=source, outcome=outcome)
    follow("mm_ext_fetched_bytes_total", stats["fetch"].get("http_body_bytes", 0))
    for outcome, count in stats["encoder_asks"].items():
        follow("mm_ext_encoder_asks_total", count, outcome=outcome)
    for outcome, count in stats["records"].items():
        follow("mm_ext_recorded_videos_total", count, outcome=outcome)
    budget = stats["media_budget"]
    metrics.set("mm_ext_media_budget_bytes", budget["used_bytes"])
    metrics.set("mm_ext_media_budget_max_bytes", budget["max_bytes"])
    metrics.set("mm_ext_media_budget_waiting", budget["waiting"])
    decode = stats["decode"]
    metrics.set("mm_ext_decode_jobs", decode["busy"], state="running")
    metrics.set("mm_ext_decode_jobs", decode["waiting"], state="waiting")
    follow("mm_ext_decode_jobs_started_total", decode["jobs"])
    for cause in ("died", "timed_out", "cancelled"):
        follow("mm_ext_decode_worker_exits_total", decode[cause], cause=cause)
    long_video = stats["long_video"]
    metrics.set("mm_ext_long_video_requests", long_video["requests"])
    metrics.set("mm_ext_long_video_notes_bytes", long_video["note_bytes"])
    live = stats["live"]
    metrics.set("mm_ext_live_sessions", live.get("sessions", 0))
    follow("mm_ext_live_sessions_opened_total", live.get("opened", 0))
    follow("mm_ext_live_sessions_refused_total", live.get("refused", 0))
    follow("mm_ext_live_units_total", live.get("units", 0))
    follow("mm_ext_live_late_units_total", live.get("late_units", 0))
