"""Notes about windows: what a model writes becomes entries with times on the video's clock.

A model is told to begin each thing with the second of the window at which it begins: ``[12] a man
enters``. Models are untidy, so all kinds of marks are read, and what has none gets the start of the
window. Towards models and clients an entry is written ``[0:28:52] a man enters``.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import groupby

from vllm_mm_ext.long_video.asking import Window

# Entries of two windows about the same thing are at most so many seconds apart.
SAME_TIME_S = 1.0

_CLOCK = r"\d+(?::[0-5]?\d){0,2}(?:\.\d+)?"
_UNIT = r"\s*(?:s|sec|secs|seconds?)?\s*"
# [12] [12.5] [12s] [0:12] [1:02:03], and ranges of them, of which the start counts.
_MARK = re.compile(rf"\[\s*({_CLOCK}){_UNIT}(?:(?:-|\u2013|\u2014|to)\s*{_CLOCK}{_UNIT})?\]")
_TIME_IN_TEXT = re.compile(r"(?<![\d:.])(?:\d{1,4}:)?[0-5]?\d:[0-5]\d(?![\d:])")
_NOTHING = frozenset({"", "none", "nothing", "no", "n a", "nothing happens", "nothing matters"})
# What models write around entries: bullets, separators, emphasis.
_AROUND = " \t\r\n;,-\u2013\u2014*\u2022#:|"


@dataclass(frozen=True)
class Entry:
    """One thing that a note tells.

    Attributes:
        video: Number of the video.
        time: Seconds on the video's clock at which the thing begins.
        text: What it is, in one line.
        window: Number of the window that the note is about.
        until: The end of the time that the entry is about, where that is not a moment.
    """

    video: int
    time: float
    text: str
    window: int
    until: float | None = None

    def __str__(self) -> str:
        until = "" if self.until is None else f"-{clock(self.until)}"
        return f"[{clock(self.time)}{until}] {self.text}"


def clock(seconds: float) -> str:
    """Seconds as ``h:mm:ss``, rounded down."""
    minutes, second = divmod(int(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{second:02}"


def times_in(text: str) -> list[float]:
    """The times that a text names as ``h:mm:ss`` or ``m:ss``, in seconds, each once, in order."""
    return list(dict.fromkeys(_seconds(found) for found in _TIME_IN_TEXT.findall(text)))


def marked_parts(text: str) -> list[tuple[float | None, str]]:
    """The parts of a text that begin with a mark of time, with its seconds.

    What stands before the first mark is a part for each line, with None; a line that ends with a
    colon only introduces the others, and is left out.
    """
    marks = list(_MARK.finditer(text))
    bounds = [mark.start() for mark in marks] + [len(text)]
    before = text[: bounds[0]]
    parts: list[tuple[float | None, str]] = [
        (None, line) for line in before.splitlines() if not line.rstrip("* \t").endswith(":")
    ]
    for mark, end in zip(marks, bounds[1:], strict=True):
        parts.append((_seconds(mark[1]), text[mark.end() : end]))
    tidy = [(time, " ".join(part.split()).strip(_AROUND)) for time, part in parts]
    return [(time, part) for time, part in tidy if part or time is not None]


def entries_of(text: str, window: Window) -> list[Entry]:
    """The entries of a model's note about a window, in order of time."""
    entries = [
        Entry(window.video, _on_clock(time, window), part, window.number)
        for time, part in marked_parts(text)
        if says_something(part)
    ]
    return sorted(entries, key=lambda entry: entry.time)


def merged(notes: Iterable[tuple[Window, Sequence[Entry]]]) -> list[Entry]:
    """The entries of all notes of one video in order of time.

    What two windows that overlap both tell is kept once: the same words at about the same time,
    and what goes on as the second one begins, which is noted there as if it began.

    Args:
        notes: Windows with the entries of each, in the order of the windows.
    """
    kept: list[Entry] = []
    last: tuple[Window, Sequence[Entry]] | None = None
    for window, entries in notes:
        overlaps = last is not None and last[0].end - window.start >= SAME_TIME_S
        kept += _without_told(window, entries, last[1]) if last and overlaps else entries
        last = window, entries
    return sorted(kept, key=lambda entry: entry.time)


def lines_of(entries: Iterable[Entry]) -> str:
    """Entries as text, a line for those of a window that follow each other."""
    return "\n".join(
        "; ".join(str(entry) for entry in of_window)
        for _, of_window in groupby(entries, key=lambda entry: entry.window)
    )


def _without_told(window: Window, entries: Sequence[Entry], before: Sequence[Entry]) -> list[Entry]:
    """Entries of a window without those that the window before it tells."""
    left = list(before)  # Each of those is the same as one entry at most.
    words = {plain(entry.text) for entry in before}
    new = []
    for entry in entries:
        same = [
            other
            for other in left
            if plain(other.text) == plain(entry.text)
            and abs(other.time - entry.time) <= SAME_TIME_S
        ]
        goes_on = entry.time - window.start < SAME_TIME_S and plain(entry.text) in words
        if same:
            left.remove(min(same, key=lambda other: abs(other.time - entry.time)))
        elif not goes_on:
            new.append(entry)
    return new


def plain(text: str) -> str:
    """A text without case, punctuation and doubled spaces."""
    return " ".join(re.findall(r"\w+", text.lower()))


def says_something(text: str) -> bool:
    """Whether a text is more than the word that there is nothing to tell."""
    return plain(text) not in _NOTHING


def _on_clock(time: float | None, window: Window) -> float:
    """The time of a mark on the video's clock, within the window."""
    if time is None:
        return window.start
    if time > window.end - window.start and window.start <= time <= window.end:
        return time  # The model wrote the time on the video's clock, as in notes that it was given.
    return min(window.start + time, window.end)


def _seconds(mark: str) -> float:
    seconds = 0.0
    for part in mark.split(":"):
        seconds = seconds * 60 + float(part)
    return seconds
