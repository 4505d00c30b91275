"""``kv-pool``: what a block costs in the plugin's block pool and in vLLM's, in pools of all sizes.

Requests come, cache their blocks, are found again in part, and end, in pools full of cached
blocks. A quarter of them has a video, new but for the repetitions.
"""

from __future__ import annotations

import gc
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from vllm_mm_ext.config.kv_settings import KVSettings
from vllm_mm_ext.tools.bench.harness import BenchContext, BenchResult, Row

OPERATIONS = 1_000_000
POOLS = (1_000, 10_000, 100_000, 1_000_000)
_BLOCK = 16
# Blocks of a request: text, a video of two segments of 1,024 tokens, text.
_BLOCKS = 160
_VIDEOS = ((8, 64), (72, 64))
# Requests at any time, and how many make way for new ones in one turn of a side.
_RUNNING = 3
_TURN = 64
# Every so many requests one is the repetition of an earlier one.
_AGAIN = 4
# One request in so many has a video.
_VIDEO_SHARE = 4


@dataclass
class Spent:
    """Seconds, and blocks they were spent on, by operation."""

    seconds: dict[str, float] = field(default_factory=dict)
    blocks: dict[str, int] = field(default_factory=dict)

    def add(self, operation: str, began: float, blocks: int) -> None:
        """Count blocks handled from ``began`` until now, in CPU time: the machine is shared."""
        took = time.thread_time() - began
        self.seconds[operation] = self.seconds.get(operation, 0.0) + took
        self.blocks[operation] = self.blocks.get(operation, 0) + blocks

    def per_block_ns(self, *operations: str) -> float:
        """Nanoseconds per block over some operations together."""
        seconds = sum(self.seconds[name] for name in operations)
        return 1e9 * seconds / sum(self.blocks[name] for name in operations)


class Traffic:
    """The same requests for whichever pool.

    Args:
        pool: vLLM's block pool or the plugin's.
    """

    def __init__(self, pool: Any) -> None:
        self.pool = pool
        self.spent = Spent()
        self._running: deque[list[Any]] = deque()
        self._templates = [_request(with_videos) for with_videos in (False, True)]
        self._number = 2 * _RUNNING

    def turn(self, requests: int) -> None:
        """Let some requests come and go."""
        for request, again in self._requests(requests):
            while len(self._running) >= _RUNNING:
                self._finish()
            self._start(request, again)

    def _requests(self, count: int) -> Iterator[tuple[Any, bool]]:
        for number in range(self._number, self._number + count):
            again = number % _AGAIN == _AGAIN - 1
            # One that ended not long ago.
            shown = number - _RUNNING - 2 if again else number
            request = self._templates[shown // _AGAIN % _VIDEO_SHARE == 0]
            first = shown * _BLOCKS
            request.block_hashes = [(first + i).to_bytes(32, "big") for i in range(_BLOCKS)]
            yield request, again
        self._number += count

    def _start(self, request: Any, again: bool) -> None:
        pool, spent = self.pool, self.spent
        blocks: list[Any] = []
        if again:
            while len(blocks) < _BLOCKS - 2:
                found = pool.get_cached_block(request.block_hashes[len(blocks)], [0])
                if not found:
                    break
                blocks += found
            began = time.thread_time()
            pool.touch(blocks)
            spent.add("touch", began, len(blocks))
        hits = len(blocks)
        began = time.thread_time()
        blocks += pool.get_new_blocks(_BLOCKS - hits)
        spent.add("allocate", began, _BLOCKS - hits)
        began = time.thread_time()
        # The last block is not full.
        pool.cache_full_blocks(request, blocks, hits, _BLOCKS - 1, _BLOCK, 0)
        spent.add("cache", began, _BLOCKS - 1 - hits)
        self._running.append(blocks)

    def _finish(self) -> None:
        blocks = self._running.popleft()[::-1]
        began = time.thread_time()
        self.pool.free_blocks(blocks)
        self.spent.add("free", began, len(blocks))


def run(context: BenchContext) -> BenchResult:
    """Both pools take turns with the same requests."""
    rows, flat = [], {}
    with context.steps("kv-pool", len(POOLS) * context.repeats) as begin:
        for size in POOLS:
            taken: dict[str, list[Spent]] = {"stock": [], "plugin": []}
            for repeat in range(context.repeats):
                begin(f"{size:,} blocks, repeat {repeat + 1}")
                for side, spent in measure(size, OPERATIONS).items():
                    taken[side].append(spent)
            for name, operations in (
                ("allocated", ("allocate",)),
                ("allocated, cached, touched or freed", ("allocate", "cache", "touch", "free")),
            ):
                values = {
                    side: [spent.per_block_ns(*operations) for spent in of_side]
                    for side, of_side in taken.items()
                }
                rows.append(Row.of(f"{size:,} blocks: a block {name}", "ns", **values))
            flat[size] = rows[-2].plugin
    smallest, largest = flat[POOLS[0]], flat[POOLS[-1]]
    assert smallest is not None
    assert largest is not None
    notes = [
        f"{OPERATIONS:,} blocks allocated, cached, touched and freed per pool and side, after the "
        "pool was filled with cached blocks",
        f"plugin, {POOLS[-1]:,} blocks against {POOLS[0]:,}: {largest / smallest:.2f}x",
    ]
    return BenchResult("kv-pool", rows, notes)


def measure(size: int, operations: int) -> dict[str, Spent]:
    """Time of both sides over about so many operations on blocks.

    Args:
        size: Blocks of the pools.
        operations: Blocks allocated, cached, touched and freed.
    """
    sides = {side: Traffic(make(size)) for side, make in _MAKERS.items()}
    for traffic in sides.values():
        # A third more than the pool holds.
        traffic.turn(size // _BLOCKS * 4 // 3 + 2 * _RUNNING)
        traffic.spent = Spent()
    gc.collect()
    gc.disable()
    try:
        while min(sum(traffic.spent.blocks.values()) for traffic in sides.values()) < operations:
            for traffic in sides.values():
                traffic.turn(_TURN)
    finally:
        gc.enable()
    return {side: traffic.spent for side, traffic in sides.items()}


def _stock(size: int) -> Any:
    from vllm.v1.core.block_pool import BlockPool

    return BlockPool(size, True, _BLOCK)


def _plugin(size: int) -> Any:
    from vllm.v1.kv_cache_interface import KVCacheConfig

    from vllm_mm_ext.adapters.kv.install import pool_factory

    config = KVCacheConfig(num_blocks=size, kv_cache_tensors=[], kv_cache_groups=[])
    return pool_factory(KVSettings(), config, 3584)(size, True, _BLOCK)


_MAKERS: dict[str, Callable[[int], Any]] = {"stock": _stock, "plugin": _plugin}


def _request(with_videos: bool) -> Any:
    from vllm.multimodal.inputs import MultiModalFeatureSpec, PlaceholderRange
    from vllm.sampling_params import SamplingParams
    from vllm.v1.request import Request

    videos = [
        MultiModalFeatureSpec(
            None, "video", f"video {start}", PlaceholderRange(start * _BLOCK, length * _BLOCK)
        )
        for start, length in _VIDEOS
    ]
    return Request(
        "bench",
        [1] * (_BLOCKS * _BLOCK),
        SamplingParams(max_tokens=1),
        None,
        mm_features=videos if with_videos else None,
    )
