"""vLLM's real scheduler classes on a simulated clock: all of an engine but its model.

Scheduler, KV cache manager, encoder cache manager and requests are vLLM's. A step takes what its
contents cost, and each request that has its prompt gets a token.
"""

from __future__ import annotations

import copy
import time
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

BLOCK = 64
# Where each video begins in its prompt, and how much text is behind it.
VIDEO_BEGINS = 32


@dataclass(frozen=True)
class EngineShape:
    """What a simulated engine has room for.

    Attributes:
        slots: ``--max-num-seqs``.
        step_tokens: ``--max-num-batched-tokens``.
        encoder_tokens: Encoder outputs of a step, and in the encoder cache.
        blocks: KV blocks of 64 tokens.
        priorities: Whether requests are scheduled by priority.
    """

    slots: int
    step_tokens: int
    encoder_tokens: int
    blocks: int = 1 << 14
    priorities: bool = False


@lru_cache(maxsize=1)
def _config() -> Any:
    from vllm.engine.arg_utils import EngineArgs

    from vllm_mm_ext.testing.checkpoints import checkpoint

    return EngineArgs(
        model=str(checkpoint("qwen2_5_vl")),
        enforce_eager=True,
        max_model_len=32768,
        block_size=BLOCK,
        async_scheduling=False,
        limit_mm_per_prompt={"video": 1, "image": 0},
    ).create_engine_config()


def build_scheduler(
    shape: EngineShape, settings: dict[str, Any] | None, *, prefix_caching: bool = False
) -> Any:
    """A scheduler without an engine.

    Args:
        shape: What it has room for.
        settings: The plugin's section ``scheduler``; None: vLLM's scheduler.
        prefix_caching: Requests have hashes of their blocks, and KV is looked up by these.
    """
    import torch
    from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec
    from vllm.v1.structured_output import StructuredOutputManager

    config = copy.deepcopy(_config())
    scheduling = config.scheduler_config
    scheduling.max_num_seqs = shape.slots
    scheduling.max_num_batched_tokens = shape.step_tokens
    scheduling.policy = "priority" if shape.priorities else "fcfs"
    config.cache_config.num_gpu_blocks = shape.blocks
    config.cache_config.enable_prefix_caching = prefix_caching
    if settings is not None:
        scheduling.scheduler_cls = "vllm_mm_ext.scheduler.MMExtScheduler"
        config.additional_config = {"mm_ext": {"scheduler": settings}}
    spec = FullAttentionSpec(BLOCK, num_kv_heads=1, head_size=16, dtype=torch.float32)
    kv = KVCacheConfig(shape.blocks, [], [KVCacheGroupSpec(["layer"], spec)])
    make = scheduling.get_scheduler_cls()
    scheduler = make(config, kv, StructuredOutputManager(config), BLOCK, log_stats=True)
    scheduler.max_num_encoder_input_tokens = shape.encoder_tokens
    manager = scheduler.encoder_cache_manager
    manager.cache_size = manager.num_free_slots = shape.encoder_tokens
    manager.num_freeable_slots = shape.encoder_tokens
    return scheduler


def build_request(
    name: str,
    *,
    text: int,
    items: Iterable[int] = (),
    answer: int,
    priority: int = 0,
    hashed: bool = False,
) -> Any:
    """A request: text, with the items of a video behind its first ``VIDEO_BEGINS`` tokens.

    Args:
        name: Its id, by which the items are known as well.
        text: Tokens of text in its prompt.
        items: Encoder outputs of each item.
        answer: Tokens to generate.
        priority: vLLM's priority.
        hashed: Its blocks can be looked up in the prefix cache.
    """
    from vllm.multimodal.inputs import MultiModalFeatureSpec, PlaceholderRange
    from vllm.sampling_params import SamplingParams
    from vllm.utils.hashing import sha256
    from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash
    from vllm.v1.request import Request

    features, offset = [], VIDEO_BEGINS
    for number, tokens in enumerate(items):
        place = PlaceholderRange(offset, tokens)
        features.append(MultiModalFeatureSpec(None, "video", f"{name} {number}", place))
        offset += tokens
    if hashed:
        init_none_hash(sha256)
    return Request(
        name,
        [7] * (text + offset - VIDEO_BEGINS),
        SamplingParams(max_tokens=answer, ignore_eos=True),
        None,
        mm_features=features,
        priority=priority,
        block_hasher=get_request_block_hasher(BLOCK, sha256) if hashed else None,
    )


@dataclass
class Timing:
    """When a request came and got its tokens, in seconds on the simulated clock."""

    came: float
    tokens: list[float] = field(default_factory=list)


class SimulatedEngine:
    """Steps of a scheduler, its model's answers, and the clock.

    Args:
        scheduler: The scheduler.
        seconds: What a step takes, from vLLM's output of its scheduling.

    Attributes:
        now: The clock, in seconds.
        timings: Of every request, by id.
    """

    def __init__(self, scheduler: Any, seconds: Callable[[Any], float]) -> None:
        self._scheduler = scheduler
        self._seconds = seconds
        self.now = 0.0
        self.timings: dict[str, Timing] = {}
        scheduler._clock = lambda: self.now

    def add(self, request: Any, came: float | None = None) -> None:
        """A request comes, or came while a step was running."""
        self.timings[request.request_id] = Timing(self.now if came is None else came)
        self._scheduler.add_request(request)

    def step(self) -> tuple[float, float]:
        """Take a step; returns CPU seconds of scheduling, and of taking the output in."""
        from vllm.v1.outputs import ModelRunnerOutput

        scheduler = self._scheduler
        # The machine may be shared, so only this thread's time counts.
        began = time.thread_time()
        output = scheduler.schedule()
        scheduled = time.thread_time() - began
        self.now += self._seconds(output)
        keys = list(output.num_scheduled_tokens)
        # ``schedule`` has counted the step's tokens as computed.
        done = [scheduler.requests[key] for key in keys]
        tokens = [[11] if one.num_computed_tokens >= one.num_tokens else [] for one in done]
        for key, token in zip(keys, tokens, strict=True):
            if token:
                self.timings[key].tokens.append(self.now)
        places = {key: place for place, key in enumerate(keys)}
        result = ModelRunnerOutput(keys, places, tokens)
        began = time.thread_time()
        scheduler.update_from_output(output, result)
        return scheduled, time.thread_time() - began

    def play(self, arrivals: Iterable[tuple[float, Any]]) -> None:
        """Let requests come at their times, and go on until all have been answered."""
        coming = deque(arrivals)
        while coming or self._scheduler.has_unfinished_requests():
            while coming and coming[0][0] <= self.now:
                came, request = coming.popleft()
                self.add(request, came)
            if self._scheduler.has_unfinished_requests():
                self.step()
            else:
                self.now = coming[0][0]
