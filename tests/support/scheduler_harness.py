"""vLLM's real scheduler classes without an engine: a model of given costs, and a clock of its own.

Only the model runner is played: a step takes the time its work costs, and every request that has
its prompt gets a token.
"""

from __future__ import annotations

import copy
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import torch
from vllm.config import ECTransferConfig, KVTransferConfig
from vllm.engine.arg_utils import EngineArgs
from vllm.multimodal.inputs import MultiModalFeatureSpec, MultiModalKwargsItem, PlaceholderRange
from vllm.sampling_params import SamplingParams
from vllm.utils.hashing import sha256
from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec
from vllm.v1.outputs import KVConnectorOutput, ModelRunnerOutput
from vllm.v1.request import Request, RequestStatus
from vllm.v1.structured_output import StructuredOutputManager

from vllm_mm_ext.testing.checkpoints import checkpoint

BLOCK = 16
MAX_TOKENS = 2048


@lru_cache(maxsize=1)
def _config() -> Any:
    return EngineArgs(
        model=str(checkpoint("qwen2_5_vl")),
        enforce_eager=True,
        max_model_len=32768,
        max_num_batched_tokens=MAX_TOKENS,
        max_num_seqs=4,
        limit_mm_per_prompt={"video": 1, "image": 0},
        block_size=BLOCK,
    ).create_engine_config()


@dataclass(frozen=True)
class Costs:
    """Seconds of a step, per prompt token, encoder token and decoded token."""

    step_s: float = 0.010
    prefill_s: float = 20e-6
    encoder_s: float = 100e-6
    decode_s: float = 0.0


@dataclass
class Timing:
    """When a request came, got its tokens and ended, in seconds."""

    came: float
    tokens: list[float] = field(default_factory=list)
    ended: float | None = None

    @property
    def wait(self) -> float:
        """Time to first token."""
        return self.tokens[0] - self.came

    @property
    def gaps(self) -> list[float]:
        """Times between tokens."""
        return [b - a for a, b in zip(self.tokens, self.tokens[1:], strict=False)]


def make_scheduler(
    *,
    plugin: bool = True,
    slots: int = 4,
    blocks: int = 8192,
    max_tokens: int = MAX_TOKENS,
    encoder_tokens: int = MAX_TOKENS,
    asynchronous: bool = False,
    stages: int = 1,
    policy: str = "fcfs",
    settings: dict[str, Any] | None = None,
    kv_transfer: KVTransferConfig | None = None,
    ec_transfer: ECTransferConfig | None = None,
    change: Callable[[Any], None] | None = None,
) -> Any:
    """A scheduler of vLLM's, or the plugin's, over a KV cache of so many blocks.

    ``change`` may alter vLLM's configuration before it is built.
    """
    config = copy.deepcopy(_config())
    config.kv_transfer_config = kv_transfer
    config.ec_transfer_config = ec_transfer
    config.scheduler_config.disable_hybrid_kv_cache_manager = kv_transfer is not None
    config.scheduler_config.max_num_seqs = slots
    config.scheduler_config.max_num_batched_tokens = max_tokens
    config.scheduler_config.async_scheduling = asynchronous
    config.parallel_config.pipeline_parallel_size = stages
    config.scheduler_config.policy = policy
    config.cache_config.num_gpu_blocks = blocks
    config.additional_config = {"mm_ext": {"scheduler": settings or {}}}
    if change is not None:
        change(config)
    spec = FullAttentionSpec(BLOCK, num_kv_heads=1, head_size=16, dtype=torch.float32)
    kv = KVCacheConfig(blocks, [], [KVCacheGroupSpec(["layer"], spec)])
    if plugin:
        config.scheduler_config.scheduler_cls = "vllm_mm_ext.scheduler.MMExtScheduler"
    scheduler = config.scheduler_config.get_scheduler_cls()(
        config, kv, StructuredOutputManager(config), BLOCK, log_stats=True
    )
    if hasattr(scheduler, "_publisher"):
        scheduler._publisher.close()
    manager = scheduler.encoder_cache_manager
    scheduler.max_num_encoder_input_tokens = encoder_tokens
    manager.cache_size = manager.num_free_slots = manager.num_freeable_slots = encoder_tokens
    return scheduler


def request(
    name: str,
    *,
    text: int = 32,
    items: Sequence[int] = (),
    answer: int = 4,
    digest: str | None = None,
    priority: int = 0,
    prompt: int = 0,
    sound: int = 0,
) -> Request:
    """A request: text, then items of so many tokens each, then text.

    Args:
        name: Its id.
        text: Tokens before and, as many, after the items.
        items: Tokens of each item.
        answer: Tokens to generate.
        digest: What its media are known by; its name without.
        priority: vLLM's priority.
        prompt: First token, which makes prompts differ.
        sound: Tokens of each item that are a second item's, in the same placeholder.
    """
    init_none_hash(sha256)
    features, offset = [], text
    for number, tokens in enumerate(items):
        heard = torch.arange(tokens) < sound
        for kind, mask in (("video", ~heard), ("audio", heard)):
            if mask.any():
                features.append(
                    MultiModalFeatureSpec(
                        data=MultiModalKwargsItem.dummy(),
                        modality=kind,
                        identifier=f"{digest or name}#{kind}{number}",
                        mm_position=PlaceholderRange(offset, tokens, mask if sound else None),
                    )
                )
        offset += tokens
    length = offset + (text if items else 0)
    start = prompt or sum(ord(letter) * 31**place for place, letter in enumerate(name)) % 50_000
    return Request(
        request_id=name,
        prompt_token_ids=[start, *([7] * (length - 1))],
        sampling_params=SamplingParams(max_tokens=answer, ignore_eos=True),
        pooling_params=None,
        mm_features=features,
        priority=priority,
        block_hasher=get_request_block_hasher(BLOCK, sha256),
    )


