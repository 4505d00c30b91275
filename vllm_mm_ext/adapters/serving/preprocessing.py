"""Records vLLM's preprocessing (from media to model inputs) in the request's trace."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any

from vllm_mm_ext.adapters.rendering_wrappers import Span
from vllm_mm_ext.adapters.runtime import runtime_of
from vllm_mm_ext.request.context import current_request


def started() -> float:
    """The clock's seconds at the start of preprocessing."""
    return time.perf_counter()


def finished(
    start: float, renderer: Any, spans: Mapping[str, Sequence[Span]], prompt: Sequence[int]
) -> None:
    """Record in the request's trace how long preprocessing took, and the mm items of the prompt.

    Args:
        start: Return value of ``started``.
        renderer: vLLM's renderer that has preprocessed.
        spans: Placeholders of the mm items per modality, in the order of the prompt.
        prompt: Token ids of the whole prompt.
    """
    context = current_request()
    if context is None:
        return
    trace = context.trace
    trace.add_stages({"preprocess": time.perf_counter() - start})
    embeddings = {m: sum(span.embeddings for span in found) for m, found in spans.items()}
    heard = _heard_in_videos(renderer, spans.get("video", ()), prompt)
    if heard:
        embeddings["video"] -= heard
        embeddings["audio"] = embeddings.get("audio", 0) + heard
    trace.set_tokens(embeddings, len(prompt))
    trace.set_items({m: [(s.start, s.end) for s in found] for m, found in spans.items()})


def _heard_in_videos(renderer: Any, videos: Sequence[Span], prompt: Sequence[int]) -> int:
    """Number of embeddings of sound inside video items; only some models have sound there."""
    if not videos:
        return 0
    token = runtime_of(renderer).frontend.traits.sound_token
    if token is None:
        return 0
    return sum(list(prompt[span.start : span.end]).count(token) for span in videos)


def looked_up(is_cached: Mapping[str, Sequence[bool]]) -> None:
    """Record for each item of the request, by modality, whether the processor cache held it."""
    if context := current_request():
        context.trace.preprocessed = {m: list(hits) for m, hits in is_cached.items()}
