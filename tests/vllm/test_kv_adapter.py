"""The block pool in vLLM's own schedulers."""

from __future__ import annotations

import logging
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from vllm.config import KVTransferConfig
from vllm.engine.arg_utils import EngineArgs
from vllm.v1.core import kv_cache_coordinator
from vllm.v1.core.block_pool import BlockPool
from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.engine.core import EngineCore
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec
from vllm.v1.structured_output import StructuredOutputManager

from vllm_mm_ext.adapters import vllm_compat
from vllm_mm_ext.adapters.kv import install as adapter
from vllm_mm_ext.adapters.kv.block_pool import MMExtBlockPool
from vllm_mm_ext.adapters.names.kv_names import CONTROL_NAMES, POOL_NAMES
from vllm_mm_ext.adapters.names.names_check import VllmName
from vllm_mm_ext.adapters.vllm_compat import Feature
from vllm_mm_ext.testing.checkpoints import checkpoint

BLOCK = 16


@pytest.fixture(scope="module")
def config() -> Any:
    adapter.install()
    adapter.install_control()
    return EngineArgs(
        model=str(checkpoint("qwen2_5_vl")), max_model_len=1024, block_size=BLOCK
    ).create_engine_config()


def scheduler(config: Any, cls: type = Scheduler, **kv: Any) -> Any:
    config.additional_config = {"mm_ext": {"kv": kv}}
    config.cache_config.num_gpu_blocks = 101
    spec = FullAttentionSpec(BLOCK, num_kv_heads=1, head_size=16, dtype=torch.float32)
    cache = KVCacheConfig(101, [], [KVCacheGroupSpec(["layer"], spec)])
    return cls(config, cache, StructuredOutputManager(config), BLOCK)


@pytest.mark.parametrize("cls", [Scheduler, AsyncScheduler])
def test_schedulers_get_the_pool_with_their_settings(config: Any, cls: type) -> None:
    made = scheduler(config, cls, max_visual_cache_share=0.5, pressure_limit=0.9, min_items=3)
    pool = made.kv_cache_manager.block_pool
    assert isinstance(pool, MMExtBlockPool)
    assert (pool.limits.quota, pool.limits.floor, pool.limits.min_items) == (50, 10, 3)
    assert pool.limits.hidden_size == config.model_config.get_hidden_size()
    assert all(m.block_pool is pool for m in made.kv_cache_manager.coordinator.single_type_managers)
    assert kv_cache_coordinator.BlockPool is BlockPool
    assert pool.true_pressure() == 0.0


@pytest.mark.parametrize("within", [False, True])
@pytest.mark.parametrize("lazy", [False, True])
def test_who_copies_what_is_in_vllms_list_of_free_blocks_gets_vllms_pool(
    config: Any,
    lazy: bool,
    within: bool,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    built: list[Any] = []

    def init(*_: Any) -> None:
        built.append(kv_cache_coordinator.BlockPool)

    chosen: dict[str, Any] = {
        "kv_connector": "SimpleCPUOffloadConnector",
        "kv_role": "kv_both",
        "kv_connector_extra_config": {"lazy_offload": lazy},
    }
    if within:
        other = {"kv_connector": "OffloadingConnector", "kv_role": "kv_both"}
        chosen = {
            "kv_connector": "MultiConnector",
            "kv_role": "kv_both",
            "kv_connector_extra_config": {"connectors": [other, chosen]},
        }
    transfer = KVTransferConfig(**chosen)
    config.additional_config = {}
    monkeypatch.setattr(config, "kv_transfer_config", transfer)
    asked: list[Any] = []
    pool = SimpleNamespace(ask_for_outputs=asked.append)
    made = SimpleNamespace(
        encoder_cache_manager=None, kv_cache_manager=SimpleNamespace(block_pool=pool)
    )
    with caplog.at_level(logging.WARNING, logger="vllm.mm_ext"):
        adapter._with_pool(init)(made, config, KVCacheConfig(101, [], []))
    assert (built == [BlockPool]) == lazy
    assert ("lazy_offload" in caplog.text) == lazy
    assert bool(asked) != lazy


def test_switched_off_it_is_vllms_own(config: Any) -> None:
    made = scheduler(config, enabled=False)
    assert type(made.kv_cache_manager.block_pool) is BlockPool
    assert adapter.control_of(made) is None


def test_a_scheduler_that_fails_to_start_leaves_vllm_as_it_was(config: Any) -> None:
    with pytest.raises(ValueError, match="min_items"):
        scheduler(config, min_items=-1)
    assert kv_cache_coordinator.BlockPool is BlockPool


def test_the_engine_answers_for_api_processes(config: Any) -> None:
    core = SimpleNamespace(scheduler=scheduler(config))
    assert EngineCore.mm_ext_kv(core, "pin", "s") == 0
    assert EngineCore.mm_ext_kv(core, "media", "") == []


def test_all_names_are_there() -> None:
    for name in (*POOL_NAMES, *CONTROL_NAMES):
        name.check()


def test_a_changed_name_leaves_vllm_alone_with_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    gone = VllmName("vllm.v1.core.block_pool:BlockPool.no_longer_there")
    installed: list[bool] = []
    feature = Feature("KV blocks", "less", (*POOL_NAMES, gone), lambda: installed.append(True))
    with caplog.at_level(logging.WARNING, logger="vllm.mm_ext"):
        (status,) = vllm_compat.activate([feature])
    assert not status.active
    assert not installed
    assert "no_longer_there" in caplog.text
