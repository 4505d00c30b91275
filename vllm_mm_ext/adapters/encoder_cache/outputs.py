"""Copies encoder outputs where caches need them in memory of their own."""

from __future__ import annotations

from collections.abc import Iterable

import torch

from vllm_mm_ext.base.heap import trim_when_due


def fit_to_keep(outputs: Iterable[torch.Tensor]) -> tuple[torch.Tensor, ...]:
    """Make a model's outputs ``[tokens, channels]`` of some mm items fit for caches.

    Each output is copied out of its batch. On a CPU this trims the process's heaps when due.
    """
    made = tuple(owned(output) for output in outputs)
    if made and made[0].device.type == "cpu":
        trim_when_due()
    return made


def owned(output: torch.Tensor) -> torch.Tensor:
    """The output of one mm item in memory of its own: the tensor itself, or a copy of a view.

    A model encodes several mm items in one call, and returns for each item a view of the outputs of
    all of them. Caches count and evict outputs one by one, but a kept view keeps the outputs of all
    items of its call in memory.

    Args:
        output: ``[tokens, channels]`` of one mm item.
    """
    whole = output.untyped_storage().nbytes() == output.nbytes
    return output if whole else output.clone()
