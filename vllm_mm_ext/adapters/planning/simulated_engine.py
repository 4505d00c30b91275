"""vLLM's scheduler without an engine, for estimates: what each step would hold."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from vllm_mm_ext.planner.request_tokens import RequestTokens
from vllm_mm_ext.planner.step_contents import (
    RequestPart,
    StepContents,
    encoder_work,
    inputs_of,
    step_contents,
)

# Text that chat templates put before the media of a question.
_BEFORE_MEDIA = 8
_TOKEN = 7
# Empty steps after which the scheduler does not get on: it leaves refused requests alone for less.
_EMPTY_STEPS = 32


@dataclass(frozen=True)
class EngineShape:
    """What an engine has room for.

    Attributes:
        block_size: Tokens of a KV block.
        blocks: KV blocks.
        encoder_tokens: Encoder outputs of a step, and in the encoder cache.
    """

    block_size: int
    blocks: int
    encoder_tokens: int


class SimulatedEngine:
    """Equal requests in the scheduler that would serve them, its KV and encoder cache managers.

    Scheduler and requests are vLLM's, or the plugin's where the configuration names it.

    Args:
        vllm_config: vLLM's configuration of the engine.
        shape: What the engine has room for.
        request: What each request holds. No two of them share any media.
    """

    def __init__(self, vllm_config: Any, shape: EngineShape, request: RequestTokens) -> None:
        self._now = 0.0
        self._request, self._works = request, encoder_work(request)
        self._scheduler = _scheduler(vllm_config, shape)
        # The plugin's scheduler learns from it what steps cost.
        self._scheduler._clock = lambda: self._now
        self._output: Any = None

    def add(self, number: int, now: float) -> None:
        """As ``planner.estimate.SteppedEngine`` says."""
        self._now = now
        self._scheduler.add_request(_request(number, self._request))

    def begin(self, now: float) -> StepContents | None:
        """As ``planner.estimate.SteppedEngine`` says."""
        self._now = now
        if not self._scheduler.has_unfinished_requests():
            return None
        for _ in range(_EMPTY_STEPS):
            self._output = self._scheduler.schedule()
            if self._output.total_num_scheduled_tokens:
                return step_contents(self._parts())
            # As an engine does, which asks again at once.
            self.end(now)
        return None

    def end(self, now: float) -> list[tuple[int, bool]]:
        """As ``planner.estimate.SteppedEngine`` says."""
        from vllm.v1.outputs import ModelRunnerOutput

        self._now = now
        output, scheduler = self._output, self._scheduler
        keys = list(output.num_scheduled_tokens)
        # ``schedule`` has counted the step's tokens as computed.
        requests = [scheduler.requests[key] for key in keys]
        have_prompt = [one.num_computed_tokens >= one.num_tokens for one in requests]
        result = ModelRunnerOutput(
            keys,
            {key: place for place, key in enumerate(keys)},
            [[_TOKEN] if have else [] for have in have_prompt],
        )
        scheduler.update_from_output(output, result)
        return [
            (int(key), one.is_finished())
            for key, one, have in zip(keys, requests, have_prompt, strict=True)
            if have
        ]

    def close(self) -> None:
        """End the scheduler."""
        self._scheduler.shutdown()

    def _parts(self) -> Iterator[RequestPart]:
        encoded = self._output.scheduled_encoder_inputs
        for key, tokens in self._output.num_scheduled_tokens.items():
            request = self._scheduler.requests[key]
            # ``schedule`` has counted the step's tokens as computed.
            before = request.num_computed_tokens - tokens
            items = [self._works[index] for index in encoded.get(key, ())]
            inputs = inputs_of(self._works) if not before else 0
            yield RequestPart(tokens, before, request.num_prompt_tokens, items, inputs)


def _scheduler(vllm_config: Any, shape: EngineShape) -> Any:
    """A scheduler whose caches hold what the shape says."""
    import torch
    from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec
    from vllm.v1.structured_output import StructuredOutputManager

    config = copy.deepcopy(vllm_config)
    # Each step ends before the next one is scheduled.
    config.scheduler_config.async_scheduling = False
    config.cache_config.num_gpu_blocks = shape.blocks
    config.cache_config.enable_prefix_caching = False
    config.ec_transfer_config = None
    spec = FullAttentionSpec(shape.block_size, num_kv_heads=1, head_size=16, dtype=torch.float32)
    kv = KVCacheConfig(shape.blocks, [], [KVCacheGroupSpec(["layer"], spec)])
    make = config.scheduler_config.get_scheduler_cls()
    scheduler = make(config, kv, StructuredOutputManager(config), shape.block_size, log_stats=False)
    scheduler.max_num_encoder_input_tokens = shape.encoder_tokens
    manager = scheduler.encoder_cache_manager
    manager.cache_size = manager.num_free_slots = shape.encoder_tokens
    manager.num_freeable_slots = shape.encoder_tokens
    return scheduler


def _request(number: int, tokens: RequestTokens) -> Any:
    """A request: some text, its media with what is around them, and the rest of the text."""
    from vllm.multimodal.inputs import MultiModalFeatureSpec, PlaceholderRange
    from vllm.sampling_params import SamplingParams
    from vllm.v1.request import Request

    features: list[Any] = []
    offset = min(_BEFORE_MEDIA, tokens.text)
    for medium in tokens.media:
        offset += medium.stages.text
        for item in medium.items:
            place = PlaceholderRange(offset, item.embeddings)
            name = f"{number} {len(features)}"
            features.append(MultiModalFeatureSpec(None, item.modality, name, place))
            offset += item.embeddings
    return Request(
        str(number),
        [_TOKEN] * tokens.prompt,
        SamplingParams(max_tokens=tokens.output, ignore_eos=True),
        None,
        mm_features=features,
    )
