"""What the pages of ``inspect`` and ``describe`` share: templates, and the axis of time."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import jinja2
import numpy as np

_STEPS = (0.1, 0.2, 0.5, 1, 2, 5, 10, 15, 30, 60, 120, 300, 600, 900, 1800, 3600)


def environment() -> jinja2.Environment:
    """Templates whose values are escaped, and which fail where a value is missing."""
    return jinja2.Environment(
        loader=jinja2.PackageLoader("vllm_mm_ext.tools.cli", "templates"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )


def round_step(duration: float, most: int) -> float:
    """The smallest round step that cuts ``duration`` into at most ``most`` parts."""
    for step in _STEPS:
        if duration / step <= most:
            return float(step)
    return math.ceil(duration / most / 3600) * 3600.0


def axis(duration: float, text: Callable[[float], str]) -> list[dict[str, Any]]:
    """Marks of an axis of time: where each is in per cent, and its ``text``."""
    ticks = np.arange(0, duration + 1e-9, round_step(duration, 8)).tolist()
    return [{"left": percent(tick, duration), "text": text(tick)} for tick in ticks]


def percent(seconds: float, duration: float) -> str:
    """Where a time is within a duration, in per cent."""
    return f"{min(max(seconds / duration, 0.0), 1.0) * 100:.3f}"
