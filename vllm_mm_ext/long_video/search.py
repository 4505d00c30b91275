"""A first look at every window, with few frames, and a second, closer one where it matters.

``auto`` goes on with notes about all windows where too many of them matter for that, or none.
"""

from __future__ import annotations

from collections.abc import Iterable
from itertools import pairwise

from vllm_mm_ext.long_video.asking import Window
from vllm_mm_ext.long_video.looking import Looks, SeenWindow
from vllm_mm_ext.long_video.map_reduce import map_reduce
from vllm_mm_ext.long_video.task import UsedStrategy

# Part of the request's bounds that the first look may take; the rest is for the second one.
_FIRST_SHARE = 0.5
# A window whose relevance is below this part of the best one gets no second look.
_LEAST_OF_BEST = 0.2
# From this relevance on the model says yes rather than no.
_YES = 0.5
# First looks between which `auto` counts the windows that matter.
_AT_ONCE = 32


async def search(looks: Looks) -> UsedStrategy:
    """Get a close note about the windows that matter most to the question."""
    await looks.each(looks.task.windows, looks.relevance, share=_FIRST_SHARE)
    await _look_closely(looks)
    return "search"


async def auto(looks: Looks) -> UsedStrategy:
    """Search, or get a note about every window where that is cheaper or the question needs it.

    It is cheaper where an earlier question left notes about all windows, or about all but as many
    as a search looks at closely. The question needs it where it matters to more windows than that,
    as it is about the whole video then, and where it seems to matter to none: what is asked may be
    too small for first looks, or nothing that the model sees at one place.
    """
    windows, most = looks.task.windows, looks.task.settings.close_windows

    def matters() -> int:
        return sum((one.relevance or 0.0) > _YES for one in looks.seen.values())

    if sum(not looks.is_noted(window) for window in windows) > most:
        await looks.each(
            windows,
            looks.relevance,
            share=_FIRST_SHARE,
            at_once=_AT_ONCE,
            until=lambda: matters() > most,
        )
        if 0 < matters() <= most:
            await _look_closely(looks)
            return "search"
        looks.left_out.clear()
    return await map_reduce(looks)


async def _look_closely(looks: Looks) -> None:
    """Get the close notes, and what earlier questions noted about the windows beside them."""
    chosen = choose(looks.seen.values(), looks.task.settings.close_windows)
    await looks.each(chosen, lambda window: looks.note(window, looks.task.close_look))
    for before, after in pairwise(looks.task.windows):
        if before.video == after.video and (before in chosen) != (after in chosen):
            looks.recall(after if before in chosen else before)


def choose(seen: Iterable[SeenWindow], count: int) -> list[Window]:
    """The windows that are worth a second look, the best one first.

    Of windows that are as relevant, to one percent, the one in which more happens comes first.

    Args:
        seen: What the first look found.
        count: Windows at most.
    """
    asked = [(one.relevance, one) for one in seen if one.relevance is not None]
    least = _LEAST_OF_BEST * max((relevance for relevance, _ in asked), default=0.0)

    def rank(found: tuple[float, SeenWindow]) -> tuple[float, float, int, int]:
        relevance, one = found
        return -round(relevance, 2), -(one.activity or 0.0), one.window.video, one.window.number

    worth = sorted((found for found in asked if found[0] >= least), key=rank)
    return [one.window for _, one in worth[:count]]