class Play:
    """Runs a scheduler against simulated time.

    Args:
        scheduler: The scheduler.
        costs: What steps take.
        depth: Steps in flight: 1, or 2 with async scheduling or two stages of a pipeline.

    Attributes:
        not_sent: Items, as request and place, to be encoded though the runner lacks their inputs.
        lost: Blocks whose KV a connector says, at the end of the next step, it could not load.
    """

    def __init__(self, scheduler: Any, costs: Costs | None = None, *, depth: int = 1) -> None:
        self.scheduler = scheduler
        self.costs = costs or Costs()
        self.now = 0.0
        self.timings: dict[str, Timing] = {}
        self.steps: list[Any] = []
        self.durations: list[float] = []
        self._depth = depth
        self._flying: deque[Any] = deque()
        self.not_sent: list[tuple[str, int]] = []
        self.lost: set[int] = set()
        self._sent: dict[str, list[Any]] = {}
        scheduler._clock = lambda: self.now

    def add(self, *requests: Request, came: float | None = None) -> None:
        """Hand requests to the scheduler; they may have come while a step was running."""
        for one in requests:
            self.timings[one.request_id] = Timing(self.now if came is None else came)
            self.scheduler.add_request(one)

    def abort(self, *names: str) -> None:
        self.scheduler.finish_requests(list(names), RequestStatus.FINISHED_ABORTED)

    @property
    def busy(self) -> bool:
        if not self.scheduler.has_unfinished_requests():
            self.drain()
        return bool(self.scheduler.has_unfinished_requests())

    def step(self) -> Any:
        """Schedule a step, and finish the oldest one once as many are in flight as may be."""
        output = self.scheduler.schedule()
        self.steps.append(output)
        self._send(output)
        self._flying.append(output)
        if len(self._flying) >= self._depth:
            self._finish(self._flying.popleft())
        return output

    def drain(self) -> None:
        while self._flying:
            self._finish(self._flying.popleft())

    def run(self, *, until: float = float("inf"), most: int = 200_000) -> None:
        """Step until nothing is left to do or the time is reached."""
        for _ in range(most):
            if not self.busy or self.now >= until:
                return
            self.step()
        raise AssertionError(f"not done after {most} steps")

    def play(self, arrivals: Iterable[tuple[float, Request]], *, until: float) -> None:
        """Let requests come at their times, and go on until all are done or the time is up."""
        coming = deque(sorted(arrivals, key=lambda pair: pair[0]))
        while (coming or self.busy) and self.now < until:
            while coming and coming[0][0] <= self.now:
                came, one = coming.popleft()
                self.add(one, came=came)
            if self.busy:
                self.step()
            elif coming:
                self.now = coming[0][0]

    def duration(self, output: Any) -> float:
        scheduler, costs = self.scheduler, self.costs
        prefill = encoder = decoded = 0
        for count in output.num_scheduled_tokens.values():
            prefill += count if count > 1 else 0
            decoded += count == 1
        for name, indices in output.scheduled_encoder_inputs.items():
            one = scheduler.requests.get(name)
            encoder += sum(one.get_num_encoder_embeds(i) for i in indices) if one else 0
        if not output.num_scheduled_tokens:
            return 0.001
        decoding_s = costs.step_s + decoded * costs.decode_s
        return decoding_s + prefill * costs.prefill_s + encoder * costs.encoder_s

    def _finish(self, output: Any) -> None:
        self.durations.append(self.duration(output))
        self.now += self.durations[-1]
        names = list(output.num_scheduled_tokens)
        sampled = []
        for name in names:
            one = self.scheduler.requests.get(name)
            sampled.append([11] if one is not None and self._samples(one, output) else [])
        result = ModelRunnerOutput(
            req_ids=names,
            req_id_to_index={name: place for place, name in enumerate(names)},
            sampled_token_ids=sampled,
            kv_connector_output=KVConnectorOutput(invalid_block_ids=self.lost),
        )
        self.lost = set()
        for outputs in self.scheduler.update_from_output(output, result).values():
            for one in outputs.outputs:
                timing = self.timings[one.request_id]
                timing.tokens += [self.now] * len(one.new_token_ids)
                if one.finish_reason is not None:
                    timing.ended = self.now

    def _send(self, output: Any) -> None:
        """What a V1 model runner keeps of requests, and must have for what it is to encode."""
        self._sent |= {new.req_id: new.mm_features for new in output.scheduled_new_reqs}
        self.not_sent += [
            (name, index)
            for name, indices in output.scheduled_encoder_inputs.items()
            for index in indices
            if not self._sent[name][index].data
        ]

    def _samples(self, one: Request, output: Any) -> bool:
        """Whether the step computes the request's last known token."""
        cached = output.scheduled_cached_reqs
        computed = dict(zip(cached.req_ids, cached.num_computed_tokens, strict=True))
        computed |= {new.req_id: new.num_computed_tokens for new in output.scheduled_new_reqs}
        reached = computed[one.request_id] + output.num_scheduled_tokens[one.request_id]
        return reached >= one.num_tokens
