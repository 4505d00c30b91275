"""A first look at every window, with few frames, and a second, closer one where it matters."""

from __future__ import annotations

from collections.abc import Iterable
from heapq import heapify, heappop, heapreplace
from itertools import pairwise

from vllm_mm_ext.long_video.asking import Window
from vllm_mm_ext.long_video.looking import Looks, SeenWindow

# Part of the request's bounds that the first look may take; the rest is for the second one.
_FIRST_SHARE = 0.5
# A window whose relevance is below this part of the best one gets no second look.
_LEAST_OF_BEST = 0.2
# What a window beside a chosen one loses, as a part of the best relevance, and how many windows
# away it loses nothing. Simulated, over two hours: where scenes look like what is asked, this finds
# 6 to 10 of a hundred events more, elsewhere one less.
_DIVERSITY = 0.2
_NEAR = 6


async def search(looks: Looks) -> None:
    """Get a close note about the windows that matter most to the question.

    What earlier questions noted about the windows beside those counts, too.
    """
    windows = looks.task.windows
    await looks.each(windows, looks.relevance, share=_FIRST_SHARE)
    chosen = choose(looks.seen.values(), looks.task.settings.close_windows)
    await looks.each(chosen, lambda window: looks.note(window, looks.task.close_look))
    for before, after in pairwise(windows):
        if before.video == after.video and (before in chosen) != (after in chosen):
            looks.recall(after if before in chosen else before)


def choose(seen: Iterable[SeenWindow], count: int) -> list[Window]:
    """The windows that are worth a second look, the best one first.

    Maximal marginal relevance: a window near one that was chosen counts less, so that one scene
    which looks like what is asked does not take all second looks. Of windows that are as relevant,
    to one percent, the one in which more happens comes first.

    Args:
        seen: What the first look found.
        count: Windows at most.
    """
    asked = [(one, one.relevance) for one in seen if one.relevance is not None]
    best = max((relevance for _, relevance in asked), default=0.0)
    chosen: list[Window] = []

    def rank(one: SeenWindow, relevance: float) -> tuple[float, float, int, int]:
        window = one.window
        away = [abs(window.number - w.number) for w in chosen if w.video == window.video]
        nearness = max(0.0, 1 - min(away, default=_NEAR) / _NEAR)
        worth = relevance - _DIVERSITY * best * nearness
        return -round(worth, 2), -(one.activity or 0.0), window.video, window.number

    heap = [(rank(*pair), pair) for pair in asked if pair[1] >= _LEAST_OF_BEST * best]
    heapify(heap)
    while heap and len(chosen) < count:
        ranked, pair = heap[0]
        if ranked == (now := rank(*pair)):
            chosen.append(heappop(heap)[1][0].window)
        else:
            heapreplace(heap, (now, pair))
    return chosen
