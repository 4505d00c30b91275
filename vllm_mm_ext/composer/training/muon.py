"""Muon: momentum whose update of a matrix is made orthogonal.

Jordan et al. 2024, "Muon: An optimizer for hidden layers in neural networks"; the scale that lets
it share AdamW's learning rate is that of Liu et al. 2025, "Muon is scalable for LLM training".
PyTorch's own version computes in bfloat16, which many CPUs emulate.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from typing import Any

import torch

# Coefficients of the quintic iteration that brings all singular values near 1 (Jordan et al.).
_A, _B, _C = 3.4445, -4.7750, 2.0315
_ITERATIONS = 5
# Root mean square of an AdamW update, which this scale matches (Liu et al.).
_RMS = 0.2


class Muon(torch.optim.Optimizer):  # type: ignore[misc]
    """Muon with Nesterov momentum and decoupled weight decay.

    Args:
        params: Matrices of hidden layers.
        lr: Learning rate, as for AdamW.
        momentum: Share of the running sum of gradients that stays.
        weight_decay: Decoupled.
    """

    def __init__(
        self,
        params: Iterable[torch.Tensor],
        lr: float = 1e-3,
        momentum: float = 0.95,
        weight_decay: float = 0.0,
    ) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()  # type: ignore[untyped-decorator]
    def step(self, closure: Any = None) -> None:
        """Update all matrices that have a gradient; those of one shape as one batch."""
        del closure
        for group in self.param_groups:
            by_shape: dict[tuple[int, ...], list[torch.Tensor]] = defaultdict(list)
            for matrix in group["params"]:
                if matrix.grad is not None:
                    by_shape[tuple(matrix.shape)].append(matrix)
            for matrices in by_shape.values():
                self._update(matrices, group)

    def _update(self, matrices: list[torch.Tensor], group: dict[str, Any]) -> None:
        updates = []
        for matrix in matrices:
            state = self.state[matrix]
            if "momentum" not in state:
                state["momentum"] = torch.zeros_like(matrix)
            state["momentum"].lerp_(matrix.grad, 1 - group["momentum"])
            updates.append(matrix.grad.lerp(state["momentum"], group["momentum"]))
        rows, columns = matrices[0].shape
        scale = _RMS * max(rows, columns) ** 0.5
        for matrix, update in zip(matrices, orthogonal(torch.stack(updates)), strict=True):
            matrix.mul_(1 - group["lr"] * group["weight_decay"])
            matrix.add_(update, alpha=-group["lr"] * scale)


def orthogonal(x: torch.Tensor) -> torch.Tensor:
    """About the nearest (semi-)orthogonal matrix of each of ``[n, rows, columns]``."""
    wide = x if x.shape[1] <= x.shape[2] else x.transpose(1, 2)
    wide = wide / wide.norm(dim=(1, 2), keepdim=True).clamp_min(1e-7)
    for _ in range(_ITERATIONS):
        gram = wide @ wide.transpose(1, 2)
        wide = _A * wide + (_B * gram + _C * gram @ gram) @ wide
    return wide if x.shape[1] <= x.shape[2] else wide.transpose(1, 2)
