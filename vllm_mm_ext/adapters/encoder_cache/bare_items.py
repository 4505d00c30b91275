"""Mm items in the engine that came without what the encoder takes (``recorded_items``).

Nothing here can encode a *bare* item, so a request may use one only while the item's output cannot
be lost: the store's file is pinned for as long as the request lives. A bare item whose output does
not come ends its request, before the request has a token, and the API server sends the request
again with whole items.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Final

from vllm_mm_ext.adapters.patches import wrap

if TYPE_CHECKING:
    from vllm.v1.request import Request

    from vllm_mm_ext.fleet.output_store import OutputStore

BARE: Final = "mm_ext_bare"
"""Field of a bare item: how many values were left out."""


def is_bare(feature: Any) -> bool:
    """Whether an mm feature of vLLM's came without what the encoder takes."""
    return feature.data is not None and BARE in feature.data


def install() -> None:
    """Keep bare items out of the engine's half of the processor cache. Idempotent."""
    from vllm.multimodal.cache.base import BaseMultiModalReceiverCache

    wrap(BaseMultiModalReceiverCache, "get_and_update_features", _without_bare)


def _without_bare(original: Callable[..., Any]) -> Callable[..., Any]:
    def get_and_update_features(self: Any, mm_features: list[Any]) -> list[Any]:
        # vLLM's code changes the features themselves.
        original(self, [feature for feature in mm_features if not is_bare(feature)])
        return mm_features

    return get_and_update_features


class Bare:
    """The bare items of the requests of one engine.

    Args:
        files: The shared store.
        expects: Whether more may come of what an encoder was asked for a request; called with the
            request and the place of an item.
        here: Whether an output is in a tier of this engine.
    """

    def __init__(
        self,
        files: OutputStore,
        expects: Callable[[Request, int], bool],
        here: Callable[[str], bool],
    ) -> None:
        self._files = files
        self._expects = expects
        self._here = here
        # By request, the places of bare items that are not secured, and pins.
        self._left: dict[str, list[int]] = {}
        self._pins: dict[str, list[str]] = {}
        self._unavailable: set[str] = set()

    def is_secured(self, request: Request, index: int) -> bool:
        """Whether an item's output cannot be lost while the request lives, or can be made again."""
        left = self._left_of(request)
        if index not in left:
            return True
        key = request.mm_features[index].identifier
        if not self._files.pin(key):
            return False
        left.remove(index)
        self._pins[request.request_id].append(key)
        return True

    def awaits(self, request: Request, index: int) -> bool | None:
        """Whether a request must wait for an item; None for one that can be encoded here."""
        if not is_bare(request.mm_features[index]):
            return None
        if self.is_secured(request, index):
            key = request.mm_features[index].identifier
            # A takedown removes pinned files as well.
            if self._files.hold(key) or self._here(key):
                return False
            self._unavailable.add(request.request_id)
        elif not self._expects(request, index):
            self._unavailable.add(request.request_id)
        return True

    def holds_up(self, request: Request, num_computed_tokens: int) -> bool:
        """Whether a request must wait for items that it would otherwise pass over unseen.

        These are bare items whose KV is there, and those in a tier of this engine: what is there
        now may be gone when the request is preempted.
        """
        for index in list(self._left_of(request)):
            feature = request.mm_features[index]
            end = feature.mm_position.offset + feature.mm_position.length
            passed = end <= num_computed_tokens or self._here(feature.identifier)
            if passed and self.awaits(request, index):
                return True
        return False

    def take_unavailable(self) -> set[str]:
        """Requests whose items do not come."""
        found, self._unavailable = self._unavailable, set()
        return found

    def forget(self, request_id: str) -> None:
        """Note that a request has ended."""
        self._left.pop(request_id, None)
        self._unavailable.discard(request_id)
        for key in self._pins.pop(request_id, ()):
            self._files.unpin(key)

    def _left_of(self, request: Request) -> list[int]:
        key = request.request_id
        if key not in self._left:
            self._left[key] = [
                index for index, one in enumerate(request.mm_features) if is_bare(one)
            ]
            self._pins[key] = []
        return self._left[key]
