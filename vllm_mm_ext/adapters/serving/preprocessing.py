"""Records vLLM's preprocessing (from media to model inputs) in the request's trace."""

from __future__ import annotations

import time
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from vllm_mm_ext.adapters.rendering_wrappers import Span
from vllm_mm_ext.adapters.runtime import Runtime, runtime_of
from vllm_mm_ext.adapters.sight.stage_notes import note_preprocessing
from vllm_mm_ext.request.context import RequestContext, current_request
from vllm_mm_ext.request.trace import Prompt


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
    if context.unreported:
        trace.hashes.update(s.mm_hash for found in spans.values() for s in found if s.mm_hash)
        return
    # What was refused before was not needed: the sound of a video that has none (/v1/systemone).
    trace.refused = ""
    seconds = time.perf_counter() - start
    trace.add_stages({"preprocess": seconds})
    embeddings = {m: sum(span.embeddings for span in found) for m, found in spans.items()}
    heard = _heard_in_videos(renderer, spans.get("video", ()), prompt)
    if heard:
        embeddings["video"] -= heard
        embeddings["audio"] = embeddings.get("audio", 0) + heard
    trace.set_tokens(embeddings, len(prompt))
    trace.set_items(
        {m: [(s.start, s.end, s.embeddings) for s in found] for m, found in spans.items()},
        {m: [s.mm_hash for s in found] for m, found in spans.items()},
    )
    trace.prompts.append(Prompt(prompt, trace.items, trace.tokens))
    # Of the prompt before, where a response takes several turns.
    trace.cached_tokens = None
    runtime = runtime_of(renderer)
    note_preprocessing(trace, runtime.recorder, seconds)
    note_media(runtime, context, [s.mm_hash for found in spans.values() for s in found])


def note_media(runtime: Runtime, context: RequestContext, hashes: Sequence[str]) -> None:
    """Note which mm items were made of the files of a conversation, for takedowns and the page.

    Args:
        runtime: Of the renderer.
        context: Of the conversation.
        hashes: vLLM's hashes of its items; empty ones where vLLM made none.
    """
    if runtime.seen is not None:
        # What was named by its uuid alone was made of a file of another request.
        known = [one for one in hashes if one and one not in context.trace.named]
        runtime.seen.note_all(context.items, context.trace.images, known)


def _heard_in_videos(renderer: Any, videos: Sequence[Span], prompt: Sequence[int]) -> int:
    """Number of embeddings of sound inside video items; only some models have sound there."""
    if not videos:
        return 0
    token = runtime_of(renderer).frontend.traits.sound_token
    if token is None:
        return 0
    return sum(list(prompt[span.start : span.end]).count(token) for span in videos)


def looked_up(
    is_cached: Mapping[str, Sequence[bool]],
    hashes: Mapping[str, Sequence[str]],
    named: Collection[str],
) -> None:
    """Record for each item of the request, by modality, whether the processor cache held it.

    Args:
        is_cached: Whether it did.
        hashes: vLLM's hashes of the items.
        named: The hashes of items that the request names by their `uuid` alone.
    """
    if context := current_request():
        context.trace.add_hashes(set[str]().union(*hashes.values()), named)
        context.trace.preprocessed = {m: list(hits) for m, hits in is_cached.items()}
