"""What was done for one HTTP request: stage times, its media, its prompt, what caches held of it.

Each request has a ``RequestTrace`` in its context; planning, the media connector, preprocessing and
the engine client add to it, and the answer's headers and its `mm_ext` block are made of it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from vllm_mm_ext.request.media_items import AudioReport, MediaItem, VideoReport

# Many clients and proxies refuse headers past 8 KiB: at most this many frame times and items are
# listed for one request, which keeps the value under 4 KiB.
MAX_LISTED_FRAMES = 256
MAX_LISTED_ITEMS = 16


@dataclass(frozen=True)
class PromptItem:
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


@dataclass(eq=False)
class RequestTrace:
    """Collected while one request is rendered.

    Attributes:
        stages: Stage name to seconds of wall-clock time, of the stages that every item goes
            through. Items of one request run in parallel, so a stage holds the longest of its
            items.
        work: The same for the stages of items that no cache held.
        media: The videos and audios of the request's conversations, in the order of the messages.
        tokens: Embeddings per modality plus ``text``, once the prompt is built.
        asked: The request carries options, so it is reported on even without media.
        items: The mm items of the prompt, once it is built.
        preprocessed: Per modality, which items the processor cache held.
        cached_tokens: Leading prompt tokens the prefix cache held; None until the engine says so.
        shows_cache_hits: The operator lets clients see what caches held. Caches serve all clients:
            a hit can tell a client that another one sent the same media.
    """

    stages: dict[str, float] = field(default_factory=dict)
    work: dict[str, float] = field(default_factory=dict)
    media: list[MediaItem] = field(default_factory=list)
    tokens: dict[str, int] = field(default_factory=dict)
    asked: bool = False
    items: list[PromptItem] = field(default_factory=list)
    preprocessed: dict[str, list[bool]] = field(default_factory=dict)
    cached_tokens: int | None = None
    shows_cache_hits: bool = False

    def add_stages(self, stages: Mapping[str, float]) -> None:
        """Record times in seconds of stages that every item goes through."""
        _keep_longest(self.stages, stages)

    def add_work(self, stages: Mapping[str, float]) -> None:
        """Record times in seconds of stages that only an item goes through which no cache held."""
        _keep_longest(self.work, stages)

    @property
    def shown_stages(self) -> dict[str, float]:
        """The stage times that the client gets to see, in seconds."""
        shown = dict(self.work) if self.shows_cache_hits else {}
        _keep_longest(shown, self.stages)
        return shown

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
                self.items.append(PromptItem(modality, start, end, hit))

    @property
    def videos(self) -> list[tuple[MediaItem, VideoReport]]:
        """The videos delivered so far, each with its report, in the order of the messages."""
        reports = ((item, item.report) for item in self.media)
        return [(item, report) for item, report in reports if isinstance(report, VideoReport)]

    @property
    def audios(self) -> list[AudioReport]:
        """The audio items delivered so far, in the order of the messages."""
        return [item.report for item in self.media if isinstance(item.report, AudioReport)]

    def server_timing(self) -> str:
        """Value of the standard ``Server-Timing`` header (milliseconds, W3C Server Timing)."""
        return ", ".join(f"mm_{k};dur={v * 1e3:.2f}" for k, v in self.shown_stages.items())

    def summary(self) -> str:
        """Compact JSON for the ``X-MM-Ext`` header: the first items, and times if not too many."""
        listed = [report for _, report in self.videos[:MAX_LISTED_ITEMS]]
        with_times = sum(v.frames for v in listed) <= MAX_LISTED_FRAMES
        videos = [
            {
                "policy": v.policy,
                "frames": v.frames,
                "size": [v.height, v.width],
                "audio_s": None if v.audio_s is None else round(v.audio_s, 2),
                **({"times": [round(float(t), 2) for t in v.times]} if with_times else {}),
                **self._hit(v.cached),
            }
            for v in listed
        ]
        audios = [
            {"seconds": round(audio.seconds, 2), **self._hit(audio.cached)}
            for audio in self.audios[:MAX_LISTED_ITEMS]
        ]
        payload = {"videos": videos, "audios": audios, "tokens": self.tokens}
        return json.dumps(payload, separators=(",", ":"))

    def _hit(self, cached: bool) -> dict[str, bool]:
        return {"cached": cached} if self.shows_cache_hits else {}


def _keep_longest(times: dict[str, float], more: Mapping[str, float]) -> None:
    for name, seconds in more.items():
        times[name] = max(seconds, times.get(name, 0.0))
