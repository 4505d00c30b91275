"""The worker's tensors of the host tier."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

import torch

from vllm_mm_ext.adapters.encoder_cache.outputs import owned

# Pinned memory that torch has at most, of that which outputs use, before it gives some back.
_MOST_PINNED = 1.25


class HostStore:
    """Encoder outputs in host memory, which is pinned for outputs of a GPU.

    Copies are queued on the stream that computes. So each copy follows the encoding of its item and
    comes before later reads, and the host does not wait for copies.
    """

    def __init__(self) -> None:
        self._kept: dict[str, tuple[torch.Tensor, torch.device]] = {}
        self._pinned = PinnedBlocks()

    def __len__(self) -> int:
        return len(self._kept)

    def save(self, key: str, output: torch.Tensor) -> None:
        """Keep an output ``[tokens, width]``, in place of what its key named before."""
        if output.device.type == "cpu":
            kept = owned(output)
        else:
            self.drop([key])
            self._pinned.take(output.nbytes)
            kept = torch.empty(output.shape, dtype=output.dtype, pin_memory=True)
            kept.copy_(output, non_blocking=True)
        self._kept[key] = (kept, output.device)

    def load(self, key: str) -> torch.Tensor:
        """The output on the device it came from; on a CPU this is the kept tensor itself."""
        kept, device = self._kept[key]
        return kept.to(device, non_blocking=True)

    def drop(self, keys: Iterable[str] | None) -> None:
        """Forget some outputs, or all of them (None)."""
        for key in list(self._kept) if keys is None else keys:
            self._pop(key)

    def wipe(self, keys: Iterable[str]) -> None:
        """Overwrite some outputs and forget them."""
        for key in keys:
            if (found := self._pop(key)) is not None:
                found.zero_()

    def _pop(self, key: str) -> torch.Tensor | None:
        if key not in self._kept:
            return None
        found, device = self._kept.pop(key)
        if device.type != "cpu":
            self._pinned.give(found.nbytes)
        return found


class PinnedBlocks:
    """How much pinned memory torch has for tensors that are made and dropped here.

    Torch takes a block of a power of two bytes for each, and keeps it for the next tensor of that
    size. Where sizes change it would keep ever more, so it is told to give free blocks back.
    """

    def __init__(self) -> None:
        # By size of a block, how many are in use, and how many there are.
        self._used: Counter[int] = Counter()
        self._there: Counter[int] = Counter()

    def take(self, size: int) -> None:
        """A tensor of so many bytes is about to be made."""
        block = _block(size)
        self._used[block] += 1
        if self._used[block] <= self._there[block]:
            return
        self._there[block] += 1
        if _bytes(self._there) > _MOST_PINNED * _bytes(self._used):
            torch.accelerator.empty_host_cache()
            self._there = self._used.copy()

    def give(self, size: int) -> None:
        """A tensor of so many bytes has been dropped."""
        self._used[_block(size)] -= 1


def _block(size: int) -> int:
    return 1 << max(size - 1, 0).bit_length()


def _bytes(blocks: Counter[int]) -> int:
    return sum(block * count for block, count in blocks.items())
