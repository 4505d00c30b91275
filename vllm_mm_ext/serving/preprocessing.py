"""Adds the preprocessing step (media to model inputs) to the request's trace."""

from __future__ import annotations

import time
from collections.abc import Mapping

from vllm_mm_ext.trace import current_trace


def started() -> float:
    """Clock reading at the start of preprocessing."""
    return time.perf_counter()


def finished(start: float, embeddings: Mapping[str, int], prompt_tokens: int) -> None:
    """Record how long preprocessing took and what it made.

    Args:
        start: What ``started`` returned.
        embeddings: Encoder embeddings per modality (audio inside video counts as audio).
        prompt_tokens: Length of the whole prompt in tokens.
    """
    if trace := current_trace():
        trace.add_stages({"preprocess": time.perf_counter() - start})
        trace.set_tokens(embeddings, prompt_tokens)
