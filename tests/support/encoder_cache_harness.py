"""vLLM's real scheduler with both tiers of the encoder cache, and a worker that checks it.

Only the model is played: what is encoded is a tensor that tells by its values which item it is, and
KV tells of which tokens and items it was computed.
"""

from __future__ import annotations

import copy
from collections import Counter, deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from vllm.distributed.ec_transfer import ec_transfer_state
from vllm.distributed.ec_transfer.ec_connector.base import ECConnectorRole
from vllm.engine.arg_utils import EngineArgs
from vllm.multimodal.inputs import MultiModalFeatureSpec, PlaceholderRange
from vllm.sampling_params import SamplingParams
from vllm.utils.hashing import sha256
from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec
from vllm.v1.outputs import ECConnectorOutput, ModelRunnerOutput
from vllm.v1.request import Request, RequestStatus
from vllm.v1.structured_output import StructuredOutputManager
from vllm.v1.worker.gpu.ec_connector import ActiveECConnector

from vllm_mm_ext.adapters.encoder_cache import failed_loads
from vllm_mm_ext.adapters.encoder_cache.ec_connector import MMExtECConnector
from vllm_mm_ext.adapters.encoder_cache.startup import keep_raw_embeddings_out
from vllm_mm_ext.adapters.kv import install as adapter
from vllm_mm_ext.adapters.kv.block_pool import MMExtBlockPool
from vllm_mm_ext.adapters.patches import all_or_none
from vllm_mm_ext.testing.checkpoints import checkpoint
from vllm_mm_ext.testing.engine_arguments import BOTH_TIERS

BLOCK = 16
# Values of an embedding.
WIDTH = 64
EMBEDDING_MB = 4 * WIDTH / (1 << 20)
# Seconds of a step, of a prompt or answer token and of an encoded item, on the engine's own clock.
STEP_S, TOKEN_S, ITEM_S = 0.01, 1e-4, 0.01
# What is answered.
ANSWER = 11


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
    with all_or_none("raw embeddings"):
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


def request(
    name: str,
    items: Sequence[Item],
    *,
    priority: int = 0,
    answer: int = 3,
    begins: str | None = None,
    text: int = 8,
    session: str | None = None,
) -> Request:
    """A request about items, with a little text around them.

    Args:
        name: Its id.
        items: What it is about.
        priority: vLLM's priority.
        answer: Tokens to generate.
        begins: Of equal ones the text before the items is equal; the name without.
        text: Tokens after the items.
        session: Its ``session_id``.
    """
    init_none_hash(sha256)
    features: list[MultiModalFeatureSpec] = []
    offset, tokens = 8, [sum((begins or name).encode()) % 1000] * 8
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
    tokens += [9] * text
    return Request(
        request_id=name,
        prompt_token_ids=tokens,
        sampling_params=SamplingParams(max_tokens=answer, ignore_eos=True),
        pooling_params=None,
        mm_features=features,
        priority=priority,
        session_id=session,
        block_hasher=get_request_block_hasher(BLOCK, sha256),
    )


