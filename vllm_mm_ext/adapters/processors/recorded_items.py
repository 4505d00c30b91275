"""Mm items of videos that another server has decoded: all but what the encoder takes.

Such a *bare* item has the fields that positions and bookkeeping need. Its encoder output comes from
the shared store; nobody can encode it here. The server that decodes a video packs the items into
the video's record; one that reads the record gives them to vLLM as if its processor cache had them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, MutableMapping, Sequence
from typing import Any, Final

import torch
from cachetools import LRUCache
from vllm.multimodal.inputs import (
    MultiModalBatchedField,
    MultiModalFieldElem,
    MultiModalKwargsItem,
    MultiModalKwargsItems,
)
from vllm.multimodal.parse import MultiModalDataItems, VideoProcessorItems
from vllm.v1.serial_utils import MsgpackDecoder, MsgpackEncoder

from vllm_mm_ext.adapters.encoder_cache.bare_items import BARE
from vllm_mm_ext.adapters.processors.segment_items import SegmentItems, part_of, segment_at
from vllm_mm_ext.media.recorded import (
    DELIVERED,
    MediaRecord,
    RecordedFrames,
    RecordedSegment,
    RecordError,
    pack,
)
from vllm_mm_ext.video.segments import VideoSegment

# Fields of the families' items that only the encoder takes.
_INPUTS: Final = frozenset(
    {"pixel_values_videos", "video_mel", "input_audio_features", "feature_attention_mask"}
)
# Tensors of bare items are small, and all of an item is one message.
_INLINE: Final = 1 << 30
# Bytes of packed items that a writer remembers: vLLM's processor cache has the items themselves
# made only once, and videos share segments.
_REMEMBERED: Final = 32 << 20


class RecordedItems:
    """Mixin in front of vLLM's processor: items by records, and records of items.

    Attributes:
        recorder: Stores the record of a video, given the digest of its frames, for other servers.
            None where nobody reads records.
    """

    info: Any
    recorder: Callable[[str, bytes], None] | None = None
    _packed: LRUCache[str, bytes] | None = None

    def apply(self, inputs: Any, timing_ctx: Any) -> Any:
        """Process a request whose videos are split.

        Raises:
            RecordError: A video that another server decoded cannot be split by its record.
        """
        videos = inputs.mm_data_items.get("video")
        if _has_whole_recorded(videos):
            raise RecordError("vLLM's own processor needs the pixels")
        if any(segment.recorded is not None for _, segment in _segments(videos)):
            inputs = dataclasses.replace(inputs, cache=RecordedCache(inputs, self))
        made = super().apply(inputs, timing_ctx)  # type: ignore[misc]
        if self.recorder is not None and not inputs.hf_processor_mm_kwargs:
            if self._packed is None:
                self._packed = LRUCache(_REMEMBERED, getsizeof=len)
            for digest, record in records_of(inputs.mm_data_items, made, self._packed):
                self.recorder(digest, pack(record))
        return made

    def _apply_hf_processor(self, inputs: Any, timing_ctx: Any) -> Any:
        """Without the cache vLLM would encode pixels that are not there."""
        if isinstance(inputs.cache, RecordedCache):
            raise RecordError("vLLM processes the request without a cache")
        return super()._apply_hf_processor(inputs, timing_ctx)  # type: ignore[misc]

    def _get_cache_missing_items(self, cache: Any, mm_data_items: Any, mm_hashes: Any) -> Any:
        """Tell the cache which hashes are those of bare items."""
        if isinstance(cache, RecordedCache):
            cache.bind(mm_hashes)
        return super()._get_cache_missing_items(  # type: ignore[misc]
            cache=cache, mm_data_items=mm_data_items, mm_hashes=mm_hashes
        )


class RecordedCache:
    """What vLLM takes for its processor cache while it processes a request with bare items.

    The real cache behind it never hears of bare items, as later requests would find them there.

    Args:
        inputs: vLLM's ``ProcessorInputs``, with its cache; videos are split.
        processor: The multimodal processor.

    Raises:
        RecordError: A recorded item cannot be read.
    """

    def __init__(self, inputs: Any, processor: Any) -> None:
        self._real = inputs.cache
        self._places, items = _bare(inputs.mm_data_items)
        data = {
            modality: _some(inputs.mm_data_items[modality], self._places[modality])
            for modality in items
        }
        try:
            updates = processor._get_mm_prompt_updates(
                MultiModalDataItems(data),
                inputs.hf_processor_mm_kwargs,
                MultiModalKwargsItems(items),
            )
        except Exception as error:
            raise RecordError(f"an item has no place in the prompt: {error}") from error
        self._items = {
            modality: list(zip(found, updates[modality], strict=True))
            for modality, found in items.items()
        }
        self._known: dict[str, Any] = {}

    def bind(self, mm_hashes: Mapping[str, Sequence[str]]) -> None:
        """Take note of the names of the bare items.

        Args:
            mm_hashes: vLLM's of all items of the request.
        """
        for modality, places in self._places.items():
            for place, item in zip(places, self._items[modality], strict=True):
                mm_hash = mm_hashes[modality][place]
                # What the engine has whole is better than what it would have to load.
                if self._real is None or not self._real.is_cached_item(mm_hash):
                    self._known[mm_hash] = item

    def is_cached(self, mm_hashes: Sequence[str]) -> list[bool]:
        """Whether each item need not be processed."""
        return [self.is_cached_item(mm_hash) for mm_hash in mm_hashes]

    def is_cached_item(self, mm_hash: str) -> bool:
        """Whether an item need not be processed."""
        return mm_hash in self._known or (
            self._real is not None and bool(self._real.is_cached_item(mm_hash))
        )

    def touch_sender_cache_item(self, mm_hash: str) -> None:
        """Note that an item is used."""
        if self._real is not None and mm_hash not in self._known:
            self._real.touch_sender_cache_item(mm_hash)

    def get_and_update_item(self, mm_item: Any, mm_hash: str) -> Any:
        """An item and its prompt updates."""
        if mm_hash in self._known:
            return self._known[mm_hash]
        return mm_item if self._real is None else self._real.get_and_update_item(mm_item, mm_hash)

    def release_sender_touches(self) -> None:
        """End the uses of a request."""
        if self._real is not None:
            self._real.release_sender_touches()


def records_of(
    items: Any, made: Any, remembered: MutableMapping[str, bytes]
) -> Iterator[tuple[str, MediaRecord]]:
    """Digest and record of each video of a request that was decoded here.

    There is no record of a video of which vLLM's processor cache had an item that is not
    remembered.

    Args:
        items: vLLM's data items of the request, with videos split.
        made: What vLLM's processor made of them.
        remembered: Packed items by modality and vLLM's hash; those made are added.
    """

    def packed_at(modality: str, place: int) -> bytes | None:
        name = f"{modality}|{made['mm_hashes'][modality][place]}"
        item = made["mm_kwargs"][modality][place]
        if item is None:
            return remembered.get(name)
        if BARE in item or not _INPUTS & item.keys():
            # Of another server, or elsewhere in memory that servers share.
            return None
        data = packed(item)
        if len(data) <= _REMEMBERED:
            remembered[name] = data
        return data

    videos = items.get("video")
    heard = {owner: number for number, owner in _pieces(items)}
    segments = [segment_at(videos, index) for index in range(len(videos) if videos else 0)]
    # An item that a client named by its uuid alone has no segment; it ends the video before it.
    starts = [i for i, one in enumerate(segments) if one is not None and one.whole is not None]
    for start, end in zip(starts, [*starts[1:], len(segments)], strict=True):
        first = segments[start]
        assert first is not None
        assert first.whole is not None
        found = []
        for index in range(start, end):
            segment = segments[index]
            own = {"video": packed_at("video", index)}
            if index in heard:
                own["audio"] = packed_at("audio", heard[index])
            known = {modality: data for modality, data in own.items() if data is not None}
            if segment is None or len(known) < len(own):
                break
            found.append(_recorded(segment, known))
        if DELIVERED in first.whole.memo and len(found) == end - start:
            yield str(first.whole.digest), MediaRecord.of(first.whole, found)


def packed(item: MultiModalKwargsItem) -> bytes:
    """The bytes of a processed item, without what the encoder takes."""
    fields = {name: element for name, element in item.items() if name not in _INPUTS}
    left_out = sum(_values(element.data) for name, element in item.items() if name in _INPUTS)
    fields[BARE] = MultiModalFieldElem(
        data=torch.tensor(left_out), field=MultiModalBatchedField(keep_on_cpu=True)
    )
    parts = MsgpackEncoder(size_threshold=_INLINE).encode(MultiModalKwargsItem(fields))
    assert len(parts) == 1
    return bytes(parts[0])


def unpacked(data: bytes) -> MultiModalKwargsItem:
    """The bare item that ``packed`` made.

    Raises:
        RecordError: The bytes are no such item.
    """
    try:
        item = MsgpackDecoder(MultiModalKwargsItem, share_mem=False).decode([bytearray(data)])
        left_out = int(item[BARE].data)
    except Exception as error:
        raise RecordError(f"an item cannot be read: {error}") from error
    if left_out <= 0 or _INPUTS & item.keys():
        raise RecordError("an item is not bare")
    found: MultiModalKwargsItem = item
    return found


def _recorded(segment: VideoSegment, own: dict[str, bytes]) -> RecordedSegment:
    kept, track = part_of(segment).kept, segment.audio
    return RecordedSegment(
        None if track is None else str(track.digest),
        None if kept is None else kept.tobytes(),
        own,
    )


def _bare(items: Any) -> tuple[dict[str, list[int]], dict[str, list[MultiModalKwargsItem]]]:
    """By modality, the places of bare items among a request's, and the items themselves."""
    places: dict[str, list[int]] = {}
    found: dict[str, list[MultiModalKwargsItem]] = {}
    pieces = {owner: number for number, owner in _pieces(items)}
    for index, segment in _segments(items.get("video")):
        recorded = segment.recorded
        if recorded is None:
            continue
        at = {"video": index} | ({"audio": pieces[index]} if index in pieces else {})
        if at.keys() != recorded.items.keys():
            raise RecordError("the sound is in other items")
        for modality, place in at.items():
            places.setdefault(modality, []).append(place)
            found.setdefault(modality, []).append(unpacked(recorded.items[modality]))
    return places, found


def _pieces(items: Any) -> Iterator[tuple[int, int]]:
    """Index of each audio item that is the sound of a segment, and the segment's index."""
    owners = getattr(items, "owners", ())
    if owners:
        first = len(items["audio"]) - len(owners)
        yield from ((first + number, owner) for number, owner in enumerate(owners))


def _some(items: Any, places: Sequence[int]) -> Any:
    data = [items.data[place] for place in places]
    if isinstance(items, SegmentItems):
        return SegmentItems(data, [items.metadata[place] for place in places])
    return type(items)(data)


def _segments(videos: Any) -> Iterator[tuple[int, VideoSegment]]:
    if isinstance(videos, SegmentItems):
        for index in range(len(videos)):
            if (segment := segment_at(videos, index)) is not None:
                yield index, segment


def _has_whole_recorded(videos: Any) -> bool:
    """Whether a recorded video was not split."""
    if not isinstance(videos, VideoProcessorItems):
        return False
    items = (videos.get(index) for index in range(len(videos)))
    frames = (item[0] if isinstance(item, tuple) else item for item in items)
    return any(isinstance(one, RecordedFrames) for one in frames)


def _values(data: Any) -> int:
    return int(data.numel()) if hasattr(data, "numel") else sum(map(_values, data))
