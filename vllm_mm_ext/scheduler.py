"""Decodes first, encoder work apart, nobody passed for long: what ``--scheduler-cls`` names."""

from __future__ import annotations

from typing import Any


def __getattr__(name: str) -> Any:
    # Resolved when vLLM asks: importing the settings must not import vLLM.
    if name == "MMExtScheduler":
        from vllm_mm_ext.adapters.scheduler.choice import scheduler_class

        return scheduler_class()
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
