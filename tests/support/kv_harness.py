"""A real KV cache manager over a small pool, with requests of text and media, for tests."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import msgspec
import torch
from vllm.multimodal.inputs import MultiModalFeatureSpec, PlaceholderRange
from vllm.sampling_params import SamplingParams
from vllm.utils.hashing import sha256
from vllm.v1.core.kv_cache_manager import KVCacheManager
from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash
from vllm.v1.kv_cache_interface import (
    FullAttentionSpec,
    KVCacheConfig,
    KVCacheGroupSpec,
    KVCacheTensor,
    SlidingWindowSpec,
)
from vllm.v1.request import Request

from vllm_mm_ext.adapters.kv import install as adapter
from vllm_mm_ext.adapters.kv.block_pool import MMExtBlockPool
from vllm_mm_ext.adapters.patches import all_or_none
from vllm_mm_ext.config.kv_settings import KVSettings

BLOCK = 4
BLOCK_BYTES = 1 << 20
HIDDEN_SIZE = 64

init_none_hash(sha256)
with all_or_none("KV blocks"):
    adapter.install()


@dataclass(frozen=True)
class Text:
    """Tokens of text; the same name is the same text."""

    name: int
    tokens: int


@dataclass(frozen=True)
class Media:
    """An mm item; the same name is the same content."""

    name: str
    tokens: int
    modality: str = "video"


Part = Text | Media


def request(
    name: str,
    parts: Sequence[Part],
    *,
    session: str | None = None,
    salt: str | None = None,
    max_tokens: int = 64,
    hash_block: int = BLOCK,
) -> Request:
    """A request with these parts in its prompt."""
    tokens: list[int] = []
    features = []
    for part in parts:
        if isinstance(part, Media):
            place = PlaceholderRange(offset=len(tokens), length=part.tokens)
            features.append(MultiModalFeatureSpec(None, part.modality, part.name, place))
            tokens += [7] * part.tokens
        else:
            tokens += [100 * (part.name + 1) + i % 50 for i in range(part.tokens)]
    return Request(
        name,
        tokens,
        SamplingParams(max_tokens=max_tokens),
        None,
        mm_features=features,
        session_id=session,
        cache_salt=salt,
        block_hasher=get_request_block_hasher(hash_block, sha256),
    )


def cache_config(blocks: int, *, window: int | None = None) -> KVCacheConfig:
    """One layer with full attention, and one with a window of so many tokens if asked."""
    shape: dict[str, Any] = {
        "block_size": BLOCK,
        "num_kv_heads": 1,
        "head_size": 8,
        "dtype": torch.float32,
    }
    groups = [KVCacheGroupSpec(["full"], FullAttentionSpec(**shape))]
    if window is not None:
        spec = SlidingWindowSpec(**shape, sliding_window=window)
        groups.append(KVCacheGroupSpec(["window"], spec))
    size = blocks * BLOCK_BYTES
    tensors = [KVCacheTensor(size, [group.layer_names[0]], 0, BLOCK_BYTES) for group in groups]
    return KVCacheConfig(num_blocks=blocks, kv_cache_tensors=tensors, kv_cache_groups=groups)


@dataclass
class Engine:
    """The part of a scheduler that concerns KV blocks.

    Args:
        blocks: Size of the pool, with the null block.
        settings: Of the plugin; None: stock vLLM's pool.
        window: Tokens of a second, sliding-window KV cache group.
        events: Whether the pool tells what it caches.
        hash_block: Tokens of a hash: with fewer than a block's, the ends of prompts are cached.
        read_ahead: Tokens that a drafter reads ahead of those computed.
    """

    blocks: int
    settings: KVSettings | None = field(default_factory=KVSettings)
    window: int | None = None
    events: bool = False
    hash_block: int = BLOCK
    read_ahead: int = 0
    manager: KVCacheManager = field(init=False)
    running: dict[str, Request] = field(default_factory=dict)
    cached: dict[str, int] = field(default_factory=dict)
    hit_tokens: int = 0

    def __post_init__(self) -> None:
        config = cache_config(self.blocks, window=self.window)
        arguments: dict[str, Any] = {
            "max_model_len": 4096,
            "scheduler_block_size": BLOCK,
            "hash_block_size": self.hash_block,
            "enable_kv_cache_events": self.events,
        }
        if self.settings is None:
            self.manager = KVCacheManager(config, **arguments)
        else:
            factory = adapter.pool_factory(
                self.settings, config, HIDDEN_SIZE, read_ahead=self.read_ahead
            )
            with adapter.pools_of(factory):
                self.manager = KVCacheManager(config, **arguments)

    @property
    def pool(self) -> MMExtBlockPool:
        pool = self.manager.block_pool
        assert isinstance(pool, MMExtBlockPool)
        return pool

    def told(self) -> list[dict[str, Any]]:
        """The KV events since the last call, as those who read them get them."""
        return [msgspec.to_builtins(event) for event in self.manager.block_pool.take_events()]

    def admit(self, new: Request, chunk: int = 1 << 20) -> int | None:
        """Start a request with some tokens; how many were cached, None if there is no room."""
        found, hit, _ = self.manager.get_computed_blocks(new)
        tokens = min(chunk, new.num_tokens - hit)
        if self.manager.allocate_slots(new, tokens, hit, found) is None:
            return None
        new.num_computed_tokens = hit + tokens
        self.running[new.request_id] = new
        self.cached[new.request_id] = int(hit)
        self.hit_tokens += hit
        return int(hit)

    def extend(self, name: str, chunk: int = 1 << 20) -> bool:
        """Prefill on, or decode one token; whether there was room."""
        old = self.running[name]
        left = old.num_tokens - old.num_computed_tokens
        if left == 0:
            old.append_output_token_ids(9)
            left = 1
        tokens = min(chunk, left)
        if self.manager.allocate_slots(old, tokens) is None:
            return False
        old.num_computed_tokens += tokens
        return True

    def finish(self, name: str) -> None:
        """End a request, finished or aborted."""
        self.manager.free(self.running.pop(name))

    def preempt(self, name: str) -> Request:
        """Take a request's blocks; it may be admitted again."""
        old = self.running.pop(name)
        self.manager.free(old)
        old.num_computed_tokens = 0
        old.num_preemptions += 1
        return old

    def serve(self, new: Request) -> int:
        """Admit and finish a request; its cached tokens."""
        hit = self.admit(new)
        assert hit is not None
        self.finish(new.request_id)
        return hit
