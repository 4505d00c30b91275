"""What the front-end did for one HTTP request: stage times, frames used, token counts.

The serving middleware opens a ``RequestTrace`` per request in a context variable; the media
connector and the preprocessing hook add to it. Outside a request there is none, and adding is
a no-op.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

# Many clients and proxies refuse headers past 8 KiB: at most this many frame times and items are
# listed for one request, which keeps the value under 4 KiB.
MAX_LISTED_FRAMES = 256
MAX_LISTED_ITEMS = 16

_current: ContextVar[RequestTrace | None] = ContextVar("mm_ext_trace", default=None)


@dataclass
class VideoTrace:
    """One video of a request: frames used, their size in pixels, and where they came from."""

    policy: str
    frames: int
    height: int
    width: int
    times: Sequence[float]
    cached: bool
    audio_s: float | None


@dataclass
class RequestTrace:
    """Collected while one request is rendered.

    Attributes:
        stages: Stage name to seconds of wall-clock time. Items of one request run in parallel,
            so a stage holds the longest of its items.
        videos, audios: One entry per media item that passed through the front-end.
        tokens: Embeddings per modality plus ``text``, once the prompt is built.
    """

    stages: dict[str, float] = field(default_factory=dict)
    videos: list[VideoTrace] = field(default_factory=list)
    audios: list[dict[str, Any]] = field(default_factory=list)
    tokens: dict[str, int] = field(default_factory=dict)

    def add_stages(self, stages: Mapping[str, float]) -> None:
        """Record stage times in seconds; parallel items keep the longest."""
        for name, seconds in stages.items():
            self.stages[name] = max(seconds, self.stages.get(name, 0.0))

    def set_tokens(self, embeddings: Mapping[str, int], prompt_tokens: int) -> None:
        """Record embeddings per modality; whatever is not media is text."""
        self.tokens = {**embeddings, "text": prompt_tokens - sum(embeddings.values())}

    def server_timing(self) -> str:
        """Value of the standard ``Server-Timing`` header (milliseconds, W3C Server Timing)."""
        return ", ".join(f"mm_{k};dur={v * 1e3:.2f}" for k, v in self.stages.items())

    def summary(self) -> str:
        """Compact JSON for the ``X-MM-Ext`` header: the first items, and times if not too many."""
        listed = self.videos[:MAX_LISTED_ITEMS]
        with_times = sum(v.frames for v in listed) <= MAX_LISTED_FRAMES
        videos = [
            {
                "policy": v.policy,
                "frames": v.frames,
                "size": [v.height, v.width],
                "cached": v.cached,
                "audio_s": None if v.audio_s is None else round(v.audio_s, 2),
                **({"times": [round(float(t), 2) for t in v.times]} if with_times else {}),
            }
            for v in listed
        ]
        audios = self.audios[:MAX_LISTED_ITEMS]
        payload = {"videos": videos, "audios": audios, "tokens": self.tokens}
        return json.dumps(payload, separators=(",", ":"))


def current_trace() -> RequestTrace | None:
    """The trace of the request being rendered, or None outside one."""
    return _current.get()


def open_trace() -> RequestTrace:
    """Start a trace in the current context and return it."""
    trace = RequestTrace()
    _current.set(trace)
    return trace
