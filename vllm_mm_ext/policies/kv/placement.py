"""Tells which mm item of a prompt a KV block belongs to. Pure.

The blocks that end inside an item's placeholder belong to the item. So do the blocks between the
item before and this item, since a request finds an item only if all before it is cached. A block
in which a placeholder ends and other text begins belongs to the next item, or to none: a request
that continues in another way has another such block. Two items have the same name (a block hash)
exactly if they and all that comes before them are the same.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol


class _Range(Protocol):
    offset: int
    length: int


class Feature(Protocol):
    """An mm item of a request, as vLLM's ``MultiModalFeatureSpec``, in prompt order."""

    modality: str
    identifier: str
    mm_position: _Range


@dataclass(frozen=True, slots=True)
class Placement:
    """Where mm items stand in a prompt.

    Args:
        features: The mm items in prompt order.
        hash_block_size: Tokens per block hash; the size of KV blocks is a multiple of this.
    """

    features: Sequence[Feature]
    hash_block_size: int

    def owner(self, block_end: int) -> int | None:
        """Index of the item that a block belongs to.

        Args:
            block_end: Position after the block's last token.

        Returns:
            None where the block goes beyond the last item.
        """
        index = bisect_left(self.features, block_end, key=end_of)
        while index < len(self.features):
            if self.hash_index(index) is not None:
                return index
            index += 1
        return None

    def runs(self, blocks: range, block_size: int) -> Iterator[tuple[int, range]]:
        """Items with tokens in a range of blocks, each with the indices of its blocks up to there.

        Args:
            blocks: Indices of blocks in the prompt.
            block_size: Tokens per block.
        """
        first = blocks.start
        while first < blocks.stop:
            item = self.owner((first + 1) * block_size)
            if item is None:
                return
            feature = self.features[item]
            stop = min(blocks.stop, end_of(feature) // block_size)
            own = range(feature.mm_position.offset // block_size, stop)
            if own:
                yield item, own
            first = stop

    def before(self, index: int, block_size: int) -> range:
        """Indices of the blocks between an item and its parent."""
        parent = self.parent(index)
        start = end_of(self.features[parent]) if parent is not None else 0
        return range(start // block_size, self.features[index].mm_position.offset // block_size)

    def hash_index(self, index: int) -> int | None:
        """Index of the block hash that names an item: the first one over the item's tokens; None if
        no block hash covers them."""
        position = self.features[index].mm_position
        found = position.offset // self.hash_block_size
        ends = (found + 1) * self.hash_block_size
        return found if ends <= position.offset + position.length else None

    def parent(self, index: int) -> int | None:
        """Index of the nearest item before this one that owns blocks; None for the first."""
        own = self.hash_index(index)
        end = end_of(self.features[index])
        while (index := bisect_left(self.features, end, key=end_of) - 1) >= 0:
            end = end_of(self.features[index])
            # Of items that end together (a video and its sound) the first owns the blocks.
            index = bisect_left(self.features, end, key=end_of)
            found = self.hash_index(index)
            if found is not None and found != own:
                return index
        return None


def end_of(feature: Feature) -> int:
    """Position after an item's placeholder."""
    return feature.mm_position.offset + feature.mm_position.length
