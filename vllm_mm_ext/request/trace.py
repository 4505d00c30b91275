"""What was done for one HTTP request: stage times, its media, its prompt, and cache hits.

Each request has a ``RequestTrace`` in its context. Planning, the media connector, preprocessing and
the engine client add to the trace; the answer's headers and its `mm_ext` block are made from it.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Any, NamedTuple

from vllm_mm_ext.base.apportion import apportion
from vllm_mm_ext.request.long_report import LongVideoReport
from vllm_mm_ext.request.media_items import AudioReport, ImageItem, MediaItem, VideoReport
from vllm_mm_ext.request.stage_times import StageTime

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
        embeddings: How many of those tokens are embeddings; the others are text, or another item's.
        mm_hash: vLLM's hash of the item.
    """

    modality: str
    start: int
    end: int
    preprocessed: bool
    embeddings: int
    mm_hash: str = ""


class Prompt(NamedTuple):
    """One prompt of a request, as it was rendered.

    Attributes:
        token_ids: The very sequence that goes to the engine.
        items, tokens: As of the request's trace.
    """

    token_ids: Sequence[int]
    items: list[PromptItem]
    tokens: dict[str, int]


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
        asked: The request has a block of more than a key for routers, so that its answer gets one
            even without media.
        items: The mm items of the prompt; empty until the prompt is built. Here and in ``tokens``
            the last of several conversations counts.
        prompts: Those of all its conversations.
        preprocessed: Per modality, whether the processor cache held each item.
        cached_tokens: Number of leading tokens of the last prompt that the prefix cache held; None
            until the engine reports it.
        shows_cache_hits: The operator lets clients see cache hits. Caches serve all clients, so a
            hit can tell a client that another client sent the same media.
        long_video: Of a request about long videos: its windows and their notes.
        timeline: When each stage of each item and of the request was. Stages in the engine are
            there once the request's first output is.
        refused: Why the plugin refused the request: the code of a ``MediaError``; empty otherwise.
        request_id: vLLM's id of the request; empty until the request goes to the engine.
        images: The images of the request, in the order in which they were read.
        watched: The operator's page tells of the request.
        held: Digests by URL of the videos that the request uses besides those of ``media``; empty
            until they are known.
        hashes: vLLM's hashes of the mm items of all conversations of the request, from before their
            model inputs are made. Traces of prompts that the plugin makes for the request share it.
        named: As ``hashes``, of those items that the request names by their `uuid` alone: which
            files they were made of, only earlier requests tell. They are not among ``hashes``.
        tasks: Those that serve the request in place of the task that took it; of a request that is
            ``watched``.
    """

    stages: dict[str, float] = field(default_factory=dict)
    work: dict[str, float] = field(default_factory=dict)
    media: list[MediaItem] = field(default_factory=list)
    tokens: dict[str, int] = field(default_factory=dict)
    asked: bool = False
    items: list[PromptItem] = field(default_factory=list)
    prompts: list[Prompt] = field(default_factory=list)
    preprocessed: dict[str, list[bool]] = field(default_factory=dict)
    cached_tokens: int | None = None
    shows_cache_hits: bool = False
    long_video: LongVideoReport | None = None
    timeline: list[StageTime] = field(default_factory=list)
    refused: str = ""
    request_id: str = ""
    images: list[ImageItem] = field(default_factory=list)
    watched: bool = False
    held: dict[str, str] = field(default_factory=dict)
    hashes: set[str] = field(default_factory=set)
    named: set[str] = field(default_factory=set)
    tasks: set[asyncio.Task[Any]] = field(default_factory=set)

    def note_task(self, task: asyncio.Task[Any] | None = None) -> None:
        """Note that a task serves the request, if the request is watched.

        Args:
            task: The task; the current one if None.
        """
        task = (task or asyncio.current_task()) if self.watched else None
        if task is not None:
            self.tasks.add(task)
            # A task leads to its request's trace.
            task.add_done_callback(self.tasks.discard)

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

    def add_hashes(self, hashes: Collection[str], named: Collection[str]) -> None:
        """Note the mm items of a conversation, before their model inputs are made.

        Args:
            hashes: vLLM's hashes of all of them.
            named: The hashes of those that came without their content.
        """
        # Another part of the request may bring the content.
        self.hashes.update({*hashes}.difference(named))
        self.named.update(named)
        self.named -= self.hashes

    def set_tokens(self, embeddings: Mapping[str, int], prompt_tokens: int) -> None:
        """Record the prompt's number of embeddings per modality; all other tokens are text."""
        self.tokens = {**embeddings, "text": max(0, prompt_tokens - sum(embeddings.values()))}

    def set_items(
        self,
        ranges: Mapping[str, Sequence[tuple[int, int, int]]],
        hashes: Mapping[str, Sequence[str]] = MappingProxyType({}),
    ) -> None:
        """Record the prompt's mm items.

        Args:
            ranges: Placeholder ranges and numbers of embeddings ``(start, end, embeddings)`` per
                modality, in the order of the prompt.
            hashes: vLLM's hashes of the items, in the same order.
        """
        self.items = []
        for modality, spans in ranges.items():
            hits, known = self.preprocessed.get(modality, []), hashes.get(modality, ())
            for index, (start, end, embeddings) in enumerate(spans):
                hit = index < len(hits) and hits[index]
                mm_hash = known[index] if index < len(known) else ""
                self.items.append(PromptItem(modality, start, end, hit, embeddings, mm_hash))
                if mm_hash and mm_hash not in self.named:
                    self.hashes.add(mm_hash)

    def of_prompt(self, token_ids: Sequence[int] | None, request_id: str) -> RequestTrace:
        """This trace as it tells of one of the request's prompts; lists and sets are shared.

        Args:
            token_ids: Of the prompt, as it goes to the engine.
            request_id: vLLM's id of it.
        """
        own = next((one for one in self.prompts if one.token_ids is token_ids), None)
        if own is None:
            return replace(self, request_id=request_id)
        return replace(self, request_id=request_id, items=own.items, tokens=own.tokens)

    def cached_by_modality(self) -> dict[str, int]:
        """How many of ``tokens`` the prefix cache held, as far as ``cached_tokens`` is known.

        The prefix may end within an item, and sound may lie within the items of a video: there the
        cached tokens are shared out evenly, so a number may be off by a few. Together they are
        exactly the cached tokens.
        """
        # vLLM has -1 for requests that no step has looked at.
        cached = max(0, self.cached_tokens or 0)
        owned: dict[str, int] = {}
        held: dict[str, float] = {}
        for item in self.items:
            share = min(max((cached - item.start) / max(1, item.end - item.start), 0.0), 1.0)
            owned[item.modality] = owned.get(item.modality, 0) + item.embeddings
            held[item.modality] = held.get(item.modality, 0.0) + share * item.embeddings
        quotas: dict[str, float] = {}
        for modality, count in self.tokens.items():
            if modality == "text":
                continue
            own = owned.get(modality, 0)
            quotas[modality] = held[modality] * min(count, own) / own if own else 0.0
            # Sound beyond that of audio items is within videos, and cached as far as these are.
            if count > own and owned.get("video"):
                quotas[modality] += held["video"] * (count - own) / owned["video"]
        quotas["text"] = cached - sum(quotas.values())
        return apportion(cached, quotas, self.tokens)

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
