"""Sizes of the calls of an in-process engine's vision encoder."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def record_encoder_calls(llm: Any) -> Iterator[list[int]]:
    """Record the patches of every encoder call while the block runs.

    Args:
        llm: A ``vllm.LLM`` whose engine runs in this process, with a Qwen-VL style model: its
            encoder takes patches ``[patches, values]`` first.

    Yields:
        Patches of each call so far.
    """
    calls: list[int] = []

    def note(module: Any, args: tuple[Any, ...]) -> None:
        del module
        calls.append(len(args[0]))

    (hook,) = llm.apply_model(lambda model: model.visual.register_forward_pre_hook(note))
    try:
        yield calls
    finally:
        hook.remove()