class WorkerKV:
    """KV in blocks: of each token what it depends on, all before it and itself, as a number.

    Args:
        blocks: How many.

    Attributes:
        may_be_wrong: Some may depend on wrong KV, if their answers are dropped.
    """

    def __init__(self, blocks: int) -> None:
        self._values = np.zeros((blocks, BLOCK), np.int64)
        self._tables: dict[str, list[int]] = {}
        self._right: dict[str, Any] = {}
        self.may_be_wrong = False

    def add(self, one: Request) -> None:
        """Work out what is right for a request."""
        assert one.prompt_token_ids is not None
        items: dict[int, tuple[str, ...]] = {}
        for feature in one.mm_features:
            begin = feature.mm_position.offset
            items[begin] = (*items.get(begin, ()), feature.identifier)
        right, before = [], 0
        for place, token in enumerate([*one.prompt_token_ids, *[ANSWER] * one.max_tokens]):
            before = hash((before, token, items.get(place)))
            right.append(before)
        self._right[one.request_id] = np.array(right, np.int64)

    def compute(self, output: Any, lost: set[str]) -> set[str]:
        """Write what a step computes; what it does not compute must be there.

        Args:
            output: The step.
            lost: Requests that lack an encoder output in it: their KV is wrong from here on.

        Returns:
            These, and where there are some at all those whose KV depends on wrong KV.
        """
        for new in output.scheduled_new_reqs:
            self._tables[new.req_id] = list(new.block_ids[0])
        cached = output.scheduled_cached_reqs
        for name, ids in zip(cached.req_ids, cached.new_block_ids, strict=True):
            if name in cached.resumed_req_ids:
                self._tables[name] = []
            self._tables[name] += ids[0] if ids else []
        work = _computed(output)
        # A prompt that begins like another of the same step attends to what that one writes.
        for name, begin, count in work:
            places = self._places(name, begin, begin + count)
            self._values[places] = self._right[name][begin : begin + count]
            if name in lost:
                self._values[places] = 0
        for name, begin, count in work:
            end = begin + count
            there = self._values[self._places(name, 0, end)]
            wrong = np.flatnonzero(there != self._right[name][:end])
            if len(wrong):
                said = f"{name}: wrong KV from token {wrong[0]} on, {begin} were there"
                assert self.may_be_wrong, said
                self._values[self._places(name, begin, end)] = 0
                lost = lost | {name}
        return lost

    def _places(self, name: str, begin: int, end: int) -> tuple[Any, Any]:
        tokens = np.arange(begin, end)
        return np.array(self._tables[name])[tokens // BLOCK], tokens % BLOCK


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
        kv: The plugin's settings of KV blocks; without them the block pool is vLLM's.
        settings: The plugin's settings of its scheduler.
        shared: Directory of a store that several instances share.
        role: vLLM's ``ec_role``.
        second_runner: The connector is used as by vLLM's second model runner (CUDA).
        read_ahead: Tokens that a drafter reads ahead of those computed.

    Attributes:
        now_s: The clock of the plugin's parts.
        answers: Tokens that requests have been given.
        encoded, loaded: Items that were encoded, and those the host tier had.
        evicted: Items that the device tier gave up.
        given_up: Items that the block pool stopped keeping while steps were scheduled or ended.
        found: Prompt tokens that were in KV when a request was let in first.
        preempted: Times that a request lost its blocks to another.
        most_device: Most bytes of encoder outputs on the device.
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
        kv: Mapping[str, Any] | None = None,
        settings: Mapping[str, Any] | None = None,
        shared: Path | None = None,
        role: str = "ec_both",
        second_runner: bool = False,
        read_ahead: int = 0,
    ) -> None:
        config = copy.deepcopy(engine_config())
        config.scheduler_config.max_num_seqs = slots
        config.scheduler_config.max_num_batched_tokens = chunk
        config.scheduler_config.policy = policy
        config.scheduler_config.async_scheduling = depth > 1
        config.cache_config.num_gpu_blocks = blocks
        sizes = {"device_mb": device * EMBEDDING_MB, "host_mb": host * EMBEDDING_MB}
        with all_or_none("KV blocks"):
            adapter.install()
        with all_or_none("shared encoder outputs"):
            failed_loads.install()
        pool = {"enabled": False} if kv is None else dict(kv)
        config.additional_config = {
            "mm_ext": {"encoder_cache": sizes, "kv": pool, "scheduler": dict(settings or {})}
        }
        transfer = config.ec_transfer_config
        if shared is not None:
            transfer.ec_role, transfer.engine_id = role, f"engine {id(self)}"
            transfer.ec_connector_extra_config = {
                "transport": "ECExampleConnector",
                "shared_storage_path": str(shared),
            }
            config.model_config.mm_ext_plan = {"model": "played"}
        widths = config.ec_transfer_config.mm_encoder_output_widths
        widths |= {"video": WIDTH, "audio": WIDTH}
        spec = FullAttentionSpec(BLOCK, num_kv_heads=1, head_size=16, dtype=torch.float32)
        cache = KVCacheConfig(blocks, [], [KVCacheGroupSpec(["layer"], spec)])
        with patch.object(type(config), "num_prefill_lookahead_tokens", read_ahead):
            self.scheduler = scheduler(config, cache, StructuredOutputManager(config), BLOCK)
        self._read_ahead = read_ahead
        self.scheduler.max_num_encoder_input_tokens = encoder_tokens
        self.manager = self.scheduler.encoder_cache_manager
        self.connector = self.scheduler.ec_connector
        self.worker = MMExtECConnector(config, ECConnectorRole.WORKER)
        self.kv = WorkerKV(blocks)
        self.device: dict[str, torch.Tensor] = {}
        self._second: ActiveECConnector | None = None
        if second_runner:
            with patch.object(ec_transfer_state, "_EC_CONNECTOR_AGENT", self.worker):
                self._second = ActiveECConnector(config, self.device)
        self.now_s = 0.0
        self.answers: Counter[str] = Counter()
        self.encoded: list[str] = []
        self.loaded: list[str] = []
        self.evicted = self.given_up = self.found = self.preempted = self.most_device = 0
        self.scheduler._clock = self._clock
        self._preempt = self.scheduler._preempt_request
        self.scheduler._preempt_request = self._preempt_request
        self._keeps = kv is not None
        self._features: dict[str, Any] = {}
        self._depth = depth
        self._flying: deque[Any] = deque()

    @property
    def pool(self) -> MMExtBlockPool:
        """The plugin's block pool."""
        pool = self.scheduler.kv_cache_manager.block_pool
        assert isinstance(pool, MMExtBlockPool)
        return pool

    def _clock(self) -> float:
        return self.now_s

    def _preempt_request(self, one: Request, *args: Any, **kwargs: Any) -> None:
        """As vLLM's; what the request was to compute in this very pass is not found any more.

        By priority vLLM takes back what it has scheduled, and lets later requests find in the
        prefix cache what was never computed, with its own block pool as with any other.
        """
        manager = self.scheduler.kv_cache_manager
        (held_by,) = manager.coordinator.single_type_managers
        blocks = held_by.req_to_blocks[one.request_id][one.num_computed_tokens // BLOCK :]
        self._preempt(one, *args, **kwargs)
        manager.evict_blocks({block.block_id for block in blocks if block.block_hash is not None})

    def add(self, *requests: Request) -> None:
        for one in requests:
            self._features[one.request_id] = one.mm_features
            self.kv.add(one)
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

    def drain(self) -> None:
        """End all steps in flight."""
        while self._flying:
            self._finish(self._flying.popleft())

    def step(self) -> None:
        """Schedule a step and execute the oldest one that is due; what belongs together agrees."""
        with self._watched():
            self._flying.append(self.scheduler.schedule())
        self._count(self._flying[-1])
        self.manager.check_integrity()
        self.check_blocks()
        while self._flying and (
            len(self._flying) >= self._depth or not self.scheduler.has_unfinished_requests()
        ):
            self._finish(self._flying.popleft())

    def _finish(self, output: Any) -> None:
        told, lost = self._execute(output)
        failed = told is not None and told.ec_connector_worker_meta is not None
        if not (self._flying or failed):
            self.check()
        names = list(output.num_scheduled_tokens)
        result = ModelRunnerOutput(
            req_ids=names,
            req_id_to_index={name: place for place, name in enumerate(names)},
            sampled_token_ids=[[ANSWER] if self._samples(name, output) else [] for name in names],
            ec_connector_output=told,
        )
        with self._watched():
            results = self.scheduler.update_from_output(output, result)
        for each in results.values():
            for one in each.outputs:
                assert one.request_id not in lost or not one.new_token_ids, "answers of nothing"
                self.answers[one.request_id] += len(one.new_token_ids)
        self.manager.check_integrity()
        self.check_blocks()

    @contextmanager
    def _watched(self) -> Iterator[None]:
        """Count what the block pool gives up meanwhile."""
        before = self.pool.evictions if self._keeps else 0
        yield
        self.given_up += self.pool.evictions - before if self._keeps else 0

    def _count(self, output: Any) -> None:
        encoded = sum(map(len, output.scheduled_encoder_inputs.values()))
        self.now_s += STEP_S + TOKEN_S * output.total_num_scheduled_tokens + ITEM_S * encoded
        self.preempted += len(output.preempted_req_ids or ())
        self.evicted += len(output.free_encoder_mm_hashes)
        self.found += sum(new.num_computed_tokens for new in output.scheduled_new_reqs)

    def check_blocks(self) -> None:
        """Blocks are held by those who use them and by nobody else."""
        manager = self.scheduler.kv_cache_manager
        if self._keeps:
            self.pool.check_integrity()
        (held_by,) = manager.coordinator.single_type_managers
        uses = Counter(
            block.block_id for blocks in held_by.req_to_blocks.values() for block in blocks
        )
        blocks = manager.block_pool.blocks
        assert all(block.ref_cnt == uses[block.block_id] for block in blocks[1:])
        assert manager.block_pool.get_num_free_blocks() == len(blocks) - 1 - len(uses)

    def check(self) -> None:
        """The worker holds what the scheduler believes, within the budgets."""
        self.manager.check_integrity()
        self.connector._tier.check_integrity()
        # What an aborted request gave up since the step was scheduled the next one will name.
        dropped = set(self.manager._freed) - self.manager._embeds.keys()
        assert self.device.keys() - dropped == self.manager._embeds.keys()
        # That new weights have come the worker is told with the next plan.
        if not self.connector._tier._pass.clear:
            kept = self.worker._store._kept
            assert len(kept) == len(self.connector._tier)
            assert all(key in self.connector._tier for key in kept)
            assert sum(t.nbytes for t, _ in kept.values()) == self.connector._tier.held
        self.most_device = max(self.most_device, sum(t.nbytes for t in self.device.values()))

    def _execute(self, output: Any) -> tuple[Any, set[str]]:
        """What the connector tells the scheduler, and requests whose KV is wrong now."""
        for key in output.free_encoder_mm_hashes:
            self.device.pop(key, None)
        if not output.total_num_scheduled_tokens:
            return None, set()
        before = set(self.device)
        connected = self._first_runner if self._second is None else self._second.maybe_get_output
        with connected(output) as told:
            self.loaded += self.device.keys() - before
            for name, indices in output.scheduled_encoder_inputs.items():
                for index in indices:
                    feature = self._features[name][index]
                    key, count = feature.identifier, feature.mm_position.get_num_embeds()
                    if self._second is not None and key in self.device:
                        # The second runner does not encode what it has.
                        continue
                    self.device[key] = _output(key, count)
                    self.encoded.append(key)
                    if self._second is None:
                        self.worker.save_caches(self.device, key)
        ahead = self._read_ahead
        lost = {
            name
            for name, begin, count in _computed(output)
            if not self._gathers(name, begin, begin + count + ahead)
        }
        return told, self.kv.compute(output, lost)

    @contextmanager
    def _first_runner(self, output: Any) -> Iterator[ECConnectorOutput]:
        """What vLLM's first model runner asks of the connector around the encoders' work."""
        self.worker.bind_connector_metadata(output.ec_connector_metadata)
        if self.worker.is_producer:
            self.worker.start_save_caches(encoder_cache=self.device)
        if self.worker.is_consumer:
            self.worker.start_load_caches(self.device)
        told = ECConnectorOutput()
        yield told
        self.worker.get_finished(output.finished_req_ids)
        told.ec_connector_worker_meta = self.worker.build_connector_worker_meta()
        self.worker.clear_connector_metadata()

    def _gathers(self, name: str, begin: int, end: int) -> bool:
        """Whether the encoder outputs that a request needs are right; zeros may be excused."""
        for feature in self._features[name]:
            place = feature.mm_position
            first, last = max(begin - place.offset, 0), min(end - place.offset, place.length)
            if first >= last:
                continue
            one, other = place.get_embeds_indices_in_range(first, last)
            if one < other:
                expected = _output(feature.identifier, place.get_num_embeds())
                found = self.device[feature.identifier]
                if self.kv.may_be_wrong and not found.any():
                    assert found.shape == expected.shape
                    return False
                assert torch.equal(found[one:other], expected[one:other])
        return True

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
