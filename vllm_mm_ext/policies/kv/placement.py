"""Tells what a KV block of a prompt holds: which mm item, or text. Pure.

A block that ends inside an item's placeholder holds the item. A block in which a placeholder ends
and other text begins holds text: a request that continues in another way has another such block.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator, Sequence
from typing import Protocol


class _Range(Protocol):
    offset: int
    length: int


class Feature(Protocol):
    """An mm item of a request, as vLLM's ``MultiModalFeatureSpec``, in prompt order."""

    modality: str
    identifier: str
    mm_position: _Range


def runs(
    features: Sequence[Feature], blocks: range, block_size: int
) -> Iterator[tuple[Feature | None, range]]:
    """What blocks hold, one after the other; together the runs are all blocks.

    Args:
        features: The mm items of the prompt, in prompt order.
        blocks: Indices of blocks in the prompt.
        block_size: Tokens per block.

    Yields:
        An item, or None for text, and indices of the blocks that hold it.
    """
    first = blocks.start
    while first < blocks.stop:
        # Of items that end together (a video and its sound) the first one counts.
        index = bisect_left(features, (first + 1) * block_size, key=end_of)
        if index == len(features):
            yield None, range(first, blocks.stop)
            return
        item = features[index]
        begins = item.mm_position.offset // block_size
        if first < begins:
            stop = min(begins, blocks.stop)
            yield None, range(first, stop)
        else:
            stop = min(end_of(item) // block_size, blocks.stop)
            yield item, range(first, stop)
        first = stop


def end_of(feature: Feature) -> int:
    """Position after an item's placeholder."""
    return feature.mm_position.offset + feature.mm_position.length
