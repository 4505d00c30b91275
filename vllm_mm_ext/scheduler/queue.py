"""The waiting queue as vLLM wants it, in an order that is made anew before each step."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from vllm.v1.core.sched.request_queue import FCFSRequestQueue


class ArrangedQueue(FCFSRequestQueue):  # type: ignore[misc]
    """First come, first served until ``arrange`` says otherwise."""

    def arrange(self, requests: Iterable[Any]) -> None:
        """Put its requests into this order.

        Args:
            requests: All that are in the queue.
        """
        arranged = list(requests)
        self.clear()
        self.extend(arranged)
