"""Segments as vLLM's processors see them: video items that are hashed by their digest."""

from __future__ import annotations

from typing import Any

from vllm.multimodal.parse import VideoProcessorItems

from vllm_mm_ext.video.segments import Segment, VideoSegment


class SegmentItems(VideoProcessorItems):  # type: ignore[misc]
    """Video items that are segments, hashed by their digest."""

    def get_item_for_hash(self, index: int) -> object:
        """What vLLM hashes to identify the item in its caches."""
        segment = segment_at(self, index)
        return self.data[index] if segment is None else f"mm_ext:{segment.digest}"


def segment_at(items: Any, index: int) -> VideoSegment | None:
    """The segment at an index of a request's video items; None if that item is no segment."""
    if not isinstance(items, VideoProcessorItems):
        return None
    item = items.get(index)
    frames = item[0] if isinstance(item, tuple) else item
    return frames if isinstance(frames, VideoSegment) else None


def part_of(segment: VideoSegment) -> Segment:
    """The place of a segment in its video."""
    assert segment.part is not None  # Only arrays derived from a segment have none.
    return segment.part
