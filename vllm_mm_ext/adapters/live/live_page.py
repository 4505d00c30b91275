"""The page ``GET /mm_ext/live``: microphone, camera, transcript and latencies, in one file."""

from __future__ import annotations

from functools import cache
from importlib.resources import files


@cache
def page() -> str:
    """The page as HTML; it loads nothing but itself, and asks the server that sent it."""
    return files("vllm_mm_ext.adapters.live").joinpath("live.html").read_text(encoding="utf-8")
