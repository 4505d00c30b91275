"""Windows one after the other, each with the notes of the two before it."""

from __future__ import annotations

from collections import deque

from vllm_mm_ext.long_video.asking import Window
from vllm_mm_ext.long_video.looking import Looks
from vllm_mm_ext.long_video.task import UsedStrategy

# Windows before a window whose notes the model is told.
_BEFORE = 2


async def rolling(looks: Looks) -> UsedStrategy:
    """Get a note about every window, in order, with what the model noted just before."""
    before: deque[Window] = deque(maxlen=_BEFORE)

    async def note(window: Window) -> None:
        told = "\n".join(looks.seen[w].note for w in before if w.video == window.video)
        await looks.note(window, looks.task.note_look, told)
        before.append(window)

    await looks.each(looks.task.windows, note, at_once=1)
    return "rolling"
