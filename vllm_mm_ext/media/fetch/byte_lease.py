"""Bytes of the media budget that are held, and for whom."""

from __future__ import annotations

import weakref
from typing import TYPE_CHECKING, Any

import numpy.typing as npt

if TYPE_CHECKING:
    from vllm_mm_ext.media.fetch.byte_gate import MediaBudget


class Account:
    """Bytes that count for one request now."""

    __slots__ = ("held",)

    def __init__(self) -> None:
        self.held = 0


class Lease:
    """Bytes of the budget that one file, or the arrays of one decode, hold.

    All methods may be called from any thread, a garbage collection included.

    Attributes:
        num_bytes: Bytes held, whether they count in the media budget or in a cache's.
    """

    __slots__ = ("_account", "_budget", "_cached", "num_bytes")

    def __init__(self, budget: MediaBudget, account: Account) -> None:
        self.num_bytes = 0
        self._budget = budget
        self._account = account
        self._cached = False

    def resize(self, num_bytes: int) -> None:
        """Hold this many bytes from now on, without waiting: for when the real size is known."""
        self._budget._post(lambda: self._add(num_bytes - self.num_bytes))

    def release(self) -> None:
        """Hold nothing any more. Calls after the first have no effect."""
        self.resize(0)

    def move(self) -> Lease:
        """A lease of the same bytes; this one holds nothing any more."""
        moved = Lease(self._budget, self._account)
        self._budget._post(lambda: self._move(moved))
        return moved

    def follow(self, *arrays: npt.NDArray[Any]) -> None:
        """Hold the bytes of ``arrays``, each until it and all its views are gone.

        Args:
            arrays: They must own their memory, or be the first array over it: views of another
                array do not keep that array's view, but its base.
        """
        self.resize(sum(array.nbytes for array in arrays))
        for array in arrays:
            weakref.finalize(array, self._give_back, array.nbytes).atexit = False

    def count_in_cache(self, cached: bool) -> None:
        """Say whether a cache counts these bytes at present; if so, the media budget does not."""
        self._budget._post(lambda: self._set_cached(cached))

    def _give_back(self, num_bytes: int) -> None:
        self._budget._post(lambda: self._add(-min(num_bytes, self.num_bytes)))

    # --- under the budget's lock ------------------------------------------------------------------

    def _add(self, num_bytes: int) -> None:
        self.num_bytes += num_bytes
        if not self._cached:
            self._count(num_bytes)

    def _move(self, to: Lease) -> None:
        to.num_bytes, self.num_bytes = self.num_bytes, 0

    def _set_cached(self, cached: bool) -> None:
        if cached != self._cached:
            self._cached = cached
            self._count(-self.num_bytes if cached else self.num_bytes)

    def _count(self, num_bytes: int) -> None:
        self._account.held += num_bytes
        self._budget._used += num_bytes
