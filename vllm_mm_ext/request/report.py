"""Makes the `mm_ext` block of an answer: what the media became, and what caches held of them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from vllm_mm_ext.request.media_items import MediaItem, VideoReport
from vllm_mm_ext.request.trace import RequestTrace

_VISUAL = ("video", "image", "vision_chunk")


def has_media(trace: RequestTrace) -> bool:
    """Whether the request carried media of any kind."""
    return bool(trace.videos or trace.audios or trace.items or trace.long_video)


def block(trace: RequestTrace) -> dict[str, Any]:
    """The block as plain JSON values; docs/options.md describes the keys."""
    made: dict[str, Any] = {
        "videos": [_video(trace, item, report) for item, report in trace.videos],
        "audios": [
            {"seconds": round(audio.seconds, 2), **_hit(trace, audio.cached)}
            for audio in trace.audios
        ],
        "tokens": _tokens(trace.tokens),
    }
    if trace.shows_cache_hits:
        made["cache"] = _cache(trace)
    if trace.long_video is not None:
        made["long_video"] = trace.long_video.block()
    made["stages_ms"] = {name: round(s * 1e3, 2) for name, s in trace.shown_stages.items()}
    return made


def _video(trace: RequestTrace, item: MediaItem, report: VideoReport) -> dict[str, Any]:
    return {
        "policy": report.policy,
        "frames": report.frames,
        "times": [round(float(t), 3) for t in report.times],
        "size": [report.height, report.width],
        "source_s": None if report.duration_s is None else round(report.duration_s, 3),
        "audio_s": None if report.audio_s is None else round(report.audio_s, 2),
        **({"audio_note": report.audio_note} if report.audio_note else {}),
        "reduction": report.reduction.model_dump(),
        "level": item.decision.level,
        "lowered": [dict(lowered) for lowered in item.decision.lowered],
        **_hit(trace, report.cached),
    }


def _hit(trace: RequestTrace, cached: bool) -> dict[str, bool]:
    return {"decoded_cache": cached} if trace.shows_cache_hits else {}


def _tokens(counted: Mapping[str, int]) -> dict[str, int]:
    visual = sum(counted.get(modality, 0) for modality in _VISUAL)
    return {
        "visual": visual,
        "audio": counted.get("audio", 0),
        "text": counted.get("text", 0),
    }


def _cache(trace: RequestTrace) -> dict[str, Any]:
    """Cached prompt tokens, and counts of mm items per modality.

    Counted are all items, items whose model inputs were cached, and items that lie wholly inside
    the prompt's cached prefix.
    """
    items: dict[str, dict[str, int]] = {}
    for item in trace.items:
        counts = items.setdefault(item.modality, {"items": 0, "processor": 0, "prefix": 0})
        counts["items"] += 1
        counts["processor"] += item.preprocessed
        counts["prefix"] += item.end <= (trace.cached_tokens or 0)
    return {"prompt_tokens": trace.cached_tokens, **items}
