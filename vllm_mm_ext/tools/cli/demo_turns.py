"""One question of the demo, its answer and what it took."""

from __future__ import annotations

import json
import re
import time
from dataclasses import dataclass, field
from typing import Any

from rich import box
from rich.table import Table

MAX_TOKENS = 24


@dataclass
class Turn:
    """One question, its answer, and what the response headers and usage said about it."""

    question: str
    answer: str = ""
    ttft_s: float = 0.0
    applied: dict[str, Any] = field(default_factory=dict)
    stages_ms: dict[str, float] = field(default_factory=dict)
    prompt_tokens: int = 0
    cached_tokens: int = 0


def ask(client: Any, model: str, messages: list[dict[str, Any]], question: str) -> Turn:
    """Stream one answer and collect its measurements.

    Args:
        client: ``openai.OpenAI``.
        model: Served model name.
        messages: Conversation so far, the question's message included.
        question: For the report.
    """
    turn = Turn(question)
    started = time.perf_counter()
    response = client.chat.completions.with_raw_response.create(
        model=model,
        messages=messages,
        max_tokens=MAX_TOKENS,
        temperature=0,
        stream=True,
        stream_options={"include_usage": True},
    )
    turn.applied = json.loads(response.headers.get("x-mm-ext", "{}"))
    turn.stages_ms = {
        name: float(duration)
        for name, duration in re.findall(
            r"mm_(\w+);dur=([\d.]+)", response.headers.get("server-timing", "")
        )
    }
    for chunk in response.parse():
        if chunk.choices and chunk.choices[0].delta.content:
            turn.ttft_s = turn.ttft_s or time.perf_counter() - started
            turn.answer += chunk.choices[0].delta.content
        if chunk.usage:
            turn.prompt_tokens = chunk.usage.prompt_tokens
            details = chunk.usage.prompt_tokens_details
            turn.cached_tokens = (details.cached_tokens or 0) if details else 0
    # A model may answer with tokens that decode to nothing; the whole answer is then the first.
    turn.ttft_s = turn.ttft_s or time.perf_counter() - started
    return turn


def report(turns: list[Turn]) -> Table:
    """The table a reader of the demo wants: one row per turn."""
    # Plain and narrow: it has to fit 80 columns.
    table = Table(
        title="What each turn took (times in ms)",
        box=box.SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
        show_edge=False,
    )
    for column in ("turn", "frames", "from", "visual", "audio", "text", "cached"):
        table.add_column(column, justify="right")
    for column in ("media", "prep", "TTFT"):
        table.add_column(column, justify="right")
    for number, turn in enumerate(turns, 1):
        tokens = turn.applied.get("tokens", {})
        videos = turn.applied.get("videos", [])
        frames = ", ".join(str(video["frames"]) for video in videos)
        # Servers say it only where their configuration lets them.
        hits = [video.get("cached") for video in videos]
        source = "-" if None in hits else "cache" if all(hits) else "new"
        media_ms = max(turn.stages_ms.get(stage, 0.0) for stage in ("video", "audio"))
        table.add_row(
            str(number),
            frames or "-",
            source,
            str(tokens.get("video", 0) + tokens.get("image", 0)),
            str(tokens.get("audio", 0)),
            str(tokens.get("text", turn.prompt_tokens)),
            f"{turn.cached_tokens}/{turn.prompt_tokens}",
            f"{media_ms:.1f}",
            f"{turn.stages_ms.get('preprocess', 0.0):.1f}",
            f"{turn.ttft_s * 1e3:.0f}",
        )
    return table
