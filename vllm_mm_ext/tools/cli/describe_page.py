"""The page of ``vllm-mm describe``: HTML with inline SVG and images, nothing from outside."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby
from typing import Any

from vllm_mm_ext.tools.cli.description import Description, NotedWindow, hms, times_in
from vllm_mm_ext.tools.cli.page import axis, environment, percent

# Pictures of the strip above the timeline: what a wide screen has room for.
_STRIP = 12
# Height of the bar of a window without any relevance, of 100.
_LEAST_HEIGHT = 8
# Characters from which on an answer is set as running text.
_LONG_ANSWER = 200


def render(description: Description, pictures: Mapping[int, str]) -> str:
    """The page as one HTML document.

    Args:
        description: What the server said.
        pictures: Data URIs by the number of the window that they show; windows may lack one.
    """
    duration = max(description.duration, 1e-3)
    cited = {math.floor(time) for time in description.cited}
    windows = [_window(window, pictures, cited) for window in description.windows]
    return (
        environment()
        .get_template("describe.html.j2")
        .render(
            name=description.name,
            facts=_facts(description),
            question=description.question,
            answer=list(_linked(description.answer, description.windows)),
            answer_shown=bool(description.question or description.answer),
            long=len(description.answer) > _LONG_ANSWER,
            axis=axis(duration, hms),
            bars=[_bar(window, duration) for window in description.windows],
            marks=[percent(time, duration) for time in description.cited if time < duration],
            strip=_strip(windows),
            ranked=any(window.relevance is not None for window in description.windows),
            # Windows without a note of a search: many, and nothing is to be said about them.
            runs=[(noted, list(run)) for noted, run in groupby(windows, _has_words)],
            evidence=[window for window in windows if window["evidence"]],
            problems=any(window.problem for window in description.windows),
        )
    )


def _facts(description: Description) -> list[tuple[str, str]]:
    facts = [("Model", description.model)]
    if description.strategy is not None:
        facts.append(("Strategy", description.strategy.replace("_", " ")))
    if description.windows:
        noted = sum(window.note is not None for window in description.windows)
        facts.insert(0, ("Length", hms(description.duration)))
        facts.append(("Windows", f"{len(description.windows)}, {noted} with notes"))
    cost = description.cost
    if "prompt_tokens" in cost:
        # Not all servers tell what caches held.
        cached = f", {cost['cached_tokens']:,} cached" if "cached_tokens" in cost else ""
        facts.append(("Prompt tokens", f"{cost['prompt_tokens']:,}{cached}"))
    return facts


def _window(window: NotedWindow, pictures: Mapping[int, str], cited: set[int]) -> dict[str, Any]:
    return {
        "id": f"w{window.number}",
        "start": hms(window.start),
        "end": hms(window.end),
        "picture": pictures.get(window.number),
        "relevance": window.relevance,
        "problem": window.problem,
        "evidence": window.evidence,
        "entries": [
            {
                "time": None if entry.second is None else hms(entry.second),
                "text": entry.text,
                "cited": window.evidence and entry.second in cited,
            }
            for entry in window.entries
        ],
    }


def _has_words(window: Mapping[str, Any]) -> bool:
    return bool(window["entries"] or window["problem"])


def _bar(window: NotedWindow, duration: float) -> dict[str, Any]:
    """A window in a box of 1000 x 100: as high as it is relevant, if the server said so."""
    height = 100
    if window.relevance is not None:
        height = round(_LEAST_HEIGHT + (100 - _LEAST_HEIGHT) * window.relevance)
    left, right = (1000 * time / duration for time in (window.start, window.end))
    return {
        "id": f"w{window.number}",
        "title": f"{hms(window.start)} - {hms(window.end)}",
        "left": f"{left:.1f}",
        "width": f"{right - left:.1f}",
        "top": 100 - height,
        "height": height,
        "kind": "problem" if window.problem else "evidence" if window.evidence else "plain",
    }


def _strip(windows: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Windows with a picture, evenly over the video."""
    shown = [window for window in windows if window["picture"]]
    count = min(_STRIP, len(shown))
    return [shown[(2 * index + 1) * len(shown) // (2 * count)] for index in range(count)]


def _linked(text: str, windows: Sequence[NotedWindow]) -> Iterator[tuple[str, str | None]]:
    """Pieces of the answer, each with the id of the window that it names the time of, or None."""
    done = 0
    for start, end, second in times_in(text):
        inside = [w for w in windows if w.start <= second < w.end]
        found = next((w for w in inside if w.evidence), inside[0] if inside else None)
        if found is not None:
            yield text[done:start], None
            yield text[start:end], f"w{found.number}"
            done = end
    yield text[done:], None
