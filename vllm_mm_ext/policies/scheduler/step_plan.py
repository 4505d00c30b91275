"""What each prompt gets of a step: tokens to compute, items to encode. Pure."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from vllm_mm_ext.policies.scheduler.step_times import StepTimes

# A request's place among all in the order of coming; no two have the same: vLLM's arrival time, in
# seconds, where the server schedules by priority, as vLLM orders equal ones by it; and its number.
Order = tuple[float, int]
# Class, priority, work and order; the lowest goes first.
Rank = tuple[int, int, int, Order]

# Share of a step that prompts get where decoding takes all of the target.
LEAST_SHARE = 0.2
# Share of a step that text may have before aged requests with media, which may be so many under an
# overload of encoder work that text would not be answered any more.
TEXT_SHARE = 0.5
# Share of ``aging_s`` after which a request is aged: later requests no longer pass it.
AGED_AFTER = 0.5


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


class Candidate(NamedTuple):
    """A request without its first token, as one step sees it.

    Attributes:
        key: Its id.
        order: Its place in the order of coming.
        priority: Lower goes first.
        computed: Prompt tokens that need not be computed.
        left: Those that must be.
        items: Items whose encoder output is missing, in the order of the prompt.
        encoder_tokens: Encoder outputs of these.
        media: Its prompt has mm items, encoded or not.
        running: It holds a slot.
        aged: No later request may pass it.
        last: Of late vLLM could not do what it was granted: all others go before it.
        overdraws: The encoder cache takes its first item beyond the cache's size if need be.
    """

    key: str
    order: Order
    priority: int
    computed: int
    left: int
    items: tuple[Item, ...]
    encoder_tokens: int
    media: bool
    running: bool
    aged: bool
    last: bool = False
    overdraws: bool = False

    @property
    def work(self) -> int:
        """Tokens to compute and encode; of a waiting request with encoder work twice as many."""
        return (self.encoder_tokens + self.left) * (2 if self.items and not self.running else 1)

    @property
    def rank(self) -> Rank:
        """Sort key in one step; the lowest goes first.

        Aged requests come first, in the order of their coming, so nobody joins those before one but
        by preemption. The others follow by priority and by what is left to do, to half a power of
        two, so that those about as large go in the order of coming. A waiting request with encoder
        work counts twice: so few that others have passed hold slots.
        """
        if self.last or self.aged:
            return (2 if self.last else 0, 0, 0, self.order)
        return (1, self.priority, (self.work**2).bit_length(), self.order)


@dataclass(frozen=True, slots=True)
class Room:
    """What a step has for prompts.

    Attributes:
        seconds: Its time.
        media_s: The end of it from which on it holds no more of prompts with mm items.
        tokens: Prompt tokens it may compute.
        encoder_tokens: Encoder outputs it may compute, for which the encoder cache has space.
        items: Items it may encode.
        slots: Free slots.
        reserved: Of these, slots that only aged requests and those without encoder work get.
        most_kept: Slots that are kept at most for aged requests whose turn has not come.
        shift: Tokens that a drafter reads ahead of those computed.
        late_s: Seconds by which earlier steps took longer than theirs, for items too large for any.
        prefill_counts: Whether prompt tokens are limited.
        whole: Prompts are computed in one piece, with all their items.
        together: Encoder outputs beyond which items of one placeholder fit no step, and are encoded
            all the same. Infinite if the encoder cache takes nothing beyond its size.
    """

    seconds: float
    media_s: float
    tokens: int
    encoder_tokens: int
    items: int
    slots: int
    reserved: int = 0
    most_kept: int = 1
    shift: int = 0
    late_s: float = 0.0
    prefill_counts: bool = True
    whole: bool = False
    together: float = math.inf


@dataclass(slots=True)
class Grant:
    """What a request may do in a step: compute so many prompt tokens, have items encoded."""

    tokens: int
    items: tuple[Item, ...]


@dataclass(slots=True)
class StepPlan:
    """What a step holds beside decodes.

    Attributes:
        grants: By request; the others wait.
        tokens: Prompt tokens in all.
        encoder_tokens: Encoder outputs in all.
        seconds: What all of it takes.
    """

    grants: dict[str, Grant] = field(default_factory=dict)
    tokens: int = 0
    encoder_tokens: int = 0
    seconds: float = 0.0


def groups(items: Iterable[Item]) -> Iterator[tuple[Item, ...]]:
    """Items that share a placeholder, together: none of its tokens can do without any of them."""
    group: list[Item] = []
    for item in items:
        if group and item.start >= max(one.end for one in group):
            yield tuple(group)
            group = []
        group.append(item)
    if group:
        yield tuple(group)


def step_seconds(target_s: float, base_s: float) -> float:
    """Time of a step for prompts, while something decodes.

    Args:
        target_s: What a step should take.
        base_s: What it takes without prompts.
    """
    return max(target_s - base_s, LEAST_SHARE / (1 - LEAST_SHARE) * base_s)


def plan(candidates: Sequence[Candidate], room: Room, times: StepTimes) -> StepPlan:
    """Give the step out by rank: each gets what it can use before the next one gets any.

    Text has a part of the step even behind aged requests with media.

    Args:
        candidates: By rank.
        room: What there is.
        times: What it costs.
    """
    aged = [one for one in candidates if one.aged]
    owed = 0.0
    if any(one.media for one in aged):
        texts = [one for one in candidates if not one.media and (one.running or room.slots)]
        needed = sum(times.seconds(0, one.left, one.computed) for one in texts)
        owed = min(needed, TEXT_SHARE * room.seconds)
    media_s = min(room.media_s, room.seconds - owed)
    giver = _Giver(room, times, sum(not one.running for one in aged))
    for one in candidates:
        giver.give(one, media_s if one.media else room.seconds)
    return giver.plan


class _Giver:
    def __init__(self, room: Room, times: StepTimes, aged: int) -> None:
        self.plan = StepPlan()
        self._room = room
        self._times = times
        self._slots = room.slots
        # Slots for aged requests that have none yet.
        self._kept = aged
        self._items = 0
        self._digests: set[str] = set()
        # An item found no room: smaller ones behind it do not slip past.
        self._closed = False

    def give(self, one: Candidate, most_s: float) -> None:
        """Grant a request what fits, until the step is as long as this."""
        if not one.running:
            reserved = self._room.reserved if one.items else 0
            kept = 0 if one.aged else max(reserved, min(self._kept, self._room.most_kept))
            if self._slots <= kept or (self._closed and one.items):
                return
        grant = self._fitting(one, most_s - self.plan.seconds)
        if grant is not None:
            self.plan.grants[one.key] = grant
            self._items += len(grant.items)
            self._slots -= not one.running
            self._kept -= one.aged and not one.running

    def _fitting(self, one: Candidate, seconds: float) -> Grant | None:
        """What of a request fits into the time; None: nothing.

        Prefill of what is there comes first. Where that does not fill the step, items are encoded
        as long as they fit, ahead of their prefill too: so encoders are called in few steps.
        """
        times, room, plan = self._times, self._room, self.plan
        start = one.computed
        most = min(room.tokens - plan.tokens, one.left)
        if most <= 0 or seconds <= 0.0:
            return None
        chosen: list[Item] = []
        encoding, reach = 0, start + one.left
        whole = bool(room.whole and one.items and not one.running)
        for group in [one.items] if whole else groups(one.items):
            reach = max(start, group[0].start - room.shift)
            ready = reach - start
            before = times.seconds(0, ready if room.prefill_counts else 0, start)
            if not whole and (ready >= most or (before >= seconds and not chosen)):
                break
            fresh = {i.digest: i.tokens for i in group if i.digest not in self._digests}
            tokens = encoding + sum(fresh.values())
            # A drafter that reads ahead needs it together with those before it.
            first = not self._items and not (chosen and ready)
            over = not ready and (room.together < math.inf if chosen else one.overdraws)
            over |= room.whole or (sum(fresh.values()) > room.together and not self._closed)
            if fresh and not self._encodes(
                tokens, len(fresh) + len(chosen), seconds, first=first, over=first and over
            ):
                self._closed = True
                break
            encoding = tokens
            chosen += group
            self._digests |= fresh.keys()
            reach = start + one.left
        tokens = min(reach - start, most)
        if room.prefill_counts:
            tokens = times.tokens(seconds - times.seconds(encoding, 0), start, tokens)
        if encoding or not plan.grants:
            # vLLM encodes only for a request that computes a token. The first one gets on.
            tokens = max(tokens, min(1, reach - start))
        if tokens <= 0:
            return None
        if one.items and not (one.running or chosen):
            # A slot just to wait for the encoder is worth nothing, unless that is a step away.
            before = times.seconds(0, reach - start, start)
            if whole or (before <= room.media_s and reach - start < room.tokens):
                return None
        plan.tokens += tokens
        plan.encoder_tokens += encoding
        plan.seconds += times.seconds(encoding, tokens, start)
        return Grant(tokens, tuple(chosen))

    def _encodes(self, tokens: int, items: int, seconds: float, *, first: bool, over: bool) -> bool:
        """Whether items of a request, those that it was given in this step included, fit."""
        # What is encoded together may be more than the cache ever holds: then vLLM sees to it.
        room, plan = self._room, self.plan
        many = self._items + items > room.items and not first
        full = self._closed or plan.encoder_tokens + tokens > room.encoder_tokens
        if many or (full and not over):
            return False
        encoding = self._times.seconds(tokens, 0)
        if encoding <= seconds - room.late_s:
            return True
        # What fits no step, or none that holds text, is encoded; later steps make up for it.
        return first and room.late_s <= 0.0 and 2 * encoding > room.media_s
