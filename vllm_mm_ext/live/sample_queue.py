"""Samples of a session's sound that wait in pieces."""

from __future__ import annotations

from collections import deque

import numpy as np

from vllm_mm_ext.live.resampling import Samples


class SampleQueue:
    """Sound without gaps; its last sample's position tells those of all."""

    def __init__(self) -> None:
        self._pieces: deque[Samples] = deque()
        self._count = 0
        self._end = 0

    def __len__(self) -> int:
        return self._count

    @property
    def start(self) -> int:
        """The position of the first sample."""
        return self._end - self._count

    @property
    def nbytes(self) -> int:
        """Bytes of all samples."""
        return self._count * np.dtype(np.float32).itemsize

    def push(self, position: int, samples: Samples) -> None:
        """Add sound at the end.

        Args:
            position: Of its first sample, in samples since the session began.
            samples: float32 ``[n]``.
        """
        if len(samples):
            self._pieces.append(samples)
            self._count += len(samples)
        self._end = position + len(samples)

    def take(self, count: int) -> Samples:
        """Remove and return the first samples, in memory of their own.

        Args:
            count: How many; at most as many as there are.
        """
        taken, left = [], count
        while left:
            piece = self._pieces.popleft()
            if len(piece) > left:
                self._pieces.appendleft(piece[left:])
                piece = piece[:left]
            taken.append(piece)
            left -= len(piece)
        self._count -= count
        return np.concatenate(taken) if taken else np.zeros(0, np.float32)

    def copy(self) -> Samples:
        """All samples, in memory of their own."""
        return np.concatenate(self._pieces) if self._pieces else np.zeros(0, np.float32)

    def take_from(self, position: int) -> tuple[int, Samples]:
        """Remove the samples from this position on; return where they begin, and them.

        Args:
            position: Samples since the session began; what is not there is not returned.
        """
        kept = min(max(position - self.start, 0), self._count)
        start = self.start
        before, after = self.take(kept), self.copy()
        self.clear()
        self.push(start, before)
        return start + kept, after

    def keep_last(self, count: int) -> None:
        """Forget all but the last samples.

        Args:
            count: How many are kept at least; whole pieces go.
        """
        while self._pieces and self._count - len(self._pieces[0]) >= count:
            self._count -= len(self._pieces.popleft())

    def clear(self) -> None:
        """Forget all."""
        self._pieces.clear()
        self._count = 0
