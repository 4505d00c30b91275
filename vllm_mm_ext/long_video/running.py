"""Looks through long videos for what answers a question: from the task to the evidence."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from vllm_mm_ext.errors import OptionBoundError
from vllm_mm_ext.long_video.asking import AskFailedError, Cost, Model, Window
from vllm_mm_ext.long_video.looking import Looks, Progress, SeenWindow
from vllm_mm_ext.long_video.map_reduce import map_reduce
from vllm_mm_ext.long_video.note_store import NoteStore
from vllm_mm_ext.long_video.notes import Entry, lines_of, merged
from vllm_mm_ext.long_video.reducing import TIMES, prompt_room, reduced, token_counts
from vllm_mm_ext.long_video.rolling import rolling
from vllm_mm_ext.long_video.search import auto, search
from vllm_mm_ext.long_video.task import Task, UsedStrategy

_STRATEGIES = {"auto": auto, "rolling": rolling, "map_reduce": map_reduce, "search": search}
# Spans of time that evidence names as not looked at, at most; more are told as one.
_GAPS = 4
# Tokens of one such line at most.
_GAP_TOKENS = 32


@dataclass(frozen=True)
class Evidence:
    """What the answer about one video rests on.

    Attributes:
        video: Number of the video.
        entries: What matters, in order of time; spans that nobody looked at are entries, too.
    """

    video: int
    entries: tuple[Entry, ...]

    @property
    def text(self) -> str:
        """The entries as they stand in the prompt of the answer."""
        return lines_of(self.entries)


@dataclass(frozen=True)
class Outcome:
    """What came of looking through the videos of a request.

    Attributes:
        strategy: How the windows were looked at.
        evidence: What the answer rests on, for each video.
        windows: Every window that was looked at, in order, with its note or why it failed.
        left_out: Windows that a bound on tokens or time left out, or left without a second look.
        is_thinned: There was no room for all notes that may matter; some were left out evenly.
        cost: What all prompts took.
    """

    strategy: UsedStrategy
    evidence: tuple[Evidence, ...]
    windows: tuple[SeenWindow, ...]
    left_out: tuple[Window, ...]
    is_thinned: bool
    cost: Cost


async def look_through(
    task: Task, model: Model, store: NoteStore, progress: Callable[[Progress], None]
) -> Outcome:
    """Look through the videos of a task.

    Cancellation cancels all prompts that are under way.

    Args:
        task: What is asked, and the limits.
        model: Whom to ask.
        store: Keeps replies about windows for later questions.
        progress: Called when a look at a window has ended.

    Raises:
        OptionBoundError: The conversation leaves no room for notes.
        AskFailedError: No window could be looked at.
    """
    await check_room(task, model)
    looks = Looks(task, model, store, progress)
    used = await _STRATEGIES[task.strategy](looks)
    failed = [seen for seen in looks.seen.values() if seen.failed is not None]
    if failed and len(failed) == len(looks.seen):
        first = min(failed, key=lambda seen: (seen.window.video, seen.window.number))
        raise AskFailedError(f"None of {len(failed)} windows could be looked at: {first.failed}")
    evidence, is_thinned = await _evidence(looks)
    windows = tuple(looks.seen[window] for window in task.windows if window in looks.seen)
    return Outcome(
        strategy=used,
        evidence=tuple(evidence),
        windows=windows,
        left_out=tuple(window for window in task.windows if window in looks.left_out),
        is_thinned=is_thinned,
        cost=sum((seen.cost for seen in windows), looks.text_cost),
    )


async def check_room(task: Task, model: Model) -> None:
    """Check that notes fit the prompts, before anything is looked at.

    Raises:
        OptionBoundError: They do not; the message says what would.
    """
    least = _least(task) + _GAPS * _GAP_TOKENS
    videos = task.windows[-1].video + 1
    if task.answer_room < least * videos:
        raise OptionBoundError(
            f"The prompt has room for {max(0, task.answer_room)} tokens of notes besides the "
            f"conversation and the answer; notes need at least {least} for each video. A shorter "
            f"conversation or a lower max_tokens would fit.",
            parameter="messages",
        )
    if await prompt_room(task, model) < _least(task):
        raise OptionBoundError(
            f"The question is too long to be asked beside notes: a prompt and its reply have "
            f"{model.context_tokens} tokens at most.",
            parameter="messages",
        )


async def _evidence(looks: Looks) -> tuple[list[Evidence], bool]:
    """What the answer rests on, for each video, and whether some of it was left out."""
    task = looks.task
    videos = range(task.windows[-1].video + 1)
    of_video = [[w for w in task.windows if w.video == video] for video in videos]
    told = [merged((w, looks.seen[w].entries) for w in ws if w in looks.seen) for ws in of_video]
    needs = [sum(await token_counts(looks.model, entries)) for entries in told]
    room = min(
        max(task.settings.select_tokens, _least(task) * len(videos)),
        task.answer_room - _GAPS * _GAP_TOKENS * len(videos),
    )
    evidence, is_thinned = [], False
    for video, room_of_video in enumerate(_shared(room, needs)):
        entries, left_some_out = await reduced(looks, told[video], room_of_video)
        by_time = sorted([*entries, *_gaps(of_video[video], looks)], key=lambda entry: entry.time)
        evidence.append(Evidence(video, tuple(by_time)))
        is_thinned |= left_some_out
    return evidence, is_thinned


def _least(task: Task) -> int:
    """Tokens of notes about a video that there must be room for: those of one note."""
    return task.settings.note_tokens + TIMES


def _shared(room: int, needs: Sequence[int]) -> list[int]:
    """Room for each of some needs: who needs less than an equal share leaves the rest to others."""
    shares = [0] * len(needs)
    order = sorted(range(len(needs)), key=lambda i: needs[i])
    for place, i in enumerate(order):
        shares[i] = min(needs[i], room // (len(needs) - place))
        room -= shares[i]
    return shares


def _gaps(windows: Sequence[Window], looks: Looks) -> list[Entry]:
    """Spans of a video that nobody could look at, or that a bound left out."""
    missing = [w for w in windows if w not in looks.seen or looks.seen[w].is_missing]
    spans: list[list[Window]] = []
    for window in missing:
        if not spans or window.number != spans[-1][-1].number + 1:
            spans.append([])
        spans[-1].append(window)
    text = "not looked at"
    if len(spans) > _GAPS:
        text, spans = f"{len(missing)} of {len(windows)} parts were not looked at", [missing]
    gaps = []
    for first, last in ((span[0], span[-1]) for span in spans):
        # What the windows beside the span share with it was looked at.
        start = windows[first.number - 1].end if first.number else first.start
        until = windows[last.number + 1].start if last is not windows[-1] else last.end
        gaps.append(Entry(first.video, start, text, first.number, until))
    return gaps
