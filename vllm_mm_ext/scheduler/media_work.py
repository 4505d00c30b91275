"""The encoder work that requests still need, read from vLLM's scheduler."""

from __future__ import annotations

from bisect import bisect_right
from typing import Any, NamedTuple

from vllm.v1.request import RequestStatus

from vllm_mm_ext.scheduler.encoder_plan import Item

# Seconds for which a prefix-cache lookup for a waiting request stands: it takes time in proportion
# to the length of the prefix.
_FRESH_S = 0.25


class _Media(NamedTuple):
    """Items of a request, and where each placeholder ends."""

    items: tuple[Item, ...]
    ends: tuple[int, ...]


class _Hit(NamedTuple):
    """Tokens found in the prefix cache, and when that was asked."""

    computed: int
    asked: float


class MediaWork:
    """Encoder work by request.

    Args:
        scheduler: vLLM's scheduler, with its caches built.
    """

    def __init__(self, scheduler: Any) -> None:
        self._scheduler = scheduler
        self._media: dict[str, _Media] = {}
        self._hits: dict[str, _Hit] = {}

    def forget(self, request_id: str) -> None:
        """The request is no more."""
        self._media.pop(request_id, None)
        self._hits.pop(request_id, None)

    def missing(self, request: Any, computed: int) -> tuple[Item, ...]:
        """Items that must be encoded before tokens from ``computed`` on can be."""
        media = self._media_of(request)
        manager = self._scheduler.encoder_cache_manager
        return tuple(
            item
            for item in media.items[bisect_right(media.ends, computed) :]
            if item.tokens
            and manager.get_cached_num_encoder_embeds(request, item.index) is None
            and not self._elsewhere(item)
        )

    def from_elsewhere(self, request: Any, computed: int) -> int:
        """Tokens of items from ``computed`` on that an EC connector has; they cost no compute."""
        if self._scheduler.ec_connector is None:
            return 0
        media = self._media_of(request)
        items = media.items[bisect_right(media.ends, computed) :]
        return sum(item.tokens for item in items if self._elsewhere(item))

    def _elsewhere(self, item: Item) -> bool:
        connector = self._scheduler.ec_connector
        return connector is not None and bool(connector.has_cache_item(item.digest))

    def computed(self, request: Any, now: float) -> int:
        """Tokens that a request need not compute: done, or lately found in the prefix cache."""
        if request.num_computed_tokens or request.status == RequestStatus.RUNNING:
            return int(request.num_computed_tokens)
        hit = self._hits.get(request.request_id)
        if hit is None or now - hit.asked >= _FRESH_S:
            _, computed, *_ = self._scheduler.kv_cache_manager.get_computed_blocks(request)
            hit = self._hits[request.request_id] = _Hit(computed, now)
        return hit.computed

    def _media_of(self, request: Any) -> _Media:
        media = self._media.get(request.request_id)
        # A streaming session grows.
        if media is None or len(media.items) != len(request.mm_features):
            media = _read(request)
            self._media[request.request_id] = media
        return media


def _read(request: Any) -> _Media:
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
    return _Media(tuple(items), tuple(ends))
