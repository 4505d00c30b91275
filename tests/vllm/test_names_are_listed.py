"""What the plugin uses of vLLM is on the lists that are checked when it loads.

vLLM's names are found in its source, the plugin's use of them in its own. Python does not tell of
which class an object is, so names are compared, whatever they are read of: a name that vLLM and the
plugin both define, or that types of Python, torch or NumPy have as well, passes unlisted unless it
is read of ``super()`` or ``envs``.
"""

from __future__ import annotations

import ast
import asyncio
import collections
import dataclasses
import functools
import importlib.util
import inspect
import logging
import threading
import time
import types
import weakref
from collections.abc import Iterable, Iterator
from http import HTTPStatus
from pathlib import Path

import numpy as np
import pytest
import torch

import vllm_mm_ext
from vllm_mm_ext.adapters.names import (
    encoder_cache_names,
    estimate_names,
    kv_names,
    planning_names,
    quality_names,
    scheduler_names,
    sight_names,
)
from vllm_mm_ext.adapters.names.attributes_check import VllmAttributes
from vllm_mm_ext.adapters.names.names_check import Checked, VllmName, problem
from vllm_mm_ext.plugin import FEATURES

PACKAGE = Path(vllm_mm_ext.__file__).parent
# Parts of vLLM whose objects reach the plugin.
VLLM = (
    *("v1/core", "v1/engine", "v1/kv_offload", "v1/metrics", "v1/request.py", "v1/outputs.py"),
    *("v1/kv_cache_interface.py", "multimodal", "renderers", "config", "engine", "inputs"),
    *("entrypoints/openai", "entrypoints/serve", "entrypoints/anthropic", "entrypoints/scale_out"),
    *("entrypoints/pooling/base", "distributed/ec_transfer", "lora/request.py", "outputs.py"),
    *("exceptions.py", "connections.py", "envs.py", "transformers_utils/processor.py"),
    *(
        f"model_executor/models/{name}.py"
        for name in (
            *("interfaces", "utils", "registry", "qwen2_vl", "qwen2_5_vl", "qwen3_vl"),
            *("qwen3_vl_moe", "qwen2_5_omni_thinker", "qwen3_omni_moe_thinker"),
            *("llava_onevision", "interns1", "siglip", "whisper"),
        )
    ),
)
# Types whose attributes are read everywhere.
COMMON = (
    *(str, bytes, dict, list, set, tuple, int, type, OSError, Path, memoryview, types.CodeType),
    *(types.FunctionType, collections, collections.deque, dataclasses, functools, inspect),
    *(inspect.Signature, inspect.Parameter, logging, logging.Logger, threading, time, weakref),
    *(asyncio, asyncio.AbstractEventLoop, asyncio.Event, asyncio.Task, importlib.util, HTTPStatus),
    *(np, np.ndarray, torch, torch.Tensor, torch.nn, torch.nn.Module, torch.nn.functional),
)
# Of configurations and processors of transformers, of requests of Starlette and pydantic, and of
# safetensors.
ELSEWHERE = frozenset(
    {
        *("downsample_ratio", "image_size", "image_token_id", "json", "model_dump", "n_window"),
        *("n_window_infer", "out_hidden_size", "patch_size", "spatial_merge_size"),
        *("temporal_patch_size", "tokens_per_second", "video_token_index", "vision_config"),
        *("state", "vocab_size", "intermediate_size", "moe_intermediate_size", "window_size"),
        *("num_attention_heads", "num_experts", "num_experts_per_tok", "num_mel_bins"),
        "load_file",
    }
)
# Of one version alone; used where it is there.
OF_SOME_VERSIONS = frozenset(
    {
        *scheduler_names.CADENCE_ATTRIBUTES,
        # Budgets of vLLM 0.33 for a request's media, which the connector's probe tries.
        *("MediaDecodedBudget", "MediaRequestDownloadBudget", "download_budget", "decoded_budget"),
        *("MediaRequestDownloadSizeExceededError", "charge", "used"),
        "VLLM_MAX_MEDIA_REQUEST_DECODE_BYTES",
        # vLLM has this module where Cohere's package is installed.
        *("CohereServingChatV2", "create_chat_v2"),
    }
)


def lists() -> list[Checked]:
    """All that is checked: at load, or when the engine builds what the command line names."""
    return [
        *(entry for feature in FEATURES for entry in feature.needs),
        *scheduler_names.SCHEDULER_NAMES,
        *encoder_cache_names.DEVICE_TIER_NAMES,
        *encoder_cache_names.HOST_TIER_NAMES,
        *encoder_cache_names.CUDA_HOST_TIER_NAMES,
        *encoder_cache_names.TRANSPORT_NAMES,
        *kv_names.OFFLOAD_NAMES,
        *quality_names.STATISTICS_NAMES,
        *sight_names.API_SERVER_NAMES,
        *planning_names.PLANNING_NAMES,
        *estimate_names.ESTIMATE_NAMES,
    ]


