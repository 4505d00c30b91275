"""Each change to vLLM says why it is made and when it can go, and no entry is out of date."""

from __future__ import annotations

import ast
import importlib.util
from collections.abc import Iterator
from pathlib import Path

import pytest
from packaging.specifiers import SpecifierSet

from vllm_mm_ext import adapters
from vllm_mm_ext.adapters.patch_list import PATCHES
from vllm_mm_ext.adapters.patches import ledger
from vllm_mm_ext.adapters.vllm_compat import vllm_version
from vllm_mm_ext.plugin import register

ADAPTERS = Path(adapters.__file__).parent
# An answer's own extra field is data, no change to vLLM.
SETS_FIELDS = "serving/answers.py"


@pytest.fixture(scope="module")
def trees() -> dict[str, ast.AST]:
    """The modules that may change vLLM, by their path."""
    return {
        str(path.relative_to(ADAPTERS)): ast.parse(path.read_text())
        for path in ADAPTERS.rglob("*.py")
        if path.name != "patches.py"
    }


def test_each_change_that_is_made_at_load_has_an_entry_and_each_entry_a_change() -> None:
    register()
    made = {
        (feature, place.partition("[")[0]) for feature, found in ledger().items() for place in found
    }
    said = {(p.feature, target) for p in PATCHES if not p.later for target in p.targets}
    if importlib.util.find_spec("cohere") is None:
        said = {(feature, target) for feature, target in said if ".cohere." not in target}
    assert made == said


def test_each_change_that_an_engine_makes_has_an_entry_and_each_entry_a_change(
    trees: dict[str, ast.AST],
) -> None:
    made = {target for tree in trees.values() for target in set_later(tree)}
    assert made == {target for patch in PATCHES if patch.later for target in patch.targets}


def set_later(tree: ast.AST) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and ast.unparse(node.func) in {"set_on", "set_meanwhile"}:
            target = node.args[1]
            assert isinstance(target, ast.Constant), "a target is written out"
            yield target.value


def test_nothing_else_changes_vllm(trees: dict[str, ast.AST]) -> None:
    found = {path: list(changes(tree)) for path, tree in trees.items() if path != SETS_FIELDS}
    assert {path: lines for path, lines in found.items() if lines} == {}


@pytest.mark.parametrize(
    "code",
    [
        "from vllm.v1.core import block_pool\nblock_pool.BlockPool = 1",
        "from vllm.v1.core.block_pool import BlockPool\nBlockPool.touch = None",
        "def make():\n  def init(self):\n    self.extra = 1",
        "setattr(engine, name, 1)",
        "del engine.name",
    ],
)
def test_other_changes_are_found(code: str) -> None:
    assert list(changes(ast.parse(code)))


def changes(tree: ast.AST) -> Iterator[str]:
    """Where a module sets attributes of what it imports from vLLM, of ``self`` in a wrapper, or of
    anything by a name that is computed, or deletes any."""
    imported = {
        name.asname or name.name
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "vllm"
        for name in node.names
    }
    todo: list[tuple[ast.AST, bool]] = [(tree, False)]
    while todo:
        node, in_class = todo.pop()
        in_class = in_class or isinstance(node, ast.ClassDef)
        todo += [(child, in_class) for child in ast.iter_child_nodes(node)]
        if isinstance(node, ast.Attribute):
            owner = ast.unparse(node.value).partition(".")[0]
            foreign = owner in imported or (owner == "self" and not in_class)
            if isinstance(node.ctx, ast.Del) or (foreign and isinstance(node.ctx, ast.Store)):
                yield ast.unparse(node)
        elif isinstance(node, ast.Call) and ast.unparse(node.func) in {"setattr", "delattr"}:
            yield ast.unparse(node)


def test_this_vllm_needs_each_change() -> None:
    version = vllm_version()
    assert version is not None
    outside = [
        patch.why
        for patch in PATCHES
        if not SpecifierSet(patch.versions).contains(version, prereleases=True)
    ]
    assert outside == []
