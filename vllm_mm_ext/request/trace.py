"""What was done for one HTTP request: plans, stage times, frames used, token counts, cache hits.

The serving middleware opens a ``RequestTrace`` per request in a context variable; planning, the
media connector, preprocessing and the engine client add to it. Outside a request there is none,
and adding is a no-op.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

from vllm_mm_ext.config.options import NO_REDUCTION, Reduction

# Many clients and proxies refuse headers past 8 KiB: at most this many frame times and items are
# listed for one request, which keeps the value under 4 KiB.
MAX_LISTED_FRAMES = 256
MAX_LISTED_ITEMS = 16

_current: ContextVar[RequestTrace | None] = ContextVar("mm_ext_trace", default=None)


@dataclass
class VideoTrace:
    """One video of a request as delivered.

    Attributes:
        policy: How its frames were chosen.
        frames: How many were delivered.
        height, width: Their size in pixels.
        times: Their presentation times in seconds.
        cached: Nothing was decoded for this request.
        audio_s: Seconds of sound delivered along; None without sound.
        url: As the request named it.
        duration_s: Duration of the source in seconds.
        reduction: How its tokens are made fewer.
    """

    policy: str
    frames: int
    height: int
    width: int
    times: Sequence[float]
    cached: bool
    audio_s: float | None
    url: str = ""
    duration_s: float | None = None
    reduction: Reduction = NO_REDUCTION


@dataclass(frozen=True)
class PlanTrace:
    """What was decided about a video before it was decoded.

    Attributes:
        level: Load level it is served at; 0 is full quality.
        lowered: What it does not get of what was asked: ``what``, ``wanted``, ``given``, ``why``.
    """

    level: int
    lowered: tuple[Mapping[str, str], ...]


@dataclass(frozen=True)
class ItemTrace:
    """One mm item (a segment, an image, an audio) in the prompt.

    Attributes:
        modality: vLLM's name for what it is.
        start, end: Range of its placeholder in the prompt, in tokens.
        preprocessed: Its model inputs came from the processor cache.
    """

    modality: str
    start: int
    end: int
    preprocessed: bool


@dataclass
class RequestTrace:
    """Collected while one request is rendered.

    Attributes:
        stages: Stage name to seconds of wall-clock time. Items of one request run in parallel,
            so a stage holds the longest of its items.
        videos, audios: One entry per media item that passed through the front-end.
        tokens: Embeddings per modality plus ``text``, once the prompt is built.
        asked: The request carries options, so it is reported on even without media.
        order: URLs of the request's planned videos, as they follow each other in the messages.
        plans: What was decided about each of those.
        items: The mm items of the prompt, once it is built.
        preprocessed: Per modality, which items the processor cache held.
        cached_tokens: Leading prompt tokens the prefix cache held; None until the engine says so.
    """

    stages: dict[str, float] = field(default_factory=dict)
    videos: list[VideoTrace] = field(default_factory=list)
    audios: list[dict[str, Any]] = field(default_factory=list)
    tokens: dict[str, int] = field(default_factory=dict)
    asked: bool = False
    order: list[str] = field(default_factory=list)
    plans: dict[str, PlanTrace] = field(default_factory=dict)
    items: list[ItemTrace] = field(default_factory=list)
    preprocessed: dict[str, list[bool]] = field(default_factory=dict)
    cached_tokens: int | None = None

    def add_stages(self, stages: Mapping[str, float]) -> None:
        """Record stage times in seconds; parallel items keep the longest."""
        for name, seconds in stages.items():
            self.stages[name] = max(seconds, self.stages.get(name, 0.0))

    def set_tokens(self, embeddings: Mapping[str, int], prompt_tokens: int) -> None:
        """Record embeddings per modality; whatever is not media is text."""
        self.tokens = {**embeddings, "text": prompt_tokens - sum(embeddings.values())}

    def set_items(self, ranges: Mapping[str, Sequence[tuple[int, int]]]) -> None:
        """Record where the mm items of each modality are in the prompt, in their order."""
        self.items = []
        for modality, spans in ranges.items():
            hits = self.preprocessed.get(modality, [])
            for index, (start, end) in enumerate(spans):
                hit = index < len(hits) and hits[index]
                self.items.append(ItemTrace(modality, start, end, hit))

    def videos_in_order(self) -> list[VideoTrace]:
        """The videos in the order of the messages; they finish decoding in any order."""
        place = {url: index for index, url in reversed(list(enumerate(self.order)))}
        return sorted(self.videos, key=lambda video: place.get(video.url, len(place)))

    def server_timing(self) -> str:
        """Value of the standard ``Server-Timing`` header (milliseconds, W3C Server Timing)."""
        return ", ".join(f"mm_{k};dur={v * 1e3:.2f}" for k, v in self.stages.items())

    def summary(self) -> str:
        """Compact JSON for the ``X-MM-Ext`` header: the first items, and times if not too many."""
        listed = self.videos_in_order()[:MAX_LISTED_ITEMS]
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
    resume_trace(trace)
    return trace


def resume_trace(trace: RequestTrace) -> None:
    """Make ``trace`` the current one in a context that did not inherit it."""
    _current.set(trace)
