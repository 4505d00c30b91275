"""Which cached KV blocks depend on which mm items, also after the pool has given the items up."""

from __future__ import annotations

from bisect import bisect_left
from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any
from weakref import WeakValueDictionary

# Requests whose chains are kept; one that is not is made again.
_CHAINS = 256


@dataclass(frozen=True, slots=True, weakref_slot=True, eq=False)
class Link:
    """The mm items of a prompt up to one of them, the last one first.

    Prompts that begin with the same items share the links of these: each turn of a conversation
    adds but the links of its new items.

    Attributes:
        identifier: vLLM's identifier of the item.
        before: The link of the item before it, or None.
    """

    identifier: str
    before: Link | None


class MediaMarks:
    """For each block, the mm items that its KV depends on.

    A block depends on an item that begins before the block ends, or so soon after it that a drafter
    has read the item. A mark holds only as long as the block has the hash that it had then.

    Args:
        num_blocks: Number of blocks of the pool.
        read_ahead: Tokens after a token that a drafter makes the KV of this token of.
    """

    def __init__(self, num_blocks: int, read_ahead: int = 0) -> None:
        self._read_ahead = read_ahead
        self._marks: list[tuple[Any, Link] | None] = [None] * num_blocks
        self._chains: OrderedDict[str, list[Link]] = OrderedDict()
        # By the link before, which each of them keeps alive, and identifier.
        self._links: WeakValueDictionary[tuple[int, str], Link] = WeakValueDictionary()

    def note(self, request: Any, cached: Iterable[tuple[Any, int]]) -> None:
        """Mark blocks of a request that are cached now; without media they lose old marks.

        Args:
            request: vLLM's request.
            cached: The blocks, each with the number of tokens up to the end of what it holds.
        """
        features = request.mm_features
        chain = self._chain(request.request_id, features) if features else []
        for block, end in cached:
            read = end + self._read_ahead
            begun = bisect_left(features, read, key=lambda feature: feature.mm_position.offset)
            mark = self._marks[block.block_id]
            # A block that is found by fewer tokens as well still depends on what it did.
            known = mark is not None and mark[0] == block.block_hash
            if not known:
                depends = begun and block.block_hash is not None
                found = (block.block_hash, chain[begun - 1]) if depends else None
                self._marks[block.block_id] = found

    def move(self, source: int, target: int) -> None:
        """Note that vLLM has given a block's hashes to another, which holds a copy of it."""
        self._marks[target] = self._marks[source]

    def depending(self, wanted: Callable[[str], bool], blocks: Sequence[Any]) -> set[int]:
        """Ids of the cached blocks that depend on some items. O(blocks and marks).

        Args:
            wanted: Whether an item, named by its identifier, is one of them.
            blocks: All blocks of the pool, by id.
        """
        known: dict[int, bool] = {}
        found = set()
        for block_id, mark in enumerate(self._marks):
            if mark is None or blocks[block_id].block_hash != mark[0]:
                self._marks[block_id] = None
                continue
            if _any(mark[1], wanted, known):
                found.add(block_id)
        return found

    def _chain(self, request_id: str, features: Sequence[Any]) -> list[Link]:
        chain = self._chains.pop(request_id, None)
        # A request of a stream of inputs gets more features, and clients may choose ids twice.
        if (
            chain is None
            or len(chain) != len(features)
            or chain[-1].identifier != features[-1].identifier
        ):
            chain, before = [], None
            for feature in features:
                name = (id(before), feature.identifier)
                link = self._links.get(name)
                if link is None:
                    link = self._links[name] = Link(feature.identifier, before)
                chain.append(link)
                before = link
        self._chains[request_id] = chain
        while len(self._chains) > _CHAINS:
            self._chains.popitem(last=False)
        return chain


def _any(link: Link | None, wanted: Callable[[str], bool], known: dict[int, bool]) -> bool:
    """Whether a wanted item is in a chain; ``known`` has what was found of links, by their id."""
    passed = []
    answer = False
    while link is not None:
        if (before := known.get(id(link))) is not None:
            answer = before
            break
        passed.append(link)
        link = link.before
    for one in reversed(passed):
        answer = known[id(one)] = answer or wanted(one.identifier)
    return answer
