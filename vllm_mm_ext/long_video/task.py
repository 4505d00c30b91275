"""What one request about long videos asks for, and what it may take."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from vllm_mm_ext.config.long_video_settings import (
    LongVideoOptions,
    LongVideoSettings,
    Strategy,
)
from vllm_mm_ext.errors import MediaError, OptionBoundError
from vllm_mm_ext.long_video.asking import Look, Window
from vllm_mm_ext.long_video.video_windows import windows_of

_PATH = "mm_ext.long_video."

# English questions that plainly need a note about every window get no first looks. With other
# words `auto` finds out by those looks.
_WHOLE_VIDEO = re.compile(
    r"\b(summar\w+|overview|describe|description|chapters?|timeline|outline|whole|entire"
    r"|throughout|overall|everything|list|all|in (which|what) order|sequence|what happens"
    r"|what is (this|the) [\w ]{0,16}about)\b",
    re.IGNORECASE,
)

UsedStrategy = Literal["rolling", "map_reduce", "search"]
WindowStrategy = Literal["auto", UsedStrategy]


@dataclass(frozen=True)
class Task:
    """A question about videos, and how it is answered.

    Attributes:
        strategy: How the windows are looked at.
        question: The client's question.
        windows: All windows of all videos, in the order of the videos and of time.
        fps: Frames per second of a window; None as the server samples.
        max_parallel: Prompts under way at once.
        total_tokens: Prompt tokens of all windows together; None for no bound.
        time_s: Seconds after which no further window is looked at; None for no bound.
        answer_room: Tokens of notes that the prompt of the answer has room for.
        settings: The server's settings.
    """

    strategy: WindowStrategy
    question: str
    windows: tuple[Window, ...]
    fps: float | None
    max_parallel: int
    total_tokens: int | None
    time_s: float | None
    answer_room: int
    settings: LongVideoSettings

    @property
    def note_look(self) -> Look:
        """A look at a window for a note that serves any question."""
        return Look("note", fps=self.fps)

    @property
    def coarse_look(self) -> Look:
        """A first look at a window, with few frames."""
        return Look("coarse", fps=self.fps, max_frames=self.settings.coarse_frames)

    @property
    def close_look(self) -> Look:
        """A second look at a window, with many frames."""
        return Look("close", fps=max(self.settings.close_fps, self.fps or 0))


def strategy_for(asked: Strategy, question: str, fits: bool) -> Strategy:
    """How a question is answered, as far as it is known before anything is looked at.

    Args:
        asked: The strategy that the request or the server's default names.
        question: The client's question.
        fits: All videos fit one prompt at the frame rate asked.
    """
    if asked != "auto":
        return asked
    if fits:
        return "single"
    return "auto" if question.strip() and not _WHOLE_VIDEO.search(question) else "map_reduce"


def task_of(
    settings: LongVideoSettings,
    options: LongVideoOptions,
    *,
    strategy: WindowStrategy,
    question: str,
    durations: Sequence[float | None],
    answer_room: int,
) -> Task:
    """The task that a request's options make of the server's settings.

    Args:
        settings: The server's settings, which bound what may be asked.
        options: What the request asks.
        strategy: What ``strategy_for`` chose.
        question: The client's question.
        durations: Seconds of each video; None where the container does not tell.
        answer_room: Tokens of notes that the prompt of the answer has room for.

    Raises:
        MediaError: A video has no duration.
        OptionBoundError: An option is past a bound, or the videos make too many windows.
    """
    window_s = options.window_s or settings.window_s
    if options.overlap_s is None:
        overlap_s = min(settings.overlap_s, window_s / 2)
    elif (overlap_s := options.overlap_s) > window_s / 2:
        raise _refused("overlap_s", overlap_s, f"at most half of window_s, {window_s / 2:g}")
    for name in ("max_parallel", "max_windows"):
        asked, limit = getattr(options, name), getattr(settings, name)
        if asked is not None and asked > limit:
            raise _refused(name, asked, f"at most {limit} on this server")
    known = [_checked(number, duration) for number, duration in enumerate(durations)]
    return Task(
        strategy=strategy,
        question=question,
        windows=tuple(
            windows_of(known, window_s, overlap_s, options.max_windows or settings.max_windows)
        ),
        fps=options.fps,
        max_parallel=options.max_parallel or settings.max_parallel,
        total_tokens=options.total_tokens,
        time_s=options.time_s,
        answer_room=answer_room,
        settings=settings,
    )


def _refused(name: str, value: float, valid: str) -> OptionBoundError:
    return OptionBoundError(
        f"{_PATH}{name} = {value:g}: must be {valid}", parameter=_PATH + name, value=value
    )


def _checked(number: int, duration: float | None) -> float:
    if duration is None or not math.isfinite(duration) or duration <= 0:
        raise MediaError(
            f"Video {number + 1} does not tell how long it is, so it has no windows. With "
            f"{_PATH}strategy = 'single' it can be asked about in one prompt.",
            parameter="video_url",
        )
    return duration
