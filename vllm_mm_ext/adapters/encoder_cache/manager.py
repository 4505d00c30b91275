"""vLLM's interface to the device tier of the encoder cache.

``--ec-manager-config`` names this manager. The manager lives in the scheduler. The worker holds the
tensors, and drops those that ``get_freed_mm_hashes`` names.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable
from typing import TYPE_CHECKING, Any, Protocol

from vllm.v1.core.encoder_cache_manager import EncoderCacheManager, EncoderDecoderCacheManager
from vllm.v1.request import RequestStatus

from vllm_mm_ext.adapters.encoder_cache.mm_features import (
    PROMPT_EMBEDS,
    feature_cost,
    output_bytes,
    sharing,
)
from vllm_mm_ext.adapters.names.encoder_cache_names import DEVICE_TIER_NAMES
from vllm_mm_ext.adapters.names.names_check import problem
from vllm_mm_ext.adapters.patches import set_on
from vllm_mm_ext.adapters.vllm_compat import awaited_ahead, logger
from vllm_mm_ext.config.root import MIB, MMExtConfig
from vllm_mm_ext.policies.encoder_cache.byte_cache import ByteCache

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.v1.request import Request

    from vllm_mm_ext.policies.encoder_cache.items import OutputBytes


class HostSide(Protocol):
    """What the device tier asks of the host tier's scheduler side."""

    def has_cache_item(self, identifier: str) -> bool:
        """Whether an item can be loaded instead of encoded."""

    def embeddings_of(self, identifier: str, modality: str) -> int | None:
        """Number of an item's embeddings in the tier; None if the item is not there."""

    def follow_device(self, holds: Callable[[str], bool]) -> None:
        """Take note of the device tier, which is built later."""

    def awaits(self, request: Request, index: int) -> bool:
        """Whether an item that is not on the device is being encoded elsewhere for a request."""

    def secured(self, request: Request, index: int) -> bool:
        """Whether a request may use an item that is on the device: it can be had again."""

    def used(self, key: str) -> None:
        """Note that a request found an item in the device tier."""

    def cancel(self, key: str) -> None:
        """Note that the device tier gave up an item that it allocated in this pass."""

    def reset(self) -> None:
        """Forget everything."""

    def items(self) -> list[tuple[str, int]]:
        """Key and bytes of each item."""

    def forget(self, keys: Iterable[str]) -> None:
        """Forget items, unless a request or a copy uses them."""

    def figures(self) -> dict[str, float]:
        """Counts since the start, and what the tier holds, in bytes and items."""


def attach_host_tier(vllm_config: VllmConfig, host: HostSide) -> None:
    """Let the device tier of this engine find its host tier, which vLLM creates first."""
    set_on(vllm_config.ec_transfer_config, "vllm.config:ECTransferConfig.mm_ext_host_tier", host)


