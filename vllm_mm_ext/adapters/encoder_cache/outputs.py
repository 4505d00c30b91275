"""Encoder outputs as caches hold them."""

from __future__ import annotations

from collections.abc import Iterable

import torch

from vllm_mm_ext.base.heap import trim_when_due


def fit_to_keep(outputs: Iterable[torch.Tensor]) -> tuple[torch.Tensor, ...]:
    """Outputs ``[tokens, channels]`` of some mm items as a model returns them, fit for caches.

    Each is copied out of its batch. On a CPU the process's heaps are trimmed when that is due.
    """
    made = tuple(owned(output) for output in outputs)
    if made and made[0].device.type == "cpu":
        trim_when_due()
    return made


def owned(output: torch.Tensor) -> torch.Tensor:
    """The output of one mm item in memory of its own: itself, or a copy where it is a view.

    A model encodes several mm items in one call, and what it returns for each is a view of the
    outputs of them all. Caches count and evict outputs one by one, but a view that is kept keeps
    the outputs of all items of its call.

    Args:
        output: ``[tokens, channels]`` of one mm item.
    """
    whole = output.untyped_storage().nbytes() == output.nbytes
    return output if whole else output.clone()
