"""vLLM's real scheduler with both tiers of the encoder cache, and a worker that checks it.

Only the model is played: what is encoded is a tensor that tells by its values which item it is.
"""

from __future__ import annotations

import copy
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from vllm.distributed.ec_transfer.ec_connector.base import ECConnectorRole
from vllm.engine.arg_utils import EngineArgs
from vllm.multimodal.inputs import MultiModalFeatureSpec, PlaceholderRange
from vllm.sampling_params import SamplingParams
from vllm.utils.hashing import sha256
from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec
from vllm.v1.outputs import ModelRunnerOutput
from vllm.v1.request import Request, RequestStatus
from vllm.v1.structured_output import StructuredOutputManager

from vllm_mm_ext.encoder_cache.connector import MMExtECConnector
from vllm_mm_ext.encoder_cache.startup import keep_raw_embeddings_out
from vllm_mm_ext.testing.checkpoints import checkpoint
from vllm_mm_ext.testing.engine_arguments import BOTH_TIERS

BLOCK = 16
# Values of an embedding.
WIDTH = 64
EMBEDDING_MB = 4 * WIDTH / (1 << 20)


@dataclass(frozen=True)
class Item:
    """An mm item: the same name is the same content.

    Attributes:
        name: Its identifier.
        tokens: Embeddings.
        joins: It shares the placeholder of the item before it, as a video's sound does.
    """

    name: str
    tokens: int
    joins: bool = False


@lru_cache(maxsize=1)
def engine_config() -> Any:
    """A configuration with both tiers, as the command line would make it."""
    keep_raw_embeddings_out()
    return EngineArgs(
        model=str(checkpoint("qwen2_5_vl")),
        enforce_eager=True,
        dtype="float32",
        max_model_len=8192,
        max_num_batched_tokens=1024,
        limit_mm_per_prompt={"video": 1, "image": 0},
        block_size=BLOCK,
        **BOTH_TIERS,
    ).create_engine_config()


def request(name: str, items: Sequence[Item], *, priority: int = 0, answer: int = 3) -> Request:
    """A request about items, with a little text around each."""
    init_none_hash(sha256)
    features: list[MultiModalFeatureSpec] = []
    offset, tokens = 8, [sum(name.encode()) % 1000] * 8
    for item in items:
        begin = features[-1].mm_position.offset if item.joins else offset
        mask = None
        if item.joins:
            # The sound's embeddings alternate with those of the picture, after them here.
            mask = torch.zeros(features[-1].mm_position.length + item.tokens, dtype=torch.bool)
            mask[-item.tokens :] = True
            earlier = features[-1].mm_position
            features[-1].mm_position = PlaceholderRange(earlier.offset, len(mask), ~mask)
            tokens += [7] * item.tokens
            offset += item.tokens
            place = PlaceholderRange(begin, len(mask), mask)
        else:
            place = PlaceholderRange(begin, item.tokens)
            tokens += [7] * item.tokens
            offset += item.tokens
        modality = "audio" if item.joins else "video"
        features.append(MultiModalFeatureSpec(None, modality, item.name, place))
    tokens += [9] * 8
    return Request(
        request_id=name,
        prompt_token_ids=tokens,
        sampling_params=SamplingParams(max_tokens=answer, ignore_eos=True),
        pooling_params=None,
        mm_features=features,
        priority=priority,
        block_hasher=get_request_block_hasher(BLOCK, sha256),
    )


