"""Keeps faults of metrics and spans away from what they tell of."""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import wraps
from typing import ParamSpec

logger = logging.getLogger("vllm.mm_ext")

_P = ParamSpec("_P")


def harmless(note: Callable[_P, None]) -> Callable[_P, None]:
    """Let a function that takes note of something never raise: a request must not fail of it.

    The log tells of the first fault of each function with its traceback; of later ones only where
    it shows debug messages, as each request may bring one.

    Args:
        note: The function.
    """
    told = False

    @wraps(note)
    def noted(*args: _P.args, **kwargs: _P.kwargs) -> None:
        nonlocal told
        try:
            note(*args, **kwargs)
        except Exception:
            level, told = logging.DEBUG if told else logging.ERROR, True
            where = note.__qualname__
            logger.log(level, "mm_ext: metrics or spans lack something: %s", where, exc_info=True)

    return noted
