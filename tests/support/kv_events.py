"""A reader of vLLM's KV events, as a router has one: what it knows of the cache of an engine."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any

import msgspec
import zmq
from vllm.v1.core.block_pool import BlockPool
from vllm.v1.core.kv_cache_utils import get_block_hash, get_group_id, maybe_convert_block_hash


def in_pool(pool: BlockPool) -> Counter[tuple[int, int]]:
    """What a pool has cached, as ``Knowledge.blocks`` has it."""
    found: Counter[tuple[int, int]] = Counter()
    for key, held in pool.cached_block_hash_to_block._cache.items():
        block = (get_group_id(key), maybe_convert_block_hash(get_block_hash(key)))
        found[block] += len(held) if isinstance(held, dict) else 1
    return found


@dataclass
class Knowledge:
    """What events tell of a cache.

    Attributes:
        blocks: By KV cache group and hash, how many blocks hold that content.
        items: By hash, the mm items of which the block holds a part, with the position in the
            prompt at which each begins. Of group 0, where blocks are cached without gaps.
        cleared: How often the whole cache was emptied.
    """

    blocks: Counter[tuple[int, int]] = field(default_factory=Counter)
    items: dict[int, set[tuple[str, int]]] = field(default_factory=dict)
    cleared: int = 0
    _starts: dict[int, int] = field(default_factory=dict)

    def read(self, events: Iterable[dict[str, Any]]) -> None:
        """Take note of events, in the order in which the engine sent them."""
        for event in events:
            match event["type"]:
                case "BlockStored":
                    self._stored(event)
                case "BlockRemoved":
                    for block in event["block_hashes"]:
                        self.blocks[event["group_idx"], block] -= 1
                case "AllBlocksCleared":
                    self.blocks.clear()
                    self.cleared += 1

    def cached(self) -> Counter[tuple[int, int]]:
        """``blocks`` without those that are gone; none may have gone more often than it came."""
        assert all(count >= 0 for count in self.blocks.values())
        return +self.blocks

    def places(self) -> set[tuple[str, int]]:
        """The mm items that cached blocks hold parts of, with the position of each."""
        return set().union(*(self.items.get(block, ()) for _, block in self.cached()))

    def _stored(self, event: dict[str, Any]) -> None:
        hashes, group, size = event["block_hashes"], event["group_idx"], event["block_size"]
        keys = event.get("extra_keys") or [None] * len(hashes)
        assert len(keys) == len(hashes)
        parent = event["parent_block_hash"]
        start = 0 if parent is None else self._starts.get(parent, 0) + size
        for block, extra in zip(hashes, keys, strict=True):
            self.blocks[group, block] += 1
            if group == 0:
                self._starts[block] = start
                # Besides items there are salts and LoRA names, which are strings.
                pairs = [key for key in extra or () if not isinstance(key, str)]
                self.items[block] = {(name, start + offset) for name, offset in pairs}
            start += size


class Reader:
    """Subscribes to an engine's events over ZMQ, and asks for those that it missed.

    Args:
        endpoint: ``endpoint`` of ``--kv-events-config``.
        replay: ``replay_endpoint`` of it.
    """

    def __init__(self, endpoint: str, replay: str) -> None:
        self.knowledge = Knowledge()
        self._next = 0
        self._context = zmq.Context()
        self._told = self._context.socket(zmq.SUB)
        self._told.subscribe(b"")
        self._told.connect(endpoint)
        self._asking = self._context.socket(zmq.DEALER)
        self._asking.connect(replay)

    def __enter__(self) -> Reader:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._context.destroy(linger=0)

    def read(self, seconds: float = 2.0) -> None:
        """Read until nothing has come for so long."""
        while self._told.poll(round(1000 * seconds)):
            _, number, payload = self._told.recv_multipart()
            missed = int.from_bytes(number, "big")
            if missed > self._next:
                self._replay(missed)
            self._batch(missed, payload)

    def _replay(self, end: int) -> None:
        self._asking.send_multipart([b"", self._next.to_bytes(8, "big")])
        while self._next < end and self._asking.poll(10_000):
            sent, payload = self._asking.recv_multipart()[-2:]
            number = int.from_bytes(sent, "big", signed=True)
            if number < 0:
                break
            self._batch(number, payload)

    def _batch(self, number: int, payload: bytes) -> None:
        if number == self._next:
            self._next += 1
            _, events, *_ = msgspec.msgpack.decode(payload)
            self.knowledge.read(events)
