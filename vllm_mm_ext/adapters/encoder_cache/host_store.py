"""The worker's tensors of the host tier."""

from __future__ import annotations

from collections.abc import Iterable

import torch

from vllm_mm_ext.adapters.encoder_cache.outputs import owned


class HostStore:
    """Encoder outputs in host memory, which is pinned for outputs of a GPU.

    Copies are queued on the stream that computes. So each copy follows the encoding of its item and
    comes before later reads, and the host does not wait for copies.
    """

    def __init__(self) -> None:
        self._kept: dict[str, tuple[torch.Tensor, torch.device]] = {}

    def __len__(self) -> int:
        return len(self._kept)

    def save(self, key: str, output: torch.Tensor) -> None:
        """Keep an output ``[tokens, width]``, in place of what its key named before."""
        if output.device.type == "cpu":
            kept = owned(output)
        else:
            kept = torch.empty(output.shape, dtype=output.dtype, pin_memory=True)
            kept.copy_(output, non_blocking=True)
        self._kept[key] = (kept, output.device)

    def load(self, key: str) -> torch.Tensor:
        """The output on the device it came from; on a CPU this is the kept tensor itself."""
        kept, device = self._kept[key]
        return kept.to(device, non_blocking=True)

    def drop(self, keys: Iterable[str] | None) -> None:
        """Forget some outputs, or all of them (None)."""
        if keys is None:
            self._kept.clear()
            return
        for key in keys:
            self._kept.pop(key, None)

    def wipe(self, keys: Iterable[str]) -> None:
        """Overwrite some outputs and forget them."""
        for key in keys:
            if (found := self._kept.pop(key, None)) is not None:
                found[0].zero_()
