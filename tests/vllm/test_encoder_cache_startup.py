"""The encoder cache at start-up: what is built, what is refused, and the CUDA host tier."""

from __future__ import annotations

import copy
import logging
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from encoder_cache_harness import EMBEDDING_MB, WIDTH, Item, engine_config, request
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from vllm.distributed.ec_transfer.ec_connector.base import ECConnectorRole
from vllm.distributed.ec_transfer.ec_connector.cpu.common import (
    ECCPUConnectorMetadata,
    create_ec_shared_region,
)
from vllm.distributed.ec_transfer.ec_connector.cpu.session import ProducerSession
from vllm.v1.core.encoder_cache_manager import EncoderCacheManager, EncoderDecoderCacheManager

from vllm_mm_ext import encoder_cache
from vllm_mm_ext.adapters.encoder_cache import ec_connector as connector_module
from vllm_mm_ext.adapters.encoder_cache import manager as manager_module
from vllm_mm_ext.adapters.encoder_cache.cuda_connector import (
    CostAwareEmbeddingCache,
    CostAwareScheduler,
    CudaECConnector,
)
from vllm_mm_ext.adapters.encoder_cache.ec_connector import MMExtECConnector, NoHostTier
from vllm_mm_ext.adapters.encoder_cache.host_store import HostStore, PinnedBlocks
from vllm_mm_ext.adapters.encoder_cache.manager import HostSide, MMExtEncoderCacheManager
from vllm_mm_ext.adapters.encoder_cache.startup import HostTierError
from vllm_mm_ext.adapters.encoder_cache.transport_options import OWN
from vllm_mm_ext.adapters.names.encoder_cache_names import (
    CUDA_HOST_TIER_NAMES,
    DEVICE_TIER_NAMES,
    EMBEDS_NAMES,
    HOST_TIER_NAMES,
    SHARED_NAMES,
    TRANSPORT_NAMES,
)
from vllm_mm_ext.adapters.names.names_check import VllmName


@pytest.fixture
def config() -> Any:
    found = copy.deepcopy(engine_config())
    found.ec_transfer_config.mm_encoder_output_widths = {"video": WIDTH}
    return found


@pytest.mark.parametrize(
    "name",
    [
        *(*DEVICE_TIER_NAMES, *HOST_TIER_NAMES, *CUDA_HOST_TIER_NAMES),
        *(*EMBEDS_NAMES, *TRANSPORT_NAMES, *SHARED_NAMES),
    ],
    ids=lambda name: name.path,
)
def test_vllm_has_the_names_relied_on(name: VllmName) -> None:
    name.check()


def test_the_names_given_to_vllm_are_found_in_the_package() -> None:
    assert encoder_cache.MMExtEncoderCacheManager is MMExtEncoderCacheManager
    assert encoder_cache.MMExtECConnector is MMExtECConnector
    with pytest.raises(AttributeError, match="Other"):
        _ = encoder_cache.Other


def test_without_a_size_the_device_tier_is_as_large_as_vllms_cache(config: Any) -> None:
    manager: Any = MMExtEncoderCacheManager.create_manager(cache_size=500, vllm_config=config)
    assert manager.num_freeable_slots == manager.cache_size == 500
    config.ec_transfer_config = None
    manager = MMExtEncoderCacheManager.create_manager(cache_size=500, vllm_config=config)
    assert manager._cache.capacity == 500 * 4 * config.model_config.get_inputs_embeds_size()


