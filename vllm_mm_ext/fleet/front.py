"""The front-end of a simulated server: decode workers, one thread each for the rest, a cache."""

from __future__ import annotations

import heapq
from collections import OrderedDict

from vllm_mm_ext.fleet.shapes import MediumCosts
from vllm_mm_ext.fleet.shared_cores import SharedCores
from vllm_mm_ext.planner.rates import HostCosts


class Front:
    """What a request waits for before the engine has it.

    All work is done in the order of coming, so the end of a piece of work is known when it comes.

    Args:
        costs: What work costs.
        workers: Decodes at a time.
        decoded_bytes: Decoded media that are kept, those used last.
        cores: The server's, on whose clock all times here are.

    Attributes:
        decodes: Media decoded so far.
    """

    def __init__(
        self, costs: HostCosts, workers: int, decoded_bytes: int, cores: SharedCores
    ) -> None:
        self._costs, self._cores = costs, cores
        self._free = [0.0] * workers
        self._main = self._preprocessing = 0.0
        self._capacity, self._held = decoded_bytes, 0
        # When each medium is (or was) ready, and its bytes.
        self._ready: OrderedDict[int, tuple[float, int]] = OrderedDict()
        self.decodes = 0

    def request(self, now: float) -> float:
        """Read a request; returns when that is done."""
        return self._on_main(now, self._costs.request)

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
            return max(self._on_main(now, costs.again_s), known[0])
        self.decodes += 1
        begins = max(now, self._free[0])
        decoded = begins + costs.decode_s
        heapq.heapreplace(self._free, decoded)
        self._cores.work(begins, decoded, self._costs.decode_threads)
        begins = max(self._preprocessing, decoded)
        self._preprocessing = begins + costs.preprocess_s
        ready = self._preprocessing + costs.main_s
        self._cores.work(begins, ready)
        self._keep(media, ready, costs.decoded_bytes)
        return ready

    def _on_main(self, now: float, seconds: float) -> float:
        """Have the main thread do something; returns when that is done."""
        begins = max(self._main, now)
        self._main = begins + seconds
        self._cores.work(begins, self._main)
        return self._main

    def _keep(self, media: int, ready: float, num_bytes: int) -> None:
        self._ready[media] = ready, num_bytes
        self._held += num_bytes
        # What is too large to be kept is shared only by those that ask while it is the last.
        while self._held > self._capacity and len(self._ready) > 1:
            _, (_, freed) = self._ready.popitem(last=False)
            self._held -= freed
