"""Which items the encoder takes on in a step. Pure."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple


@dataclass(frozen=True, slots=True)
class Item:
    """An mm item whose encoder output is missing.

    Attributes:
        index: Its place among the items of the request.
        tokens: Encoder outputs it makes.
        digest: Items of equal digest are encoded once.
        start: Where its placeholder begins in the prompt.
        end: Where it ends.
    """

    index: int
    tokens: int
    digest: str
    start: int
    end: int


class EncoderDemand(NamedTuple):
    """A request with encoder work.

    Attributes:
        key: Its id.
        items: What it still needs, in the order of the prompt.
        tokens: Encoder outputs of all of them.
        reach: End of the tokens that its prefill could get to in this step.
        running: It holds a slot.
        aged: It has waited so long that no later request may pass it.
        failed: It was given encoder work before, and could not be let in.
        priority: Lower goes first.
    """

    key: str
    items: tuple[Item, ...]
    tokens: int
    reach: int
    running: bool
    aged: bool = False
    failed: bool = False
    priority: int = 0


def groups(items: Iterable[Item]) -> list[tuple[Item, ...]]:
    """Items that share a placeholder, together: none of its tokens can do without any of them."""
    found: list[list[Item]] = []
    end = -1
    for item in items:
        if item.start < end:
            found[-1].append(item)
        else:
            found.append([item])
        end = max(end, item.end)
    return [tuple(group) for group in found]


@dataclass(frozen=True, slots=True)
class EncoderCapacity:
    """What a step has for encoder work.

    Attributes:
        tokens: Encoder outputs it may compute.
        items: Items it may encode.
        cache_tokens: Space in the encoder cache, counting what can be evicted.
        slots: Free slots.
        reserved: Of these, slots that only aged requests and those without encoder work get.
        lookahead: Items (those of one placeholder count once) per request that the step may encode
            ahead of its prefill.
    """

    tokens: int
    items: int
    cache_tokens: int
    slots: int
    reserved: int
    lookahead: int


@dataclass
class EncoderPlan:
    """What is to be encoded.

    Attributes:
        items: By request, the items it may have encoded; a request without any waits.
        tokens: Encoder outputs in all.
    """

    items: dict[str, tuple[Item, ...]] = field(default_factory=dict)
    tokens: int = 0


def serving_order(demands: Sequence[EncoderDemand]) -> list[EncoderDemand]:
    """Put waiting requests behind half-encoded ones unless they need at most half as much.

    A running request whose encoder work stands still holds a slot for nothing. With this rule each
    that passes it needs at most half of what it needs, so at most log2 of the longest video (in
    tokens) over the shortest hold one, whatever comes. Promoted requests are not put behind, nor is
    any behind requests of lower priority; with priorities the bound is per priority. Those that
    could not be let in always are: what they lack may be in the hands of half-encoded ones. No
    other waiting request passes a aged one for that.

    Args:
        demands: By rank.
    """
    least: dict[int, int] = {}
    for demand in demands:
        if demand.running:
            known = least.get(demand.priority, demand.tokens)
            least[demand.priority] = min(known, demand.tokens)
    if not least:
        return list(demands)

    def behind(demand: EncoderDemand) -> bool:
        if demand.running:
            return False
        most = min((n for level, n in least.items() if level <= demand.priority), default=math.inf)
        return demand.failed or not (demand.aged or 2 * demand.tokens <= most)

    late, passed_over = set(), False
    for demand in demands:
        if behind(demand) or (passed_over and not demand.running):
            late.add(demand.key)
            passed_over |= demand.aged
    # sorted is stable: ranks are kept within both groups.
    return sorted(demands, key=lambda demand: demand.key in late)


def first_served(
    demands: Sequence[EncoderDemand], slots: int, reserved: int
) -> EncoderDemand | None:
    """The request that a plan serves first, None if there is nothing for it.

    Args:
        demands: By rank.
        slots: Free slots.
        reserved: Of these, slots that waiting requests get only once aged.
    """
    for demand in serving_order(demands):
        has_slot = demand.running or slots > (0 if demand.aged else reserved)
        if demand.items and has_slot:
            return demand
    return None


def plan(demands: Sequence[EncoderDemand], capacity: EncoderCapacity) -> EncoderPlan:
    """Give out a step's encoder work in the order of rank.

    Each gets what its prefill gets to in this step and what lies ahead of that, before the next one
    gets any. The first item that does not fit ends it: smaller ones behind it do not slip past. A
    waiting request counts only if it gets its first item; without one it would take a slot just to
    wait.

    Args:
        demands: By rank.
        capacity: What the step has.
    """
    order = serving_order(demands)
    giver = _Giver(capacity)
    for demand in order:
        if not (giver.needed(demand) and giver.ahead(demand)):
            break
    return giver.plan


class _Giver:
    def __init__(self, capacity: EncoderCapacity) -> None:
        self.plan = EncoderPlan()
        self._capacity = capacity
        self._tokens = min(capacity.tokens, capacity.cache_tokens)
        self._items = capacity.items
        self._slots = capacity.slots
        self._digests: set[str] = set()

    def needed(self, demand: EncoderDemand) -> bool:
        """Give what the request's prefill gets to; False if something did not fit."""
        if not demand.items:
            return True
        if not demand.running and self._slots <= (0 if demand.aged else self._capacity.reserved):
            # Running requests behind it need no slot.
            return True
        wanted = groups(item for item in demand.items if item.start < demand.reach)
        if not demand.running:
            wanted = wanted or groups(demand.items)[:1]
        given = self._give(demand.key, wanted)
        if given and not demand.running:
            self._slots -= 1
        return given == len(wanted)

    def ahead(self, demand: EncoderDemand) -> bool:
        """Give what comes next; False if something did not fit."""
        given = self.plan.items.get(demand.key, ())
        if not given and not demand.running:
            return True
        taken = {item.index for item in given}
        ahead = (i for i in demand.items if i.start >= demand.reach and i.index not in taken)
        wanted = groups(ahead)[: self._capacity.lookahead]
        return self._give(demand.key, wanted) == len(wanted)

    def _give(self, key: str, wanted: Iterable[tuple[Item, ...]]) -> int:
        """Give as many groups as fit; a group of many items fits if it is the first."""
        count = 0
        for group in wanted:
            fresh = {i.digest: i.tokens for i in group if i.digest not in self._digests}
            tokens = sum(fresh.values())
            full = len(fresh) > self._items and self._items < self._capacity.items
            if fresh and (tokens > self._tokens or full or not self._items):
                break
            self._items = max(0, self._items - len(fresh))
            self._tokens -= tokens
            self.plan.tokens += tokens
            self._digests |= fresh.keys()
            self.plan.items[key] = (*self.plan.items.get(key, ()), *group)
            count += 1
        return count
