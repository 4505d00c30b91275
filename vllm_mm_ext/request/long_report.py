"""What an answer about long videos reports: its windows, their notes, what they cost."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from vllm_mm_ext.long_video.asking import Cost, Window
from vllm_mm_ext.long_video.looking import Progress, SeenWindow
from vllm_mm_ext.long_video.notes import times_in
from vllm_mm_ext.long_video.running import Outcome

_DATA = "data: "


@dataclass(eq=False)
class LongVideoReport:
    """Filled while a request about long videos is answered.

    Attributes:
        strategy: How the question is answered, as far as it is known before the windows are seen.
        shows_cache_hits: As in ``RequestTrace``. Kept notes and cached tokens are cache hits.
        outcome: What the windows gave; None with the strategy ``single``.
        answer: The text of each choice of the answer, in pieces.
    """

    strategy: str
    shows_cache_hits: bool
    outcome: Outcome | None = None
    answer: dict[int, list[str]] = field(default_factory=lambda: defaultdict(list))

    @property
    def cost(self) -> Cost:
        """What the prompts besides the answer took, as the client may see it.

        A client that may not see cache hits sees what a kept note took when it was made.
        """
        if self.outcome is None:
            return Cost()
        kept = () if self.shows_cache_hits else (seen.kept_cost for seen in self.outcome.windows)
        return sum(kept, self.outcome.cost)

    def block(self) -> dict[str, Any]:
        """The part ``long_video`` of the `mm_ext` block; docs/options.md describes the keys."""
        if self.outcome is None:
            return {"strategy": self.strategy}
        outcome = self.outcome
        return {
            "strategy": outcome.strategy,
            "windows": [self._window(seen) for seen in outcome.windows],
            "failed": [_place(seen.window) for seen in outcome.windows if seen.failed],
            "left_out": [_place(window) for window in outcome.left_out],
            "thinned": outcome.is_thinned,
            "cited": times_in("\n".join(map("".join, self.answer.values()))),
            "cost": self._cost(self.cost),
        }

    def progress(self, progress: Progress) -> dict[str, Any]:
        """The part ``progress`` of the `mm_ext` block of a chunk that comes before the answer."""
        seen = progress.seen
        told = {"done": progress.done, "total": progress.total, **_place(seen.window)}
        return told | _known(seen)

    def hear(self, chunk: str) -> None:
        """Note the text of the answer in a chunk of a stream.

        Args:
            chunk: A server-sent event of a chat completion.
        """
        if '"content":' not in chunk or not chunk.startswith(_DATA):
            return
        for choice in json.loads(chunk[len(_DATA) :]).get("choices", ()):
            self.answer[choice["index"]].append(choice["delta"].get("content") or "")

    def hear_all(self, texts: Iterable[str | None]) -> None:
        """Note the texts of an answer that is not streamed."""
        self.answer |= {number: [text or ""] for number, text in enumerate(texts)}

    def _window(self, seen: SeenWindow) -> dict[str, Any]:
        kept = {"kept": seen.is_kept} if self.shows_cache_hits else {}
        cost = seen.cost if self.shows_cache_hits else seen.cost + seen.kept_cost
        return {**_place(seen.window), **_known(seen), **kept, "cost": self._cost(cost)}

    def _cost(self, cost: Cost) -> dict[str, Any]:
        told: dict[str, Any] = {
            "prompt_tokens": cost.prompt_tokens,
            "completion_tokens": cost.completion_tokens,
        }
        if self.shows_cache_hits:
            told |= {"cached_tokens": cost.cached_tokens, "seconds": round(cost.seconds, 3)}
        return told


def _place(window: Window) -> dict[str, Any]:
    return {
        "video": window.video,
        "window": window.number,
        "start": round(window.start, 3),
        "end": round(window.end, 3),
    }


def _known(seen: SeenWindow) -> dict[str, Any]:
    """What is known of a window; keys that say nothing are left out."""
    known: dict[str, Any] = {"note": seen.note} if seen.note else {}
    if seen.relevance is not None:
        known["relevance"] = round(seen.relevance, 4)
    if seen.is_close:
        known["close"] = True
    if seen.failed:
        known["failed"] = seen.failed
    return known
