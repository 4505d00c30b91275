"""A first look at every window, with few frames, and a second, closer one where it matters."""

from __future__ import annotations

from collections.abc import Iterable

from vllm_mm_ext.long_video.asking import Window
from vllm_mm_ext.long_video.looking import Looks, SeenWindow
from vllm_mm_ext.long_video.notes import Entry

# Part of the request's bounds that the first look may take; the rest is for the second one.
_FIRST_SHARE = 0.5
# A window whose relevance is below this part of the best one gets no second look.
_LEAST_OF_BEST = 0.1


async def search(looks: Looks) -> dict[Window, tuple[Entry, ...]]:
    """Get a close note about the windows that matter most to the question.

    Returns:
        What earlier questions noted about the windows beside those, which nobody looked at closely
        now.
    """
    windows = looks.task.windows
    await looks.each(windows, looks.relevance, share=_FIRST_SHARE)
    chosen = choose(looks.seen.values(), looks.task.settings.close_windows)
    await looks.each(chosen, lambda window: looks.note(window, looks.task.close_look))
    places = {(window.video, window.number): window for window in windows}
    beside = {
        neighbour
        for window in chosen
        for number in (window.number - 1, window.number + 1)
        if (neighbour := places.get((window.video, number))) and neighbour not in chosen
    }
    recalled = {window: looks.recall(window) for window in beside}
    return {window: entries for window, entries in recalled.items() if entries}


def choose(seen: Iterable[SeenWindow], count: int) -> list[Window]:
    """The windows that matter most, the most relevant one first.

    Of windows that are as relevant, to one percent, the one in which more happens comes first.

    Args:
        seen: What the first look found.
        count: Windows at most.
    """
    asked = [one for one in seen if one.relevance is not None]
    best = max((one.relevance or 0.0 for one in asked), default=0.0)
    order = sorted(
        (one for one in asked if (one.relevance or 0.0) >= _LEAST_OF_BEST * best),
        key=lambda one: (
            -round(one.relevance or 0.0, 2),
            -(one.activity or 0.0),
            one.window.video,
            one.window.number,
        ),
    )
    return [one.window for one in order[:count]]