def listed() -> set[str]:
    found = {*scheduler_names.QUEUE_METHODS, *kv_names.KNOWN_POLICY_METHODS}
    for entry in lists():
        assert isinstance(entry, (VllmName, VllmAttributes))
        module, _, path = entry.path.partition(":")
        found |= {*path.split("."), module.rpartition(".")[2]}
        found |= set(entry.names if isinstance(entry, VllmAttributes) else entry.params)
    return found


def defined_in(path: Path) -> Iterator[str]:
    """Names of modules and classes, and attributes that methods set on ``self``."""
    todo: list[tuple[ast.AST, bool]] = [(ast.parse(path.read_text()), False)]
    while todo:
        node, in_class = todo.pop()
        if isinstance(node, ast.ClassDef):
            in_class = True
        for child in ast.iter_child_nodes(node):
            todo.append((child, in_class))
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            yield node.name
        elif isinstance(node, ast.Attribute):
            own = isinstance(node.ctx, ast.Store) and ast.unparse(node.value) in {"self", "cls"}
            if own and in_class:
                yield node.attr
        # ``vllm.envs`` declares its variables where only type checkers look.
        declares = isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
        if declares or isinstance(node, (ast.ClassDef, ast.Module)):
            for statement in node.body:
                if isinstance(statement, ast.Assign):
                    yield from (t.id for t in statement.targets if isinstance(t, ast.Name))
                elif isinstance(statement, ast.AnnAssign) and isinstance(
                    statement.target, ast.Name
                ):
                    yield statement.target.id


@pytest.fixture(scope="module")
def vllms() -> set[str]:
    """Names that vLLM defines."""
    spec = importlib.util.find_spec("vllm")
    assert spec is not None
    (root,) = spec.submodule_search_locations or ()
    parts = [Path(root) / part for part in VLLM]
    files = [file for part in parts for file in (part.rglob("*.py") if part.is_dir() else [part])]
    return {name for file in files for name in defined_in(file)}


@pytest.fixture(scope="module")
def own() -> set[str]:
    """Names that the plugin defines, and that common types have."""
    common = {name for kind in COMMON for name in dir(kind)}
    return common | {name for path in PACKAGE.rglob("*.py") for name in defined_in(path)}


def using_vllm() -> list[Path]:
    lists_folder = PACKAGE / "adapters" / "names"
    modules = [p for p in (PACKAGE / "adapters").rglob("*.py") if lists_folder not in p.parents]
    return [*modules, PACKAGE / "plugin.py"]


def imports(tree: ast.AST) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "vllm":
            yield from (name.name for name in node.names)
        elif isinstance(node, ast.Import):
            yield from (n.name for n in node.names if n.name.split(".")[0] == "vllm")


def attributes(tree: ast.AST) -> Iterator[tuple[str, bool]]:
    """Attributes read, called, set or deleted, and whether they are vLLM's if vLLM has such."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            yield node.attr, ast.unparse(node.value) in {"super()", "envs"}
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            by_name = node.func.id in {"getattr", "setattr", "hasattr", "delattr"}
            if by_name and len(node.args) > 1 and isinstance(node.args[1], ast.Constant):
                yield node.args[1].value, False


def unlisted(trees: Iterable[ast.AST], vllms: set[str], own: set[str]) -> set[str]:
    known = listed() | ELSEWHERE | OF_SOME_VERSIONS
    found: set[str] = set()
    for tree in trees:
        found |= set(imports(tree))
        found |= {
            name
            for name, of_base in attributes(tree)
            if name in vllms and (of_base or name not in own)
        }
    return {name for name in found - known if not name.startswith("__")}


def test_what_is_used_of_vllm_is_on_a_list(vllms: set[str], own: set[str]) -> None:
    assert unlisted((ast.parse(p.read_text()) for p in using_vllm()), vllms, own) == set()


@pytest.mark.parametrize(
    "code",
    [
        "from vllm.v1.worker.gpu_input_batch import InputBatch",
        "pool._maybe_evict_cached_block(block)",
        "setattr(request, 'num_nans_in_logits', 0)",
        "super().schedule_dummy_run()",
    ],
)
def test_a_name_that_is_on_no_list_is_found(code: str, vllms: set[str], own: set[str]) -> None:
    assert unlisted([ast.parse(code)], vllms | {"schedule_dummy_run"}, own)


def test_each_entry_fits_this_vllm() -> None:
    assert problem(lists()) is None