def test_what_is_not_as_expected_leaves_vllms_own_cache(
    config: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    gone = VllmName("vllm.v1.core.encoder_cache_manager:EncoderCacheManager.gone")
    monkeypatch.setattr(manager_module, "DEVICE_TIER_NAMES", (gone,))
    with caplog.at_level(logging.WARNING, logger="vllm.mm_ext"):
        made = MMExtEncoderCacheManager.create_manager(cache_size=500, vllm_config=config)
    assert type(made) is EncoderCacheManager
    assert "gone" in caplog.text


@pytest.mark.parametrize("tier", ["DEVICE_TIER_NAMES", "HOST_TIER_NAMES"])
@pytest.mark.parametrize("role", list(ECConnectorRole))
def test_where_vllm_changed_the_host_tier_keeps_nothing_and_the_engine_goes_on(
    config: Any, role: Any, tier: str, monkeypatch: pytest.MonkeyPatch, caplog: Any
) -> None:
    gone = VllmName("vllm.v1.core.encoder_cache_manager:EncoderCacheManager.gone")
    monkeypatch.setattr(connector_module, tier, (gone,))
    with caplog.at_level(logging.WARNING, logger="vllm.mm_ext"):
        made: Any = MMExtECConnector(config, role)
    assert type(made) is NoHostTier
    assert "gone" in caplog.text
    outputs: dict[str, Any] = {"video": torch.zeros(2)}
    made.save_caches(outputs, mm_hash="video")
    made.start_load_caches(outputs)
    assert list(outputs) == ["video"]
    assert not made.has_cache_item("video")
    made.update_state_after_alloc(request("one", [Item("video", 4)]), 0)
    assert made.build_connector_meta(SimpleNamespace(total_num_scheduled_tokens=1)) is not None
    # The device tier does without it.
    manager: Any = MMExtEncoderCacheManager.create_manager(cache_size=500, vllm_config=config)
    assert manager._host is None
    # What makes any host tier unsafe is still refused.
    config.model_config.multimodal_config.allow_missing_mm_embeddings = True
    with pytest.raises(HostTierError, match="raw embeddings"):
        MMExtECConnector(config, role)


def test_encoder_decoder_models_keep_vllms_manager() -> None:
    config: Any = SimpleNamespace(model_config=SimpleNamespace(is_encoder_decoder=True))
    made = MMExtEncoderCacheManager.create_manager(cache_size=500, vllm_config=config)
    assert type(made) is EncoderDecoderCacheManager


def test_raw_embeddings_stay_closed_and_open_only_if_the_operator_says_so(config: Any) -> None:
    multimodal = config.model_config.multimodal_config
    assert not multimodal.enable_mm_embeds
    assert not multimodal.allow_missing_mm_embeddings
    assert config.ec_transfer_config.is_ec_consumer
    config._resolve_mm_embedding_inputs()
    assert not multimodal.enable_mm_embeds
    multimodal.enable_mm_embeds = True
    config._resolve_mm_embedding_inputs()
    assert multimodal.enable_mm_embeds
    # Other connectors are left to vLLM.
    multimodal.enable_mm_embeds = False
    config.ec_transfer_config.ec_connector = "ECExampleConnector"
    config._resolve_mm_embedding_inputs()
    assert multimodal.enable_mm_embeds


@pytest.mark.parametrize("role", list(ECConnectorRole))
def test_the_host_tier_refuses_what_it_cannot_work_with(config: Any, role: Any) -> None:
    MMExtECConnector(config, role)
    config.model_config.multimodal_config.allow_missing_mm_embeddings = True
    with pytest.raises(HostTierError, match="raw embeddings"):
        MMExtECConnector(config, role)
    config.model_config.multimodal_config.allow_missing_mm_embeddings = False
    config.ec_manager_config.encoder_cache_manager_cls = None
    with pytest.raises(HostTierError, match="--ec-manager-config"):
        MMExtECConnector(config, role)
    config.ec_transfer_config.ec_role = "ec_consumer"
    with pytest.raises(HostTierError, match="ec_both"):
        MMExtECConnector(config, role)


def test_the_store_keeps_no_more_than_the_output() -> None:
    store = HostStore()
    batch = torch.arange(40.0).reshape(10, 4)
    store.save("part", batch[2:4])
    store.save("whole", batch)
    assert torch.equal(store.load("part"), batch[2:4])
    assert store.load("part").untyped_storage().nbytes() == 32
    assert store.load("whole") is batch
    store.drop(["part", "never there"])
    assert len(store) == 1
    store.drop(None)
    assert not len(store)


class TorchsBlocks:
    """Pinned memory as torch keeps it: blocks of a power of two, which it never gives back unasked.

    Attributes:
        held: Bytes of all blocks.
        used: Bytes of those in use.
    """

    def __init__(self) -> None:
        self.held = self.used = 0
        self._free: list[int] = []

    def make(self, size: int) -> int:
        block = 1
        while block < size:
            block *= 2
        self.used += block
        if block in self._free:
            self._free.remove(block)
        else:
            self.held += block
        return block

    def drop(self, block: int) -> None:
        self.used -= block
        self._free.append(block)

    def empty(self) -> None:
        self.held -= sum(self._free)
        self._free.clear()


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(changes=st.lists(st.tuples(st.integers(0, 9), st.integers(1, 5000)), max_size=200))
def test_pinned_memory_is_bounded_whatever_sizes_come_and_go(
    monkeypatch: pytest.MonkeyPatch, changes: list[tuple[int, int]]
) -> None:
    torchs, blocks = TorchsBlocks(), PinnedBlocks()
    monkeypatch.setattr(torch.accelerator, "empty_host_cache", torchs.empty)
    kept: dict[int, tuple[int, int]] = {}
    most = 0
    for place, size in changes:
        if place in kept:
            before, block = kept.pop(place)
            blocks.give(before)
            torchs.drop(block)
        blocks.take(size)
        kept[place] = size, torchs.make(size)
        most = max(most, torchs.used)
        assert torchs.held <= 1.25 * most


# --- the host tier on CUDA: vLLM's scheduler side, with our eviction ------------------------------


def test_blocks_of_the_least_worthy_item_go_first_and_of_none_in_use() -> None:
    cache = CostAwareEmbeddingCache(10)
    for key, cost in (("dear", 50.0), ("cheap", 1.0), ("busy", 0.1)):
        cache.next_cost = cost
        assert cache.alloc(key, 3) is not None
        cache.mark_ready(key)
    cache.pin("busy")
    assert cache.alloc("too large", 11) is None
    assert cache.alloc("new", 4) is not None
    assert {key for key in ("dear", "cheap", "busy") if cache.get(key)} == {"dear", "busy"}
    # One is being filled, one is being read: only one could go.
    assert cache.alloc("no room", 9) is None
    cache.discard("new")
    assert len(cache.ranks) == 2


def test_on_cuda_what_cannot_work_is_refused(config: Any) -> None:
    extra = config.ec_transfer_config.ec_connector_extra_config
    extra["ec_enable_nixl"] = True
    with pytest.raises(HostTierError, match="ec_enable_nixl"):
        CudaECConnector(config, ECConnectorRole.SCHEDULER)
    del extra["ec_enable_nixl"]
    config.parallel_config.pipeline_parallel_size = 2
    config.parallel_config.distributed_executor_backend = "ray"
    with pytest.raises(HostTierError, match="pipeline"):
        CudaECConnector(config, ECConnectorRole.SCHEDULER)
    # Its processes pass on what every stage reports. (This machine has the first runner.)
    config.parallel_config.distributed_executor_backend = "mp"
    with pytest.raises(ValueError, match="requires the V2 model runner"):
        CudaECConnector(config, ECConnectorRole.SCHEDULER)


def test_every_host_tier_has_what_the_device_tier_asks() -> None:
    asked = [name for name in vars(HostSide) if not name.startswith("_")]
    assert "secured" in asked
    for kind in (MMExtECConnector, CostAwareScheduler):
        assert all(callable(getattr(kind, name, None)) for name in asked), kind


@pytest.fixture
def cuda(config: Any) -> Iterator[CostAwareScheduler]:
    """Room for 1,024 embeddings."""
    config.ec_transfer_config.ec_connector_extra_config["ec_cpu_bytes"] = 1024 * WIDTH * 4
    made = CostAwareScheduler(config)
    made._cache = CostAwareEmbeddingCache(1024 * WIDTH * 4 // made._region.block_size_bytes)
    yield made
    made.shutdown()


def step(cuda: CostAwareScheduler, scheduled: dict[str, list[int]]) -> Any:
    return cuda.build_connector_meta(SimpleNamespace(scheduled_encoder_inputs=scheduled))


def done(cuda: CostAwareScheduler, meta: Any) -> None:
    from vllm.distributed.ec_transfer.ec_connector.cpu.common import ECCPUWorkerMetadata

    report = ECCPUWorkerMetadata(list(meta.saves), [one[0] for one in meta.loads.values()])
    cuda.update_connector_output(SimpleNamespace(ec_connector_worker_meta=report))


def test_on_cuda_outputs_are_saved_then_loaded(cuda: CostAwareScheduler) -> None:
    one = request("a", [Item("video", 100)])
    cuda.update_state_after_alloc(one, 0)
    meta = step(cuda, {"a": [0]})
    assert list(meta.saves) == ["video"]
    assert not cuda.has_cache_item("video")
    done(cuda, meta)
    assert cuda.has_cache_item("video")
    cuda.update_state_after_alloc(one, 0)
    meta = step(cuda, {})
    assert list(meta.loads) == ["video"]
    done(cuda, meta)
    assert not cuda.has_pending_push_work()


def test_on_cuda_what_is_given_up_holds_no_blocks(cuda: CostAwareScheduler) -> None:
    one = request("a", [Item("video", 100), Item("huge", 2000)])
    cuda.update_state_after_alloc(one, 0)
    assert not step(cuda, {}).saves
    cuda.update_state_after_alloc(one, 1)
    assert not step(cuda, {"a": [1]}).saves
    cuda.update_state_after_alloc(one, 0)
    done(cuda, step(cuda, {"a": [0]}))
    cuda.update_state_after_alloc(one, 0)
    cuda.cancel("video")
    assert not step(cuda, {}).loads
    assert not cuda.has_pending_push_work()


def test_on_cuda_an_item_is_saved_for_whom_it_is_encoded(cuda: CostAwareScheduler) -> None:
    preempted, other = (request(name, [Item("video", 100)]) for name in "ab")
    cuda.update_state_after_alloc(preempted, 0)
    cuda.update_state_after_alloc(other, 0)
    meta = step(cuda, {"b": [0]})
    assert list(meta.saves) == ["video"]
    done(cuda, meta)
    assert cuda.has_cache_item("video")


def test_on_cuda_what_was_found_is_there_to_load(cuda: CostAwareScheduler) -> None:
    """Nothing found in a pass is evicted in it, even to save what comes before it."""
    old = request("old", [Item("old", 700)])
    cuda.update_state_after_alloc(old, 0)
    done(cuda, step(cuda, {"old": [0]}))
    new = request("new", [Item("new", 700), Item("old", 700)])
    assert cuda.has_cache_item("old")
    cuda.update_state_after_alloc(new, 0)
    cuda.update_state_after_alloc(new, 1)
    meta = step(cuda, {"new": [0]})
    assert list(meta.loads) == ["old"]
    assert not meta.saves


def test_on_cuda_new_weights_forget_what_is_there_and_what_is_being_copied(
    cuda: CostAwareScheduler,
) -> None:
    one = request("a", [Item("there", 100), Item("being copied", 100)])
    cuda.update_state_after_alloc(one, 0)
    done(cuda, step(cuda, {"a": [0]}))
    cuda.update_state_after_alloc(one, 1)
    meta = step(cuda, {"a": [1]})
    cuda.reset()
    assert not cuda.has_cache_item("there")
    done(cuda, meta)
    assert not cuda.has_cache_item("being copied")
    assert not len(cuda._cache.ranks)
    assert not cuda.has_pending_push_work()


def test_on_cuda_a_takedown_takes_what_is_being_copied_too(cuda: CostAwareScheduler) -> None:
    one = request("a", [Item("saved", 100), Item("loaded", 100)])
    cuda.update_state_after_alloc(one, 1)
    done(cuda, step(cuda, {"a": [1]}))
    cuda.update_state_after_alloc(one, 0)
    cuda.update_state_after_alloc(one, 1)
    meta = step(cuda, {"a": [0]})
    assert (list(meta.saves), list(meta.loads)) == (["saved"], ["loaded"])
    cuda._region.blocks.fill_(1)
    cuda.forget(["saved", "loaded", "never there"])
    assert not cuda.has_cache_item("loaded")
    done(cuda, meta)
    assert not cuda.has_cache_item("saved")
    assert cuda.items() == []
    assert not cuda._region.blocks[meta.saves["saved"]].any()
    assert not cuda._region.blocks[meta.loads["loaded"][1]].any()
    assert not cuda.has_pending_push_work()


def test_on_cuda_the_memory_of_the_tier_has_no_name_once_all_have_opened_it(
    config: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("VLLM_USE_V2_MODEL_RUNNER", "1")
    config.additional_config = {"mm_ext": {"encoder_cache": {"host_mb": 1024 * EMBEDDING_MB}}}
    extra = config.ec_transfer_config.ec_connector_extra_config
    extra["ec_cpu_bytes"] = 1024 * WIDTH * 4
    made = Worker()
    made._region = region = create_ec_shared_region(config)
    monkeypatch.setattr(CudaECConnector, "_make_worker", lambda *_: made)
    worker: Any = MMExtECConnector(config, ECConnectorRole.WORKER)
    scheduler = CostAwareScheduler(config)
    assert not Path(region._mmap_path).exists()
    region.blocks[3] = 7
    assert scheduler._region.blocks[3].eq(7).all()
    scheduler.shutdown()
    worker.shutdown()
    assert not [one for one in caplog.records if one.levelno >= logging.WARNING]


class Worker:
    """Loads as vLLM's worker side does: all items of a step into one buffer."""

    _region: Any

    def start_load_caches(self, outputs: dict[str, torch.Tensor], connector_metadata: Any) -> None:
        buffer = torch.arange(8.0 * len(connector_metadata.loads)).reshape(-1, 2)
        for place, key in enumerate(connector_metadata.loads):
            outputs[key] = buffer[4 * place : 4 * place + 4]

    def shutdown(self) -> None:
        self._region.cleanup()


def test_on_cuda_what_is_loaded_holds_no_memory_of_other_items(
    config: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VLLM_USE_V2_MODEL_RUNNER", "1")
    monkeypatch.setattr(CudaECConnector, "_make_worker", lambda *_: Worker())
    made = MMExtECConnector(config, ECConnectorRole.WORKER)
    assert isinstance(made, CudaECConnector)
    loads = {name: (0, [0], (4, 2)) for name in ("one", "other")}
    made.bind_connector_metadata(ECCPUConnectorMetadata(loads=loads))
    outputs: dict[str, torch.Tensor] = {}
    made.start_load_caches(outputs)
    assert outputs["other"].tolist() == torch.arange(8.0, 16.0).reshape(4, 2).tolist()
    assert [one.untyped_storage().nbytes() for one in outputs.values()] == [32, 32]


# --- the host tier on CUDA as a transport between instances ---------------------------------------


@pytest.fixture
def nixl(config: Any, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Makes a scheduler side that transfers items, but for the libraries that do it."""
    made: list[CostAwareScheduler] = []

    def set_up(self: Any, _: Any) -> None:
        if self._is_producer:
            nothing = SimpleNamespace(close=lambda: None, poll=lambda **_: [])
            data = SimpleNamespace(get_notifs=dict, deregister=lambda: None)
            self._producer_session = ProducerSession(nothing, data, self._cache, "one")

    def make(role: str) -> CostAwareScheduler:
        transfer = config.ec_transfer_config
        transfer.ec_role = role
        transfer.ec_connector_extra_config |= {
            "ec_cpu_bytes": 1024 * WIDTH * 4,
            "ec_enable_nixl": True,
        }
        if role == "ec_consumer":
            # vLLM measures these where something is saved.
            transfer.mm_encoder_output_widths = {}
        made.append(CostAwareScheduler(config))
        return made[-1]

    monkeypatch.setattr(CostAwareScheduler, "_setup_nixl", set_up)
    yield make
    for one in made:
        one.shutdown()


def test_on_cuda_other_instances_are_given_what_is_in_the_tier(nixl: Any) -> None:
    producer = nixl("ec_producer")
    one = request("a", [Item("video", 100)])
    producer.update_state_after_alloc(one, 0)
    done(producer, step(producer, {"a": [0]}))
    assert producer._producer_session._cache.get("video").ready


def test_on_cuda_what_came_from_another_instance_is_loaded(nixl: Any) -> None:
    consumer = nixl("ec_consumer")
    consumer._cache.alloc("video", 100, (100, WIDTH))
    consumer._cache.mark_ready("video")
    one = request("a", [Item("video", 100), Item("not there", 100)])
    assert consumer.has_cache_item("video")
    consumer.update_state_after_alloc(one, 0)
    consumer.update_state_after_alloc(one, 1)
    meta = step(consumer, {"a": [1]})
    assert (list(meta.loads), list(meta.saves)) == (["video"], [])


def test_on_cuda_what_only_a_client_names_is_neither_announced_nor_asked_for(nixl: Any) -> None:
    own = f"client's name{OWN}"
    producer = nixl("ec_producer")
    producer._peer_host, producer._peer_port = "peer", 1
    one = request("a", [Item("video", 100), Item(own, 100)])
    for index in range(2):
        producer.update_state_after_alloc(one, index)
    done(producer, step(producer, {"a": [0, 1]}))
    _, told = producer.request_finished(one)
    assert list(told) == ["video"]
    consumer = nixl("ec_consumer")
    one.ec_transfer_params = {own: told["video"], "video": told["video"]}
    asked: list[str] = []
    consumer._start_xfer = lambda name, *_: asked.append(name)
    assert not consumer._nixl_consumer_admit(one, 0)
    assert asked == ["video"]
