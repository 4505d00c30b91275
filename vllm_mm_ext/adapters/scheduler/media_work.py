"""The encoder work that requests still need, read from vLLM's scheduler."""

from __future__ import annotations

from bisect import bisect_right
from collections import deque
from dataclasses import dataclass
from typing import Any, NamedTuple

from vllm.v1.request import RequestStatus

from vllm_mm_ext.policies.scheduler.step_plan import Item

# Seconds for which a look at a waiting request's caches stands: it takes time in proportion to the
# length of the prompt.
_FRESH_S = 0.25
# Steps whose changes of the encoder cache are remembered. Who was not looked at for longer is read
# anew.
_STEPS = 16


class _Media(NamedTuple):
    """Items of a request, where each placeholder ends, and what each is known by."""

    items: tuple[Item, ...]
    ends: tuple[int, ...]
    digests: tuple[str, ...]


class Need(NamedTuple):
    """What a request need not compute, and what it needs.

    Attributes:
        computed: Tokens that are computed, or found in the prefix cache.
        items: Items that must be encoded before the tokens after these can be.
        tokens: Encoder outputs of these.
    """

    computed: int
    items: tuple[Item, ...] = ()
    tokens: int = 0


@dataclass(slots=True)
class _Look:
    """What was found for a waiting request, of which items, when and in which step."""

    need: Need
    media: _Media
    at: float
    step: int


class MediaWork:
    """Encoder work by request.

    Args:
        scheduler: vLLM's scheduler, with its caches built.
    """

    def __init__(self, scheduler: Any) -> None:
        self._scheduler = scheduler
        self._media: dict[str, _Media] = {}
        self._looks: dict[str, _Look] = {}
        self._step = 0
        self._changes: deque[frozenset[str]] = deque(maxlen=_STEPS)

    def forget(self, request_id: str) -> None:
        """The request is no more."""
        self._media.pop(request_id, None)
        self._looks.pop(request_id, None)

    def look_again(self, request: Any) -> None:
        """What was found for a waiting request no longer stands."""
        self._looks.pop(request.request_id, None)

    def note(self, output: Any) -> None:
        """Learn from a scheduled step which items the encoder cache gets and which it gives up."""
        requests = self._scheduler.requests
        changed = {
            requests[key].mm_features[index].identifier
            for key, indices in output.scheduled_encoder_inputs.items()
            for index in indices
        }
        self._changes.append(frozenset(changed.union(output.free_encoder_mm_hashes)))
        self._step += 1

    def total(self, request: Any) -> int:
        """Encoder outputs of all items of a request."""
        return sum(item.tokens for item in self._media_of(request).items)

    def items(self, request: Any, computed: int) -> tuple[Item, ...]:
        """Items of a request that so many computed tokens do not cover."""
        media = self._media_of(request)
        return media.items[bisect_right(media.ends, computed) :]

    def need(self, request: Any, now: float) -> Need:
        """What a request needs.

        For one that waits, other than by its own scheduling, this may be as old as ``_FRESH_S``
        where it depends on the prefix cache or an EC connector.
        """
        media = self._media_of(request)
        if request.num_computed_tokens or request.status == RequestStatus.RUNNING:
            computed = int(request.num_computed_tokens)
            return self._read(request, media, computed)
        look = self._looks.get(request.request_id)
        if look is None or now - look.at >= _FRESH_S or look.media is not media:
            computed = self._found(request)
            look = _Look(self._read(request, media, computed), media, now, self._step)
            self._looks[request.request_id] = look
        elif self._changed_since(look):
            look.need = self._read(request, media, look.need.computed)
        look.step = self._step
        return look.need

    def from_elsewhere(self, request: Any, start: int, end: int) -> int:
        """Tokens of items between two positions that an EC connector has: they cost no compute."""
        if self._scheduler.ec_connector is None:
            return 0
        items = self.items(request, start)
        return sum(item.tokens for item in items if item.start < end and self._elsewhere(item))

    def in_transit(self, request: Any, now: float) -> bool:
        """Whether a connector still fetches, or looks for, what a waiting request needs.

        Like vLLM's scheduler this asks the connectors, which note by that what arrived.
        """
        if self._scheduler.connector is not None and _prefilled_elsewhere(request):
            return False
        computed = self.need(request, now).computed
        connector = self._scheduler.connector
        if connector is not None and not request.num_computed_tokens:
            # Connectors are asked from whole blocks on; a hit may end within one.
            whole = computed - computed % self._scheduler.block_size
            found, _ = connector.get_num_new_matched_tokens(request, whole)
            if found is None:
                return True
            computed = max(computed, whole + found)
        return bool(self._scheduler._ec_transfer_pending(request, computed))

    def _read(self, request: Any, media: _Media, computed: int) -> Need:
        cached = self._scheduler.encoder_cache_manager.get_cached_num_encoder_embeds
        items = media.items[bisect_right(media.ends, computed) :]
        missing = [i for i in items if i.tokens and cached(request, i.index) is None]
        if self._scheduler.ec_connector is not None:
            missing = [item for item in missing if not self._elsewhere(item)]
        return Need(computed, tuple(missing), sum(item.tokens for item in missing))

    def _changed_since(self, look: _Look) -> bool:
        steps = self._step - look.step
        if steps > _STEPS:
            return True
        for ago in range(1, steps + 1):
            changed = self._changes[-ago]
            if changed and not changed.isdisjoint(look.media.digests):
                return True
        return False

    def _elsewhere(self, item: Item) -> bool:
        connector = self._scheduler.ec_connector
        return connector is not None and bool(connector.has_cache_item(item.digest))

    def _found(self, request: Any) -> int:
        """Tokens that need not be computed: they are in the prefix cache, or another node has them.

        The prefix cache is asked past ``get_computed_blocks``, which counts and reports its hits.
        """
        if self._scheduler.connector is not None and _prefilled_elsewhere(request):
            return int(request.num_tokens)
        manager = self._scheduler.kv_cache_manager
        if not manager.prefix_cache_lookup_enabled(request):
            return 0
        # The last token is always computed.
        _, found, *_ = manager.coordinator.find_longest_cache_hit(
            request.block_hashes, request.num_tokens - 1
        )
        return int(found)

    def _media_of(self, request: Any) -> _Media:
        media = self._media.get(request.request_id)
        # A streaming session grows.
        if media is None or len(media.items) != len(request.mm_features):
            media = _media(request)
            self._media[request.request_id] = media
        return media


def _prefilled_elsewhere(request: Any) -> bool:
    """Whether another node computes the prompt's KV, as vLLM's own scheduler tells.

    A connector takes the mark away once the transfer has begun.
    """
    params = request.kv_transfer_params
    return bool(params and params.get("do_remote_prefill"))


def _media(request: Any) -> _Media:
    items, ends, reached = [], [], 0
    for index, feature in enumerate(request.mm_features):
        position = feature.mm_position
        end = position.offset + position.length
        items.append(
            Item(index, position.get_num_embeds(), feature.identifier, position.offset, end)
        )
        # Sound within a video shares its placeholder, so ends need not ascend by themselves.
        reached = max(reached, end)
        ends.append(reached)
    return _Media(tuple(items), tuple(ends), tuple(item.digest for item in items))
