"""What requests without their first token still need, read from vLLM's scheduler."""

from __future__ import annotations

from bisect import bisect_right
from itertools import accumulate
from typing import Any, NamedTuple

from vllm.v1.core.sched.request_queue import SchedulingPolicy
from vllm.v1.request import RequestStatus

from vllm_mm_ext.adapters.encoder_cache.never_served import is_prefilled_elsewhere
from vllm_mm_ext.policies.scheduler.step_plan import AGED_AFTER, Candidate, Item, Order, Rank

# Seconds for which a look at a waiting request's caches stands: it takes time in proportion to the
# length of the prompt.
_FRESH_S = 0.25


class Arrival(NamedTuple):
    """When a request came, in seconds on the scheduler's clock, and its place in that order.

    One that ``stays`` is computed here, whatever its client said of another node.
    """

    since: float
    order: Order
    stays: bool = False


class Need(NamedTuple):
    """What a request need not compute, and what it needs.

    Attributes:
        computed: Tokens that are computed, or found in the prefix cache.
        items: Items that must be encoded before the tokens after these can be.
        tokens: Encoder outputs of these.
        until: Where the first item begins that another instance is encoding: nothing from there on
            can be done yet. None without one.
    """

    computed: int
    items: tuple[Item, ...] = ()
    tokens: int = 0
    until: int | None = None


