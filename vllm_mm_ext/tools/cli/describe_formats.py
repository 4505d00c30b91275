"""A description of a long video as Markdown, JSON or WebVTT chapters."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict
from enum import StrEnum
from itertools import zip_longest
from types import MappingProxyType

from vllm_mm_ext.tools.cli.description import Description, NotedWindow, hms


class Format(StrEnum):
    """What a description is written as."""

    markdown = "markdown"
    json = "json"
    vtt = "vtt"


def to_markdown(description: Description) -> str:
    """Question and answer, what the answer rests on, and the notes of all windows."""
    lines = [f"# {_line(description.name)}", ""]
    if description.question is not None:
        lines += [f"**{_line(description.question)}**", ""]
    if description.answer:
        lines += [description.answer, ""]
    if description.evidence:
        lines += ["## Evidence", "", *map(_bullet, description.evidence), ""]
    if description.windows:
        lines += ["## Windows", "", *map(_bullet, description.windows), ""]
    return "\n".join(lines)


def to_json(description: Description) -> str:
    """Everything, times in seconds."""
    return json.dumps(asdict(description), ensure_ascii=False, indent=1) + "\n"


def to_vtt(description: Description) -> str:
    """A WebVTT file of chapters: a cue per window with a note (https://www.w3.org/TR/webvtt1/).

    Cues of chapters may not overlap, so a chapter ends where the next window begins. A chapter's
    title is one line.
    """
    return "\n\n".join([f"WEBVTT - {_title(description.name)}", *_cues(description.windows)]) + "\n"


FORMATS: Mapping[Format, Callable[[Description], str]] = MappingProxyType(
    {Format.markdown: to_markdown, Format.json: to_json, Format.vtt: to_vtt}
)


def _cues(windows: tuple[NotedWindow, ...]) -> Iterator[str]:
    for window, following in zip_longest(windows, windows[1:]):
        end = window.end if following is None else min(window.end, following.start)
        title = _title(window.note or "")
        begin_ms, end_ms = round(window.start * 1000), round(end * 1000)
        if title and begin_ms < end_ms:
            yield f"{_timestamp(begin_ms)} --> {_timestamp(end_ms)}\n{title}"


def _timestamp(milliseconds: int) -> str:
    whole, milliseconds = divmod(milliseconds, 1000)
    minutes, second = divmod(whole, 60)
    hours, minute = divmod(minutes, 60)
    return f"{hours:02d}:{minute:02d}:{second:02d}.{milliseconds:03d}"


def _title(text: str) -> str:
    """One line without what WebVTT reads as markup."""
    escaped = _line(text).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return escaped.replace("\0", "\ufffd")


def _line(text: str) -> str:
    return re.sub(r"\s+", " ", text).strip()


def _bullet(window: NotedWindow) -> str:
    said = _line(window.note or "")
    if window.problem is not None:
        said = f"*{_line(window.problem)}*"
    elif not said:
        said = "*not noted*"
    return f"- **{hms(window.start)} - {hms(window.end)}** {said}"
