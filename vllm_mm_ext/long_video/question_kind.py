"""Which strategy a question gets under `auto`: a rule over the words of the question.

What is asked about the whole video (how many, in which order, a summary) needs a note about every
window: ``map_reduce``. How something comes about step by step needs windows that know what came
before them: ``rolling``. All else asks for some place in the video: ``search``, the cheapest.
"""

from __future__ import annotations

import re
from typing import Literal

from vllm_mm_ext.config.long_video_settings import Strategy

UsedStrategy = Literal["single", "rolling", "map_reduce", "search"]

_STEP_BY_STEP = re.compile(
    r"\b(step[- ]by[- ]step|steps|instructions|recipe|plot|story|storyline|come to|leads? (up )?to"
    r"|develops?|unfolds?|progress(es)?)\b",
    re.IGNORECASE,
)
_WHOLE_VIDEO = re.compile(
    r"\b(how (many|often|much)|count|number of|total|all|every|each|list|most|least|more|fewer"
    r"|first|second|third|last|before|after|earlier|later|again|twice|next|between|follow\w*|order"
    r"|sequence|summar\w+|overview|describe|description|chapters?|timeline|outline|whole|entire"
    r"|throughout|overall"
    r"|what is (this|the) [\w ]{0,16}about)\b",
    re.IGNORECASE,
)


def strategy_for(asked: Strategy, question: str, fits: bool) -> UsedStrategy:
    """The strategy that answers a question.

    Args:
        asked: The strategy that the request or the server's default names.
        question: The client's question.
        fits: All videos fit one prompt at the frame rate asked.
    """
    if asked != "auto":
        return asked
    if fits:
        return "single"
    if _STEP_BY_STEP.search(question):
        return "rolling"
    if not question.strip() or _WHOLE_VIDEO.search(question):
        return "map_reduce"
    return "search"