class MMExtEncoderCacheManager(EncoderCacheManager):  # type: ignore[misc]
    """Encoder outputs on the device within a byte budget.

    The manager never refuses an item that shares its placeholder with an item before it (sound in a
    video): neither can be prefilled without the other, so the first would wait for ever. A drafter
    that reads ahead needs an item while the item before it is still in use. So one request at a
    time may use more than the budget for an item that it needs beside those that it holds.

    Args:
        cache: Bookkeeping of the budget.
        sizes: Bytes of an embedding, by modality.
        host: The scheduler side of the host tier, if there is one.
        largest_item: Embeddings of the largest item that vLLM admits.
        read_ahead: Tokens past those computed whose encoder outputs a drafter waits for.
        preempts_scheduled: Whether a request may be preempted in the pass that scheduled it.
    """

    def __init__(
        self,
        cache: ByteCache,
        sizes: OutputBytes,
        host: HostSide | None = None,
        *,
        largest_item: int,
        read_ahead: int = 0,
        preempts_scheduled: bool = False,
    ) -> None:
        # vLLM's own bookkeeping is not set up: nothing here uses it.
        self.cache_size = cache.capacity // sizes.largest
        self._largest_item = largest_item
        self._read_ahead = read_ahead
        self._cache = cache
        self._sizes = sizes
        self._host = host
        self._preempts_scheduled = preempts_scheduled
        self._embeds: dict[str, int] = {}
        self._modalities: dict[str, str] = {}
        # By request and input index, the item's identifier.
        self._inputs: dict[str, dict[int, str]] = {}
        # Items allocated in this pass, which no worker has encoded yet, and their requests.
        self._fresh: dict[str, str] = {}
        self._freed: list[str] = []
        # The request that was let use more than the budget last.
        self._overdraws: str | None = None

    @classmethod
    def create_manager(cls, *, cache_size: int, vllm_config: VllmConfig) -> EncoderCacheManager:
        """Build the manager from the engine's configuration; vLLM's own where this one cannot work.

        Args:
            cache_size: Embeddings that vLLM's own cache would hold.
            vllm_config: The engine's configuration.
        """
        if vllm_config.model_config.is_encoder_decoder:
            return EncoderDecoderCacheManager(cache_size)
        changed = problem(DEVICE_TIER_NAMES)
        if changed is not None:
            logger.warning("mm_ext: vLLM's own encoder cache is used instead: %s", changed)
            return EncoderCacheManager(cache_size)
        settings = MMExtConfig.from_additional_config(vllm_config.additional_config).encoder_cache
        sizes = output_bytes(vllm_config)
        capacity = int(settings.device_mb * MIB) or cache_size * sizes.largest
        # A text-only engine has no encoder and asks for nothing.
        cache = ByteCache(max(capacity, 1))
        host = getattr(vllm_config.ec_transfer_config, "mm_ext_host_tier", None)
        if host is not None:
            host.follow_device(cache.__contains__)
        return cls(
            cache,
            sizes,
            host,
            largest_item=cache_size,
            read_ahead=awaited_ahead(vllm_config),
            preempts_scheduled=vllm_config.scheduler_config.policy == "priority",
        )

    @property
    def num_freeable_slots(self) -> int:
        """Embeddings that can be allocated, after evictions or as an item that passes through."""
        slots = (self._cache.capacity - self._cache.busy) // self._sizes.largest
        if self._cache.passing is None and self._largest_item > self.cache_size:
            slots = max(slots, self._largest_item)
        return max(slots, 0)

    def reset(self) -> None:
        """Forget all items, those of the host tier too: the model's weights have changed."""
        self._cache.clear()
        self._embeds.clear()
        self._modalities.clear()
        self._inputs.clear()
        self._fresh.clear()
        self._freed.clear()
        if self._host is not None:
            self._host.reset()

    def holds(self, identifier: str) -> bool:
        """Whether an item's output is on the device or in the host tier."""
        if identifier in self._cache:
            return True
        return self._host is not None and self._host.has_cache_item(identifier)

    def check_and_update_cache(self, request: Request, input_id: int) -> bool:
        """Whether an item is on the device; if so, the request uses the item from now on."""
        key = request.mm_features[input_id].identifier
        if key not in self._cache:
            return False
        shared = self._fresh.get(key, request.request_id) != request.request_id
        if shared and self._preempts_scheduled and request.status == RequestStatus.RUNNING:
            # Whom it is encoded for may yet be preempted, until vLLM turns to those that wait.
            return False
        if self._host is not None and not self._host.secured(request, input_id):
            return False
        self._use(request.request_id, input_id, key)
        return True

    def get_cached_num_encoder_embeds(self, request: Request, input_id: int) -> int | None:
        """Number of an item's embeddings on the device or the host; None if it is in neither.

        By it vLLM refuses a request that gives another item the ``uuid`` of this one.
        """
        feature = request.mm_features[input_id]
        found = self._embeds.get(feature.identifier)
        if found is None and self._host is not None:
            found = self._host.embeddings_of(feature.identifier, feature.modality)
        return found

    def can_allocate(
        self,
        request: Request,
        input_id: int,
        encoder_compute_budget: int,
        num_embeds_to_schedule: int,
    ) -> bool:
        """Whether an item can be encoded or loaded now; if so, evict what is in its way.

        What another instance is encoding is waited for, as for room in a step.

        Args:
            request: The request that needs the item.
            input_id: The item's place in the request.
            encoder_compute_budget: Embeddings that may still be encoded in this step. Items
                in the host tier need none of it.
            num_embeds_to_schedule: Embeddings of the request for which this pass has found space
                that is not yet taken.
        """
        feature = request.mm_features[input_id]
        with_earlier, with_later = sharing(request.mm_features, input_id)
        pending = num_embeds_to_schedule * self._sizes.largest
        size = self._size(feature)
        if self._host is not None and self._host.awaits(request, input_id):
            return False
        if with_earlier:
            self._forget(self._cache.evict_to_fit(pending + size))
            return True
        on_host = self._host is not None and self._host.has_cache_item(feature.identifier)
        if not on_host and request.get_num_encoder_embeds(input_id) > encoder_compute_budget:
            return False
        later = [one for one in with_later if one.identifier not in self._cache]
        needed = size + sum(map(self._size, later))
        # Items that share a placeholder may be larger than the budget together.
        needed = needed if needed <= self._cache.capacity else size
        if size > self._cache.capacity:
            if self._cache.passing is None and pending <= self._cache.capacity:
                return True
        elif self._cache.fits(pending + needed):
            self._forget(self._cache.evict_to_fit(pending + needed))
            return True
        if not self._must_overdraw(request, input_id, needed, pending=pending > 0):
            return False
        self._overdraws = request.request_id
        self._forget(self._cache.evict_to_fit(pending + needed))
        return True

    def overdraws(self, request: Request, input_id: int) -> bool:
        """Whether a request gets an item beyond the budget if prefill stops without the item."""
        size = self._size(request.mm_features[input_id])
        return self._must_overdraw(request, input_id, size, pending=False)

    def allocate(self, request: Request, input_id: int) -> None:
        """Take the space that ``can_allocate`` found for an item."""
        feature = request.mm_features[input_id]
        key = feature.identifier
        if key in self._cache:
            self._use(request.request_id, input_id, key)
            return
        self._cache.add(
            key, self._size(feature), feature_cost(feature), request.request_id, overdraw=True
        )
        self._embeds[key] = request.get_num_encoder_embeds(input_id)
        self._modalities[key] = feature.modality
        self._inputs.setdefault(request.request_id, {})[input_id] = key
        self._fresh[key] = request.request_id

    def get_cached_input_ids(self, request: Request) -> set[int]:
        """Indices of the items that a request uses."""
        return set(self._inputs.get(request.request_id, ()))

    def free_encoder_input(self, request: Request, input_id: int) -> None:
        """Note that a request no longer needs one of its items."""
        inputs = self._inputs.get(request.request_id, {})
        key = inputs.pop(input_id, None)
        if not inputs:
            self._inputs.pop(request.request_id, None)
        # An item may be in a request more than once.
        if key is None or key in inputs.values():
            return
        preempted = self._fresh.get(key) == request.request_id
        self._forget(self._cache.release(key, request.request_id))
        if preempted:
            # In the pass that scheduled it: another request of the pass encodes the item, or none.
            other = next(iter(self._cache.users(key)), None)
            if other is not None:
                self._fresh[key] = other
                return
            if key in self._cache:
                self._cache.drop(key)
                self._forget([key])
            if self._host is not None:
                self._host.cancel(key)

    def get_freed_mm_hashes(self) -> list[str]:
        """Items evicted since the last call and not cached again. This call ends a pass."""
        self._fresh.clear()
        freed = [key for key in dict.fromkeys(self._freed) if key not in self._cache]
        self._freed = []
        return freed

    @property
    def capacity(self) -> int:
        """Bytes that the device tier keeps."""
        return self._cache.capacity

    @property
    def host(self) -> HostSide | None:
        """The scheduler side of the host tier, if there is one."""
        return self._host

    def items(self) -> list[tuple[str, str, int, bool]]:
        """Identifier, modality and bytes of each item, and whether a request uses it."""
        return [(key, self._modalities[key], *rest) for key, *rest in self._cache.items()]  # type: ignore[misc]

    def take_down(self, wanted: Callable[[str], bool]) -> list[str]:
        """Forget items that no request uses, in both tiers, between two passes.

        The worker's tensors are the caller's to drop.

        Args:
            wanted: Whether an item, named by its identifier, is one of them.

        Returns:
            Identifiers of the items that were there.
        """
        found = [key for key, _, busy in self._cache.items() if wanted(key) and not busy]
        for key in found:
            self._cache.drop(key)
            del self._embeds[key], self._modalities[key]
        on_host = []
        if self._host is not None:
            on_host = [key for key, _ in self._host.items() if wanted(key)]
            self._host.forget(on_host)
        return [*dict.fromkeys((*found, *on_host))]

    def give_up(self, keys: Collection[str]) -> None:
        """Forget items as ``take_down`` does; the worker is told with the next pass."""
        self._freed += self.take_down(keys.__contains__)

    def figures(self) -> dict[str, float]:
        """Counts since the start and what is held, of both tiers (``engine_figures``)."""
        found = {f"device_{name}": value for name, value in self._cache.figures.items()}
        if self._host is not None:
            for name, value in self._host.figures().items():
                found[name if name.startswith("transfer_") else f"host_{name}"] = value
        return found

    def check_integrity(self) -> None:
        """Raise ``AssertionError`` unless all bookkeeping agrees; for tests."""
        self._cache.check_integrity()
        assert len(self._embeds) == len(self._cache)
        users: dict[str, set[str]] = {key: set() for key in self._embeds}
        for request, inputs in self._inputs.items():
            assert inputs
            for key in inputs.values():
                users[key].add(request)
        assert all(self._cache.users(key) == found for key, found in users.items())
        assert self._fresh.keys() <= self._embeds.keys()

    def _use(self, request: str, input_id: int, key: str) -> None:
        self._inputs.setdefault(request, {})[input_id] = key
        hit = self._cache.use(key, request)
        if hit and self._host is not None and self._modalities[key] != PROMPT_EMBEDS:
            self._host.used(key)

    def _must_overdraw(self, request: Request, index: int, needed: int, *, pending: bool) -> bool:
        """Whether a request would wait for ever for an item's room, and it is its turn to overdraw.

        It holds an item that vLLM frees only once prefill has passed the one it lacks: for a
        drafter that reads ahead vLLM stops prefill early and frees items late. Of a video and its
        sound one may be there without the other.
        """
        features, ahead = request.mm_features, self._read_ahead
        start = features[index].mm_position.offset
        held = self.get_cached_input_ids(request) | ({index - 1} if pending else set())
        places = ((features[i], features[i].mm_position) for i in held)
        kept = {
            one.identifier: self._size(one)
            for one, place in places
            if place.offset + place.length + ahead > start - ahead
        }
        stands = request.num_computed_tokens + ahead >= start
        if not kept or not (stands or sum(kept.values()) + needed > self._cache.capacity):
            return False
        others = self._overdraws in self._inputs and self._overdraws != request.request_id
        return self._cache.busy <= self._cache.capacity or not others

    def _forget(self, keys: list[str]) -> None:
        for key in keys:
            del self._embeds[key], self._modalities[key]
            self._fresh.pop(key, None)
        self._freed += keys

    def _size(self, feature: Any) -> int:
        return int(feature.mm_position.get_num_embeds()) * self._sizes.of(feature.modality)
