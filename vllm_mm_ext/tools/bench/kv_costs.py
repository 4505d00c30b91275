"""What finding blocks of a trace saves: prefill, and encoding where no tier holds the output."""

from __future__ import annotations

from collections.abc import Callable

from vllm_mm_ext.policies.kv.pieces import ENCODE_COST, prefill_cost
from vllm_mm_ext.tools.bench.kv_trace import Access, KVTrace


class Costs:
    """Costs of blocks, in prefills of the first token of a prompt.

    The encoder runs on whole items, so it is the last block of an item that saves its encoding.

    Args:
        trace: The trace.
        encoded: Tells of an item's content whether its encoder output is held.
    """

    def __init__(self, trace: KVTrace, encoded: Callable[[int], bool] = lambda _: False) -> None:
        self.block = trace.block
        self._hidden = trace.hidden
        self._encoded = encoded

    def of(self, access: Access, place: int) -> float:
        """Cost that a block of a request saves, if all before it are found too."""
        size = self.block
        cost = prefill_cost(place * size, (place + 1) * size, self._hidden)
        for item in access.items:
            end = item.offset + item.length
            # A request computes the part of an item's last block that follows it anyway.
            if end // size == place + 1 and end > item.offset and not self._encoded(item.content):
                cost += ENCODE_COST * item.length
        return cost

    def saved(self, access: Access, found: int) -> float:
        """Cost that the first blocks of a request save."""
        return sum(self.of(access, place) for place in range(found))