class Prompts:
    """Who came when and needs what.

    Args:
        scheduler: vLLM's scheduler, with its caches built.
        aging_s: The setting.
        plans_encoder: Encoder work is planned.

    Attributes:
        arrivals: Of all requests, by id.
        backlog: Encoder outputs that requests need, as far as each was last looked at.
    """

    def __init__(self, scheduler: Any, *, aging_s: float, plans_encoder: bool) -> None:
        self.arrivals: dict[str, Arrival] = {}
        self.backlog = 0
        self._scheduler = scheduler
        self._aged_after_s = AGED_AFTER * aging_s
        self._plans_encoder = plans_encoder
        self._by_priority = scheduler.policy == SchedulingPolicy.PRIORITY
        self._came = 0
        # Whether an item is being encoded by another instance; of the plugin's EC connector.
        self._awaits = getattr(scheduler.ec_connector, "awaits", None)
        # Items of each request, and where each placeholder ends.
        self._media: dict[str, tuple[tuple[Item, ...], list[int]]] = {}
        # What was found for waiting requests, and when.
        self._looks: dict[str, tuple[Need, float]] = {}
        self._encodes: dict[str, int] = {}

    # --- the order of coming ----------------------------------------------------------------------

    def came(self, request: Any, arrival_time: float) -> None:
        """A request has come, by vLLM's account then, or a session goes on, which counts as one."""
        self._came += 1
        order = (arrival_time if self._by_priority else 0.0, self._came)
        self.arrivals[request.request_id] = Arrival(self._scheduler._clock(), order)

    def order(self, request: Any) -> Order:
        """A request's place in the order of coming."""
        return self.arrivals[request.request_id].order

    def is_aged(self, request: Any, now: float) -> bool:
        """Whether no later request may pass it."""
        waited = now - self.arrivals[request.request_id].since
        return request.status == RequestStatus.PREEMPTED or waited >= self._aged_after_s

    def forget(self, key: str) -> None:
        """The request is no more."""
        self.arrivals.pop(key, None)
        self._media.pop(key, None)
        self._looks.pop(key, None)
        self.backlog -= self._encodes.pop(key, 0)

    # --- what they need ---------------------------------------------------------------------------

    def first_rank(self, request: Any) -> Rank:
        """The rank of a request that begins to wait."""
        one = self.read(request, self._scheduler._clock())
        return one._replace(aged=request.status == RequestStatus.PREEMPTED).rank

    def read(self, request: Any, now: float, *, last: bool = False) -> Candidate:
        """A request as it is now.

        Args:
            request: vLLM's request.
            now: On the scheduler's clock.
            last: Of late vLLM could not do what it was granted.
        """
        key, need = request.request_id, self.need(request, now)
        left = max(1, request.num_tokens - need.computed)
        overdraws = getattr(self._scheduler.encoder_cache_manager, "overdraws", None)
        return Candidate(
            key,
            self.arrivals[key].order,
            int(request.priority) if self._by_priority else 0,
            need.computed,
            left if need.until is None else need.until - need.computed,
            need.items,
            need.tokens,
            bool(request.mm_features),
            request.status == RequestStatus.RUNNING,
            self.is_aged(request, now),
            last,
            bool(need.items and overdraws and overdraws(request, need.items[0].index)),
        )

    def need(self, request: Any, now: float) -> Need:
        """What a request needs; where encoder work is not planned, and for text, no encoder.

        What a waiting one needs may be as old as ``_FRESH_S``.
        """
        key, computed = request.request_id, int(request.num_computed_tokens)
        if not self._plans_encoder or not request.has_encoder_inputs:
            return Need(computed)
        if computed or request.status == RequestStatus.RUNNING:
            need = self._read(request, computed)
        else:
            look = self._looks.get(key)
            if look is None or now - look[1] >= _FRESH_S:
                look = self._looks[key] = self._read(request, self._found(request)), now
            need = look[0]
            if need.until is not None:
                # What is awaited comes at any time. Until the first of it is there, the request
                # holds no slot.
                need = self._read(request, need.computed)
                items = self.items(request, need.computed)
                if need.until is not None and need.until <= items[0].start:
                    need = need._replace(until=need.computed)
        self.encodes(key, need.tokens)
        return need

    def look_again(self, request: Any) -> None:
        """What was found for a waiting request no longer stands, nor what its client said of it."""
        key = request.request_id
        self._looks.pop(key, None)
        self.arrivals[key] = self.arrivals[key]._replace(stays=True)

    def encodes(self, key: str, tokens: int) -> None:
        """A request needs so many encoder outputs from now on."""
        self.backlog += tokens - self._encodes.get(key, 0)
        self._encodes[key] = tokens

    def items(self, request: Any, computed: int) -> tuple[Item, ...]:
        """Items of a request that so many computed tokens do not cover."""
        key, features = request.request_id, request.mm_features
        items, ends = self._media.get(key, ((), []))
        # A streaming session grows.
        if len(items) != len(features):
            items, ends = self._media[key] = _items(features)
            self._looks.pop(key, None)
        return items[bisect_right(ends, computed) :]

    def is_there(self, request: Any, item: Item) -> bool:
        """Whether an item need not be encoded: it is cached, or an EC connector has it."""
        cached = self._scheduler.encoder_cache_manager.get_cached_num_encoder_embeds
        if not item.tokens or cached(request, item.index) is not None:
            return True
        connector = self._scheduler.ec_connector
        has = getattr(connector, "seems_there", None) or getattr(connector, "has_cache_item", None)
        return has is not None and bool(has(item.digest))

    def _read(self, request: Any, computed: int) -> Need:
        missing: list[Item] = []
        until = None
        for item in self.items(request, computed):
            if self.is_there(request, item):
                continue
            if self._awaits is not None and self._awaits(request, item.index):
                until = max(item.start, computed)
                break
            missing.append(item)
        return Need(computed, tuple(missing), sum(item.tokens for item in missing), until)

    def _found(self, request: Any) -> int:
        """Tokens that need not be computed: they are in the prefix cache, or another node has them.

        The prefix cache is asked past ``get_computed_blocks``, which counts and reports its hits.
        """
        stays = self.arrivals[request.request_id].stays
        if not stays and is_prefilled_elsewhere(self._scheduler, request):
            return int(request.num_tokens)
        manager = self._scheduler.kv_cache_manager
        if not manager.prefix_cache_lookup_enabled(request):
            return 0
        # The last token is always computed.
        _, found, *_ = manager.coordinator.find_longest_cache_hit(
            request.block_hashes, request.num_tokens - 1
        )
        return int(found)


def _items(features: list[Any]) -> tuple[tuple[Item, ...], list[int]]:
    items = []
    for index, feature in enumerate(features):
        place = feature.mm_position
        end = place.offset + place.length
        items.append(Item(index, place.get_num_embeds(), feature.identifier, place.offset, end))
    # Sound within a video shares its placeholder, so ends need not ascend by themselves.
    return tuple(items), list(accumulate((item.end for item in items), max))


def decode_tokens(request: Any) -> int:
    """Tokens a decoding request takes in a step, drafts included."""
    ahead = request.num_tokens_with_spec + request.num_output_placeholders
    return max(0, int(ahead - request.num_computed_tokens))
