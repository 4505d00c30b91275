"""Replays a trace of KV accesses through real pools: vLLM's, and the plugin's."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from functools import partial
from typing import Any

from vllm.multimodal.inputs import MultiModalFeatureSpec, PlaceholderRange
from vllm.sampling_params import SamplingParams
from vllm.v1.core.kv_cache_manager import KVCacheManager
from vllm.v1.kv_cache_interface import (
    FullAttentionSpec,
    KVCacheConfig,
    KVCacheGroupSpec,
    KVCacheTensor,
)
from vllm.v1.request import Request

from vllm_mm_ext.adapters.kv.block_pool import MMExtBlockPool
from vllm_mm_ext.adapters.kv.install import install, pool_factory, pools_of
from vllm_mm_ext.adapters.kv.pool_limits import Reason
from vllm_mm_ext.config.kv_settings import KVSettings
from vllm_mm_ext.policies.kv.pieces import Piece
from vllm_mm_ext.tools.bench.kv_costs import Costs
from vllm_mm_ext.tools.bench.kv_trace import Access, KVTrace

_BLOCK_BYTES = 1 << 10


class Miss(StrEnum):
    """Why a block that had been computed before was not found."""

    never_kept = "never kept"
    quota = "quota"
    pressure = "pressure"
    ranking = "ranking"
    tail_first = "tail first"
    cascade = "cascade"


_OF_REASON = {
    Reason.quota: Miss.quota,
    Reason.pressure: Miss.pressure,
    Reason.ranking: Miss.ranking,
    Reason.asked: Miss.never_kept,
    Reason.before: Miss.cascade,
}


@dataclass
class Replayed:
    """What became of the requests of a trace.

    Attributes:
        saved: Cost that blocks found in the cache saved.
        found: Blocks found.
        misses: Cost of blocks that were not found though computed before, by reason.
        refused: Requests that found no room.
    """

    saved: float = 0.0
    found: list[int] = field(default_factory=list)
    misses: dict[Miss, float] = field(default_factory=dict)
    refused: int = 0


class WatchedPool(MMExtBlockPool):
    """The plugin's pool, which tells why it gave blocks up."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.reasons: dict[bytes, Miss] = {}

    def _give_up(self, piece: Piece, count: int, reason: Reason) -> None:
        why = _OF_REASON[reason]
        if reason is Reason.ranking and count < len(piece.blocks):
            why = Miss.tail_first
        for block_id in piece.blocks[-count:]:
            key = self.blocks[block_id].block_hash
            if key is not None:
                self.reasons[bytes(key)] = why
        super()._give_up(piece, count, reason)


class Replay:
    """A KV cache manager to which a trace is replayed.

    Args:
        trace: The trace.
        blocks: Size of the pool.
        settings: The plugin's; None: vLLM's own pool.
        encoded: Tells of an item's content whether its encoder output is held.
    """

    def __init__(
        self,
        trace: KVTrace,
        blocks: int,
        settings: KVSettings | None,
        encoded: Callable[[int], bool] = lambda _: False,
    ) -> None:
        import torch

        install()
        spec = FullAttentionSpec(trace.block, num_kv_heads=1, head_size=1, dtype=torch.float32)
        config = KVCacheConfig(
            num_blocks=blocks + 1,
            kv_cache_tensors=[
                KVCacheTensor((blocks + 1) * _BLOCK_BYTES, ["layer"], 0, _BLOCK_BYTES)
            ],
            kv_cache_groups=[KVCacheGroupSpec(["layer"], spec)],
        )
        longest = max(access.prompt + access.output for access in trace.accesses)
        build = partial(
            KVCacheManager,
            config,
            max_model_len=longest + trace.block,
            scheduler_block_size=trace.block,
            hash_block_size=trace.block,
        )
        self._trace = trace
        self._encoded = encoded
        if settings is None:
            self.manager = build()
        else:
            made = pool_factory(settings, config, trace.hidden)
            with pools_of(partial(WatchedPool, **made.keywords)):
                self.manager = build()
            pool = self.manager.block_pool
            pool.retention.encoded = lambda identifier: encoded(int(identifier))

    def run(self) -> Replayed:
        """Replay all requests."""
        done = Replayed()
        costs = Costs(self._trace, self._encoded)
        seen: set[int] = set()
        running: dict[int, Request] = {}
        for number, begins in self._trace.events:
            access = self._trace.accesses[number]
            if begins:
                found = self._begin(number, access, running)
                if found is None:
                    done.refused += 1
                    found = 0
                done.found.append(found)
                done.saved += costs.saved(access, found)
                self._explain(access, found, seen, costs, done.misses)
                seen.update(access.blocks)
            elif number in running:
                self._end(running.pop(number), access)
        return done

    def _begin(self, number: int, access: Access, running: dict[int, Request]) -> int | None:
        request = Request(
            str(number),
            [0] * access.prompt,
            SamplingParams(max_tokens=access.output + 1),
            None,
            mm_features=[
                MultiModalFeatureSpec(
                    None,
                    item.modality,
                    str(item.content),
                    PlaceholderRange(offset=item.offset, length=item.length),
                )
                for item in access.items
            ],
            session_id=access.session,
            block_hasher=partial(_hashes, access.blocks, self._trace.block),
        )
        blocks, hit, _ = self.manager.get_computed_blocks(request)
        if self.manager.allocate_slots(request, access.prompt - hit, hit, blocks) is None:
            return None
        request.num_computed_tokens = access.prompt
        running[number] = request
        return int(hit) // self._trace.block

    def _end(self, request: Request, access: Access) -> None:
        if access.output:
            request.append_output_token_ids([0] * access.output)
            # An answer that finds no room ends early.
            self.manager.allocate_slots(request, access.output)
        self.manager.free(request)

    def _explain(
        self, access: Access, found: int, seen: set[int], costs: Costs, misses: dict[Miss, float]
    ) -> None:
        """Count what was not found, by why."""
        pool = self.manager.block_pool
        broken: Miss | None = None
        for place, block in enumerate(access.blocks[found : access.prompt // self._trace.block]):
            if block not in seen or found + place >= (access.prompt - 1) // self._trace.block:
                break
            if not isinstance(pool, WatchedPool):
                why = Miss.ranking
            elif broken is None:
                why = broken = pool.reasons.get(_hash(block) + b"\0\0\0\0", Miss.never_kept)
            else:
                own = pool.reasons.get(_hash(block) + b"\0\0\0\0")
                why = Miss.cascade if own is None else own
            misses[why] = misses.get(why, 0.0) + costs.of(access, found + place)


def _hash(block: int) -> bytes:
    return block.to_bytes(32, "big")


def _hashes(blocks: Sequence[int], size: int, request: Any) -> list[bytes]:
    """The hashes of a request's full blocks that it has not got yet."""
    had, full = len(request.block_hashes), request.num_tokens // size
    return [_hash(block) for block in blocks[had:full]]
