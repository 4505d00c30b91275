"""Tells which cached media the pool gives up first. Pure.

The pool takes blocks in this order: blocks that hold nothing, then text in LRU order, then kept
items. Of the kept items, those that no live session uses come first and pinned items last; among
equals the item with the lowest score comes first (``eviction.cost_aware``: recency, uses, recompute
cost per block). An item is given up whole, and only after all items that follow it in prompts.
"""

from __future__ import annotations

import random
from collections.abc import Iterable

from vllm_mm_ext.policies.eviction.cost_aware import CostAware
from vllm_mm_ext.policies.eviction.sampled_worst import SampledWorst
from vllm_mm_ext.policies.kv.item_registry import CachedItem
from vllm_mm_ext.policies.kv.sessions import Protection, Sessions


class Retention:
    """The order in which idle items are given up. Every operation takes constant time.

    Args:
        sessions: Conversations, which protect items.
    """

    def __init__(self, sessions: Sessions) -> None:
        self._sessions = sessions
        self._random = random.Random(0)
        self.clear()

    @property
    def idle(self) -> int:
        """Number of items that the pool keeps although no request uses them."""
        return len(self._idle)

    def settle(self, item: CachedItem) -> None:
        """Note that no request uses an item any more."""
        if item.renewed:
            item.renewed = False
            self._scores.admit(item.key, item.size, item.cost)
        self._settled += 1
        self._idle[item.number] = self._settled
        self.reconsider(item)

    def busy(self, item: CachedItem) -> None:
        """Note that a request uses an item, which then cannot be given up."""
        self._idle.pop(item.number, None)
        self.reconsider(item)

    def reconsider(self, item: CachedItem) -> None:
        """Place an item anew, as the items after it or its protection may have changed."""
        self._withdraw(item)
        if item.number in self._idle and not item.children:
            protection = self._sessions.protection(item.number)
            self._protection[item.number] = protection
            self._candidates[protection].add(item)

    def victim(self) -> CachedItem | None:
        """The item to give up next; None if all are in use. The item stays until ``give_up``."""
        for candidates in self._candidates.values():
            if len(candidates):
                return candidates.worst()
        return None

    def give_up(self, item: CachedItem) -> None:
        """Drop an item that is given up; its uses stay known in case the item comes back."""
        self._idle.pop(item.number, None)
        self._withdraw(item)
        if item.key in self._scores:
            self._scores.evict(item.key)

    def clear(self) -> None:
        """Forget all items and their scores."""
        self._scores: CostAware[bytes] = CostAware()
        # By number of each idle item, how many items had become idle by then.
        self._idle: dict[int, int] = {}
        self._settled = 0
        # Idle items that no kept item follows, by protection.
        self._candidates = {
            protection: SampledWorst(self._rank, self._random) for protection in Protection
        }
        self._protection: dict[int, Protection] = {}

    def check_integrity(self, items: Iterable[CachedItem]) -> None:
        """Raise ``AssertionError`` unless exactly the items that may go are candidates."""
        idle = {item.number: item for item in items if item.blocks and item.idle}
        assert idle.keys() == self._idle.keys()
        leaves = {number for number, item in idle.items() if not item.children}
        assert leaves == self._protection.keys()
        for number in leaves:
            protection = self._sessions.protection(number)
            assert self._protection[number] == protection
            assert idle[number] in self._candidates[protection]
        assert sum(len(some) for some in self._candidates.values()) == len(leaves)
        for candidates in self._candidates.values():
            candidates.check_integrity()
        self._scores.check_integrity()

    def _withdraw(self, item: CachedItem) -> None:
        protection = self._protection.pop(item.number, None)
        if protection is not None:
            self._candidates[protection].remove(item)

    def _rank(self, item: CachedItem) -> tuple[float, int]:
        # Of equal items the longest idle one goes first: of the segments of a video the last one.
        return self._scores.score(item.key), self._idle[item.number]
