"""What was done for one HTTP request: stage times, its media, its prompt, and cache hits.

Each request has a ``RequestTrace`` in its context. Planning, the media connector, preprocessing and
the engine client add to the trace; the answer's headers and its `mm_ext` block are made from it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from vllm_mm_ext.request.long_report import LongVideoReport
from vllm_mm_ext.request.media_items import AudioReport, MediaItem, VideoReport

# Many clients and proxies refuse headers of more than 8 KiB. With at most this many frame times and
# items listed, the header's value stays under 4 KiB.
MAX_LISTED_FRAMES = 256
MAX_LISTED_ITEMS = 16


@dataclass(frozen=True)
class PromptItem:
    """One mm item (a segment, an image, an audio) in the prompt.

    Attributes:
        modality: vLLM's name of the item's modality.
        start, end: The item's placeholder range: first token in the prompt, and the one after its
            last.
        preprocessed: The item's model inputs came from vLLM's processor cache.
    """

    modality: str
    start: int
    end: int
    preprocessed: bool


@dataclass(eq=False)
class RequestTrace:
    """What is recorded about one request while it is served.

    Attributes:
        stages: Stage name to seconds of wall-clock time, for the stages that every item goes
            through. Items of a request are processed in parallel, so a stage has the time of its
            slowest item.
        work: The same for the stages that only items go through which no cache holds.
        media: The videos and audios of the request's conversations, in the order of the messages.
        tokens: Number of embeddings per modality, and of other tokens as ``text``; empty until the
            prompt is built.
        asked: The request has options, so that its answer gets a block even without media.
        items: The mm items of the prompt; empty until the prompt is built.
        preprocessed: Per modality, whether the processor cache held each item.
        cached_tokens: Number of leading prompt tokens that the prefix cache held; None until the
            engine reports it.
        shows_cache_hits: The operator lets clients see cache hits. Caches serve all clients, so a
            hit can tell a client that another client sent the same media.
        long_video: Of a request about long videos: its windows and their notes.
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
    long_video: LongVideoReport | None = None

    def add_stages(self, stages: Mapping[str, float]) -> None:
        """Record seconds per stage, of stages that every item goes through."""
        _keep_longest(self.stages, stages)

    def add_work(self, stages: Mapping[str, float]) -> None:
        """Record seconds per stage, of stages that only items go through which no cache holds."""
        _keep_longest(self.work, stages)

    @property
    def shown_stages(self) -> dict[str, float]:
        """Seconds per stage that the client may see."""
        shown = dict(self.work) if self.shows_cache_hits else {}
        _keep_longest(shown, self.stages)
        return shown

    def set_tokens(self, embeddings: Mapping[str, int], prompt_tokens: int) -> None:
        """Record the prompt's number of embeddings per modality; all other tokens are text."""
        self.tokens = {**embeddings, "text": prompt_tokens - sum(embeddings.values())}

    def set_items(self, ranges: Mapping[str, Sequence[tuple[int, int]]]) -> None:
        """Record the prompt's mm items.

        Args:
            ranges: Placeholder ranges ``(start, end)`` per modality, in the order of the prompt.
        """
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
        """Value of the ``Server-Timing`` header, in milliseconds (W3C Server Timing)."""
        return ", ".join(f"mm_{k};dur={v * 1e3:.2f}" for k, v in self.shown_stages.items())

    def summary(self) -> str:
        """Value of the ``X-MM-Ext`` header: JSON of the first items, with few frames also times."""
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
