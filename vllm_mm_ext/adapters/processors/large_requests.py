"""Requests with more model inputs than vLLM's processor cache has room for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from vllm.multimodal.cache import LruKeyReplicatedSenderCache
from vllm.multimodal.utils import argsort_mm_positions

from vllm_mm_ext.adapters.processors.segment_items import SegmentItems, part_of, segment_at

# Pixels of one request may take this share of vLLM's processor cache, which holds other items too.
_CACHE_SHARE = 0.5


def is_large(inputs: Any, context: Any) -> bool:
    """Whether the pixels of all segments take more than their share of vLLM's processor cache.

    Args:
        inputs: vLLM's ``ProcessorInputs``; videos are split.
        context: vLLM's ``InputProcessingContext``.
    """
    videos = inputs.mm_data_items.get("video")
    if not isinstance(videos, SegmentItems):
        return False
    config = context.get_mm_config()
    values = 0
    for index in range(len(videos)):
        if (segment := segment_at(videos, index)) is not None:
            height, width = part_of(segment).layout.size
            values += len(segment) * 3 * height * width
    # Pixels that the model itself normalises stay bytes.
    size = 1 if config.mm_device_do_normalize else context.model_config.dtype.itemsize
    return bool(values * size > _CACHE_SHARE * config.mm_processor_cache_gb * (1 << 30))


class LargeRequestCache:
    """What vLLM takes for its processor cache while it processes such a request.

    vLLM expects items that it finds in its cache to be still there once the others are added. So
    an item that comes with data is processed and sent again, whether the cache holds it or not.

    Args:
        inputs: vLLM's ``ProcessorInputs``, with its cache.
        processor: The multimodal processor.
    """

    def __init__(self, inputs: Any, processor: Any) -> None:
        self._real = inputs.cache
        hashes = processor._get_mm_hashes(inputs)
        # Items that the client named by their uuid alone.
        self._named = {
            hashes[modality][index]
            for modality, items in inputs.mm_data_items.items()
            for index in range(len(items))
            if items[index] is None
        }
        self._sent: dict[str, Any] = {}

    def is_cached(self, mm_hashes: Sequence[str]) -> list[bool]:
        """Whether each item need not be processed."""
        return [self.is_cached_item(mm_hash) for mm_hash in mm_hashes]

    def is_cached_item(self, mm_hash: str) -> bool:
        """Whether an item need not be processed."""
        return mm_hash in self._named and bool(self._real.is_cached_item(mm_hash))

    def touch_sender_cache_item(self, mm_hash: str) -> None:
        """Note that an item is used."""
        if mm_hash in self._named:
            self._real.touch_sender_cache_item(mm_hash)

    def get_and_update_item(self, mm_item: Any, mm_hash: str) -> Any:
        """An item and its prompt updates."""
        if mm_item is None:
            return self._real.get_and_update_item(None, mm_hash)
        self._sent[mm_hash] = mm_item
        return mm_item

    def release_sender_touches(self) -> None:
        """End the uses of a request."""
        self._real.release_sender_touches()

    def follow_engine(self, made: Mapping[str, Any]) -> None:
        """Do in this half of the cache what the request will do in the engine's.

        The engine's half stores whatever is sent, in the order of the prompt, and drops for it
        what other requests have sent. This half must not take that for held.

        Args:
            made: What vLLM's processor made of the request.
        """
        if not isinstance(self._real, LruKeyReplicatedSenderCache):
            return
        places = argsort_mm_positions(made["mm_placeholders"])
        hashes = [made["mm_hashes"][modality][index] for modality, index in places]
        used = [one for one in hashes if one in self._sent or one in self._named]
        for mm_hash in used:
            self._real.touch_sender_cache_item(mm_hash)
        for mm_hash in used:
            if mm_hash in self._sent:
                self._real.invalidate(mm_hash)
                self._real.get_and_update_item(self._sent[mm_hash], mm_hash)
            elif self._real.is_cached_item(mm_hash):
                self._real.get_and_update_item(None, mm_hash)
