"""The `mm_ext` block of an answer: what the media became, and what was served from where."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from vllm_mm_ext.request.trace import RequestTrace, VideoTrace

_VISUAL = ("video", "image", "vision_chunk")


def has_media(trace: RequestTrace) -> bool:
    """Whether the request carried media of any kind."""
    return bool(trace.videos or trace.audios or trace.items)


def block(trace: RequestTrace) -> dict[str, Any]:
    """What is reported to the client, as plain JSON values (docs/options.md describes the keys)."""
    return {
        "videos": [_video(trace, video) for video in trace.videos_in_order()],
        "audios": [
            {"seconds": audio["seconds"], "decoded_cache": audio["cached"]}
            for audio in trace.audios
        ],
        "tokens": _tokens(trace.tokens),
        "cache": _cache(trace),
        "stages_ms": {name: round(s * 1e3, 2) for name, s in trace.stages.items()},
    }


def _video(trace: RequestTrace, video: VideoTrace) -> dict[str, Any]:
    plan = trace.plans.get(video.url)
    return {
        "policy": video.policy,
        "frames": video.frames,
        "times": [round(float(t), 3) for t in video.times],
        "size": [video.height, video.width],
        "source_s": None if video.duration_s is None else round(video.duration_s, 3),
        "audio_s": None if video.audio_s is None else round(video.audio_s, 2),
        "reduction": video.reduction.model_dump(),
        "level": 0 if plan is None else plan.level,
        "lowered": [] if plan is None else [dict(lowered) for lowered in plan.lowered],
        "decoded_cache": video.cached,
    }


def _tokens(counted: Mapping[str, int]) -> dict[str, int]:
    visual = sum(counted.get(modality, 0) for modality in _VISUAL)
    return {
        "visual": visual,
        "audio": counted.get("audio", 0),
        "text": counted.get("text", 0),
    }


def _cache(trace: RequestTrace) -> dict[str, Any]:
    """Counts of mm items per modality: all, with cached inputs, wholly inside the cached prefix."""
    items: dict[str, dict[str, int]] = {}
    for item in trace.items:
        counts = items.setdefault(item.modality, {"items": 0, "processor": 0, "prefix": 0})
        counts["items"] += 1
        counts["processor"] += item.preprocessed
        counts["prefix"] += item.end <= (trace.cached_tokens or 0)
    return {"prompt_tokens": trace.cached_tokens, **items}
