"""A note about every window, in parallel; the answer is given from all notes."""

from __future__ import annotations

from vllm_mm_ext.long_video.looking import Looks
from vllm_mm_ext.long_video.task import UsedStrategy


async def map_reduce(looks: Looks) -> UsedStrategy:
    """Get a note about every window. The notes do not depend on the question."""
    look = looks.task.note_look
    await looks.each(looks.task.windows, lambda window: looks.note(window, look))
    return "map_reduce"
