"""What the engine parts override in vLLM, and read of its objects, is checked when they are built.

A name that is not on a list would break a running engine, or be passed by without a word, when vLLM
changes.
"""

from __future__ import annotations

import ast
import inspect
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
from vllm.distributed.ec_transfer.ec_connector.cpu.scheduler import ECCPUScheduler

from vllm_mm_ext.adapters import scheduler as scheduler_package
from vllm_mm_ext.adapters.encoder_cache.cuda_connector import (
    CostAwareEmbeddingCache,
    CostAwareScheduler,
)
from vllm_mm_ext.adapters.encoder_cache.ec_connector import MMExtECConnector
from vllm_mm_ext.adapters.encoder_cache.manager import MMExtEncoderCacheManager
from vllm_mm_ext.adapters.kv.block_pool import MMExtBlockPool
from vllm_mm_ext.adapters.kv.free_queue import KeepingQueue
from vllm_mm_ext.adapters.kv.offload_policy import CostAwarePolicy
from vllm_mm_ext.adapters.names import encoder_cache_names as encoder_cache
from vllm_mm_ext.adapters.names.attributes_check import VllmAttributes
from vllm_mm_ext.adapters.names.kv_names import OFFLOAD_NAMES, POOL_NAMES
from vllm_mm_ext.adapters.names.names_check import Checked, VllmName
from vllm_mm_ext.adapters.names.scheduler_names import (
    CADENCE_ATTRIBUTES,
    SCHEDULER_NAMES,
)
from vllm_mm_ext.adapters.scheduler.mm_scheduler import MMExtScheduler

PARTS = {
    MMExtScheduler: SCHEDULER_NAMES,
    MMExtBlockPool: POOL_NAMES,
    KeepingQueue: POOL_NAMES,
    CostAwarePolicy: OFFLOAD_NAMES,
    MMExtEncoderCacheManager: encoder_cache.DEVICE_TIER_NAMES,
    MMExtECConnector: encoder_cache.HOST_TIER_NAMES,
    CostAwareEmbeddingCache: encoder_cache.CUDA_HOST_TIER_NAMES,
    CostAwareScheduler: (
        *encoder_cache.CUDA_HOST_TIER_NAMES,
        # Of the interface that vLLM's scheduler side shares with the first connector.
        VllmName(f"{ECCPUScheduler.__module__}:ECCPUScheduler.has_cache_item"),
    ),
}


def listed(names: Iterable[Checked]) -> set[str]:
    """The last part of each name, and the attributes of each class."""
    found: set[str] = set()
    for name in names:
        if isinstance(name, VllmAttributes):
            found.update(name.names)
        elif isinstance(name, VllmName):
            found.add(name.path.rpartition(".")[2])
    return found


@pytest.mark.parametrize("part", PARTS, ids=lambda part: part.__name__)
def test_each_overridden_method_is_checked(part: Any) -> None:
    ours = {name for name, value in vars(part).items() if callable(value) or is_wrapped(value)}
    bases = [base for base in part.__mro__[1:] if base.__module__.startswith("vllm.")]
    overridden = {name for name in ours if any(name in vars(base) for base in bases)}
    # A class's own name, with the parameters of its ``__init__``, is on some lists.
    assert {name for name in overridden if not name.startswith("__")} <= listed(PARTS[part])


def is_wrapped(value: object) -> bool:
    return isinstance(value, (property, classmethod, staticmethod))


def attributes_of(owner: str) -> set[str]:
    """What the scheduler package reads of everything that is called so."""
    found = set()
    for path in Path(inspect.getfile(scheduler_package)).parent.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Attribute):
                name = ast.unparse(node.value)
                if name == owner or name.endswith(f".{owner}"):
                    found.add(node.attr)
    return found


def test_what_is_read_of_requests_is_checked() -> None:
    # Before a request is the engine's: what the API server sends.
    not_the_engines = {"data_parallel_rank"}
    assert attributes_of("request") - not_the_engines <= listed(SCHEDULER_NAMES)


def test_what_is_read_of_vllms_scheduler_is_checked() -> None:
    tree = ast.parse(inspect.getsource(MMExtScheduler))
    used = {
        node.attr
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute) and ast.unparse(node.value) in {"self", "super()"}
    }
    used |= attributes_of("_scheduler")
    own = {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}
    own |= {name for name in used if name.startswith("_") and name in assigned(tree)}
    names = {*CADENCE_ATTRIBUTES, *listed(SCHEDULER_NAMES), "__init__"}
    assert used - own - names == set()


def assigned(tree: ast.AST) -> set[str]:
    """Attributes that the class sets itself."""
    return {
        node.attr
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store)
    }
