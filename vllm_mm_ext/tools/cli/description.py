"""What a server said about a long video: windows, their notes, an answer and the times it cites."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

# As notes and answers give a time: hours, minutes and seconds, in square brackets in a note.
_TIME = re.compile(r"\b(\d{1,3}):([0-5]\d):([0-5]\d)\b")
_MARK = re.compile(rf"\[{_TIME.pattern}\]\s*")


@dataclass(frozen=True)
class Entry:
    """One thing that a note tells: when it begins in seconds (None where the note does not say)."""

    second: int | None
    text: str


@dataclass(frozen=True)
class NotedWindow:
    """One window of the video as the server reported it.

    Attributes:
        number: Its number, from 0.
        start, end: Seconds.
        note: What the model noted; None where it was not asked to, or failed.
        relevance: `search`: how likely the window matters to the question, 0 to 1; else None.
        problem: Why there is no note, where there should be one.
        evidence: The answer rests on this window.
    """

    number: int
    start: float
    end: float
    note: str | None = None
    relevance: float | None = None
    problem: str | None = None
    evidence: bool = False

    @property
    def entries(self) -> tuple[Entry, ...]:
        """The note, cut where a time in brackets begins a new entry."""
        return tuple(_entries(self.note or ""))


@dataclass(frozen=True)
class Description:
    """All that one request brought.

    Attributes:
        name: What the video is called: its file name, or its URL.
        model: Name of the model that answered.
        question: What was asked; None where a description was asked for.
        answer: What the model answered.
        strategy: How the windows were read; None where the server did not say.
        windows: In order of time.
        cited: Times in seconds that the answer names or rests on, in order.
        cost: What the windows took together, as the server reports it.
        usage: The answer's usage, as the server reports it.
    """

    name: str
    model: str
    question: str | None
    answer: str
    strategy: str | None = None
    windows: tuple[NotedWindow, ...] = ()
    cited: tuple[float, ...] = ()
    cost: Mapping[str, Any] = field(default_factory=dict)
    usage: Mapping[str, Any] = field(default_factory=dict)

    @property
    def duration(self) -> float:
        """Seconds up to the end of the last window."""
        return max((window.end for window in self.windows), default=0.0)

    @property
    def evidence(self) -> tuple[NotedWindow, ...]:
        """The windows on which the answer rests."""
        return tuple(window for window in self.windows if window.evidence)


def hms(seconds: float) -> str:
    """``h:mm:ss``, rounded down, as the model is told times."""
    minutes, second = divmod(math.floor(seconds), 60)
    hours, minute = divmod(minutes, 60)
    return f"{hours}:{minute:02d}:{second:02d}"


def times_in(text: str) -> list[tuple[int, int, int]]:
    """Where a text names times ``h:mm:ss``: start and end within the text, and the seconds."""
    return [(*match.span(), _seconds(*match.groups())) for match in _TIME.finditer(text)]


def _seconds(hours: str, minutes: str, seconds: str) -> int:
    return 3600 * int(hours) + 60 * int(minutes) + int(seconds)


def _entries(note: str) -> Iterator[Entry]:
    second, begin = None, 0
    for mark in _MARK.finditer(note):
        if second is not None or _bare(note[begin : mark.start()]):
            yield Entry(second, _bare(note[begin : mark.start()]))
        second, begin = _seconds(*mark.groups()), mark.end()
    if text := _bare(note[begin:]):
        yield Entry(second, text)


def _bare(text: str) -> str:
    """Without blanks around it, and without the mark that separates it from the next entry."""
    return text.strip().removesuffix(";").strip()


def with_evidence(description: Description) -> Description:
    """Mark the windows that hold a cited time.

    Windows overlap: of two that hold the time, those whose note names the time are marked; where no
    note does, the first one is.
    """
    marked = set()
    for time in description.cited:
        inside = [w for w in description.windows if w.start <= time < w.end]
        naming = [w for w in inside if any(e.second == math.floor(time) for e in w.entries)]
        marked |= {window.number for window in naming or inside[:1]}
    windows = tuple(
        replace(window, evidence=window.evidence or window.number in marked)
        for window in description.windows
    )
    return replace(description, windows=windows)