class Engine:
    """A scheduler and its worker.

    Args:
        device: Budget of the device tier in embeddings.
        host: Budget of the host tier in embeddings.
        blocks: KV blocks.
        chunk: Tokens of a step.
        policy: vLLM's scheduling policy.
        scheduler: vLLM's scheduler class, or a subclass.
        depth: Steps in flight: 2 with an asynchronous scheduler.
    """

    def __init__(
        self,
        *,
        device: int = 256,
        host: int = 512,
        blocks: int = 400,
        chunk: int = 256,
        encoder_tokens: int = 1024,
        policy: str = "fcfs",
        slots: int = 4,
        scheduler: Any = Scheduler,
        depth: int = 1,
    ) -> None:
        config = copy.deepcopy(engine_config())
        config.scheduler_config.max_num_seqs = slots
        config.scheduler_config.max_num_batched_tokens = chunk
        config.scheduler_config.policy = policy
        config.scheduler_config.async_scheduling = depth > 1
        config.cache_config.num_gpu_blocks = blocks
        sizes = {"device_mb": device * EMBEDDING_MB, "host_mb": host * EMBEDDING_MB}
        config.additional_config = {"mm_ext": {"encoder_cache": sizes}}
        widths = config.ec_transfer_config.mm_encoder_output_widths
        widths |= {"video": WIDTH, "audio": WIDTH}
        spec = FullAttentionSpec(BLOCK, num_kv_heads=1, head_size=16, dtype=torch.float32)
        kv = KVCacheConfig(blocks, [], [KVCacheGroupSpec(["layer"], spec)])
        self.scheduler = scheduler(config, kv, StructuredOutputManager(config), BLOCK)
        self.scheduler.max_num_encoder_input_tokens = encoder_tokens
        self.manager = self.scheduler.encoder_cache_manager
        self.connector = self.scheduler.ec_connector
        self.worker = MMExtECConnector(config, ECConnectorRole.WORKER)
        self.device: dict[str, torch.Tensor] = {}
        self.encoded: list[str] = []
        self.loaded: list[str] = []
        self.most_device = 0
        self._features: dict[str, Any] = {}
        self._depth = depth
        self._flying: deque[Any] = deque()

    def add(self, *requests: Request) -> None:
        for one in requests:
            self._features[one.request_id] = one.mm_features
            self.scheduler.add_request(one)

    def abort(self, *names: str) -> None:
        self.scheduler.finish_requests(list(names), RequestStatus.FINISHED_ABORTED)

    def reset(self) -> None:
        """As the engine does when the model's weights have changed."""
        self.scheduler.reset_encoder_cache()
        self.device.clear()

    @property
    def busy(self) -> bool:
        return bool(self.scheduler.has_unfinished_requests() or self._flying)

    def run(self, most: int = 2000) -> None:
        for _ in range(most):
            if not self.busy:
                self.check()
                return
            self.step()
        raise AssertionError(f"not done after {most} steps")

    def step(self) -> None:
        """Schedule a step and execute the oldest one that is due; what belongs together agrees."""
        self._flying.append(self.scheduler.schedule())
        self.manager.check_integrity()
        while self._flying and (
            len(self._flying) >= self._depth or not self.scheduler.has_unfinished_requests()
        ):
            self._finish(self._flying.popleft())

    def _finish(self, output: Any) -> None:
        self._execute(output)
        if not self._flying:
            self.check()
        names = list(output.num_scheduled_tokens)
        result = ModelRunnerOutput(
            req_ids=names,
            req_id_to_index={name: place for place, name in enumerate(names)},
            sampled_token_ids=[[11] if self._samples(name, output) else [] for name in names],
        )
        self.scheduler.update_from_output(output, result)
        self.manager.check_integrity()

    def check(self) -> None:
        """The worker holds what the scheduler believes, within the budgets."""
        self.manager.check_integrity()
        self.connector._tier.check_integrity()
        assert self.device.keys() == self.manager._embeds.keys()
        kept = self.worker._store._kept
        assert len(kept) == len(self.connector._tier)
        assert all(key in self.connector._tier for key in kept)
        assert sum(t.nbytes for t, _ in kept.values()) == self.connector._tier.held
        self.most_device = max(self.most_device, sum(t.nbytes for t in self.device.values()))

    def _execute(self, output: Any) -> None:
        for key in output.free_encoder_mm_hashes:
            self.device.pop(key, None)
        if not output.total_num_scheduled_tokens:
            return
        self.worker.bind_connector_metadata(output.ec_connector_metadata)
        before = set(self.device)
        self.worker.start_load_caches(self.device)
        self.loaded += self.device.keys() - before
        for name, indices in output.scheduled_encoder_inputs.items():
            for index in indices:
                feature = self._features[name][index]
                key, count = feature.identifier, feature.mm_position.get_num_embeds()
                self.device[key] = _output(key, count)
                self.encoded.append(key)
                self.worker.save_caches(self.device, key)
        for name, begin, count in _computed(output):
            self._gather(name, begin, begin + count)
        self.worker.clear_connector_metadata()

    def _gather(self, name: str, begin: int, end: int) -> None:
        for feature in self._features[name]:
            place = feature.mm_position
            first, last = max(begin - place.offset, 0), min(end - place.offset, place.length)
            if first >= last:
                continue
            one, other = place.get_embeds_indices_in_range(first, last)
            if one < other:
                expected = _output(feature.identifier, place.get_num_embeds())
                assert torch.equal(self.device[feature.identifier][one:other], expected[one:other])

    def _samples(self, name: str, output: Any) -> bool:
        one = self.scheduler.requests.get(name)
        if one is None:
            return False
        begin, count = next((b, c) for n, b, c in _computed(output) if n == name)
        return bool(begin + count >= one.num_tokens)


def _computed(output: Any) -> list[tuple[str, int, int]]:
    cached = output.scheduled_cached_reqs
    begins = dict(zip(cached.req_ids, cached.num_computed_tokens, strict=True))
    begins |= {new.req_id: new.num_computed_tokens for new in output.scheduled_new_reqs}
    return [(name, begins[name], count) for name, count in output.num_scheduled_tokens.items()]


def _output(key: str, tokens: int) -> torch.Tensor:
    return torch.full((tokens, WIDTH), float(sum(key.encode()) + 1000 * tokens))
