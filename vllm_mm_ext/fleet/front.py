"""The front-end of a simulated server: decode workers, one thread each for the rest, a cache."""

from __future__ import annotations

import heapq
from collections import OrderedDict

from vllm_mm_ext.fleet.shapes import MediumCosts
from vllm_mm_ext.planner.rates import HostCosts


class Front:
    """What a request waits for before the engine has it.

    All work is done in the order of coming, so the end of a piece of work is known when it comes.

    Args:
        costs: What work costs.
        workers: Decodes at a time.
        decoded_bytes: Decoded media that are kept, those used last.

    Attributes:
        decodes: Media decoded so far.
    """

    def __init__(self, costs: HostCosts, workers: int, decoded_bytes: int) -> None:
        self._costs = costs
        self._free = [0.0] * workers
        self._main = self._preprocessing = 0.0
        self._capacity, self._held = decoded_bytes, 0
        # When each medium is (or was) ready, and its bytes.
        self._ready: OrderedDict[int, tuple[float, int]] = OrderedDict()
        self.decodes = 0

    def request(self, now: float) -> float:
        """Read a request; returns when that is done."""
        self._main = max(self._main, now) + self._costs.request
        return self._main

    def medium(self, now: float, media: int, costs: MediumCosts) -> float:
        """Have a medium of a request ready, decoded once however many ask for it.

        Args:
            now: When the request was read.
            media: Which one.
            costs: What it costs.

        Returns:
            When it is ready for the engine.
        """
        known = self._ready.get(media)
        if known is not None:
            self._ready.move_to_end(media)
            return max(now + costs.again_s, known[0])
        self.decodes += 1
        begins = max(now, self._free[0])
        decoded = begins + costs.decode_s
        heapq.heapreplace(self._free, decoded)
        self._preprocessing = max(self._preprocessing, decoded) + costs.preprocess_s
        ready = self._preprocessing + costs.main_s
        self._keep(media, ready, costs.decoded_bytes)
        return ready

    def _keep(self, media: int, ready: float, num_bytes: int) -> None:
        self._ready[media] = ready, num_bytes
        self._held += num_bytes
        # What is too large to be kept is shared only by those that ask while it is the last.
        while self._held > self._capacity and len(self._ready) > 1:
            _, (_, freed) = self._ready.popitem(last=False)
            self._held -= freed
