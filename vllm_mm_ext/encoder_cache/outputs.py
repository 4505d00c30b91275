"""Encoder outputs as caches hold them."""

from __future__ import annotations

import torch


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
