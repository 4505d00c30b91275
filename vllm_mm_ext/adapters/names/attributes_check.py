"""Attributes of vLLM's objects that the plugin relies on, and how they are checked.

A ``VllmName`` finds what a module or a class defines. Much of what the plugin reads is on no class:
fields of dataclasses, and attributes that a constructor sets.
"""

from __future__ import annotations

import ast
import dis
import importlib
import importlib.util
import inspect
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from vllm_mm_ext.adapters.names.names_check import IncompatibleError


@dataclass(frozen=True)
class VllmAttributes:
    """Attributes of the objects of one of vLLM's classes that a feature reads or sets.

    Attributes:
        path: ``module:Class``.
        names: The attributes: class attributes, fields, or what any method of the class or of its
            bases sets on ``self``.
        by_source: Read the source of the class instead of importing the module, bases left out:
            model modules are heavy and only one is ever served.
    """

    path: str
    names: tuple[str, ...]
    by_source: bool = False

    def check(self) -> None:
        """Look each attribute up.

        Raises:
            IncompatibleError: The class or an attribute is gone.
        """
        if self.by_source:
            missing = [name for name in self.names if name not in _in_source(self.path)]
        else:
            owner = _class_at(self.path)
            missing = [name for name in self.names if not _has(owner, name)]
        if missing:
            raise IncompatibleError(f"{self.path} no longer has {', '.join(missing)}")


def _class_at(path: str) -> type:
    module, _, name = path.partition(":")
    try:
        found = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise IncompatibleError(f"{path} is not there: {error}") from None
    assert isinstance(found, type)
    return found


# The lists of several features name the same attributes.
@lru_cache(maxsize=1024)
def _has(owner: type, name: str) -> bool:
    return (
        hasattr(owner, name)
        # A field without a default.
        or any(name in vars(base).get("__annotations__", ()) for base in owner.__mro__)
        or any(_sets(method, name) for base in owner.__mro__ for method in vars(base).values())
    )


def _sets(method: object, name: str) -> bool:
    """Whether a method sets an attribute on its first parameter, by its compiled code."""
    code = getattr(inspect.unwrap(method) if callable(method) else None, "__code__", None)
    if code is None or name not in code.co_names or not code.co_varnames:
        return False
    before = None
    for instruction in dis.get_instructions(code):
        if instruction.opname == "STORE_ATTR" and instruction.argval == name:
            # From Python 3.13 on, one instruction may load two variables; the last one is set.
            loaded = before[-1] if isinstance(before, tuple) else before
            if loaded == code.co_varnames[0]:
                return True
        # ``LOAD_DEREF`` where the method has a closure over it.
        loads = instruction.opname.startswith(("LOAD_FAST", "LOAD_DEREF"))
        before = instruction.argval if loads else None
    return False


@lru_cache(maxsize=256)
def _in_source(path: str) -> frozenset[str]:
    module, _, name = path.partition(":")
    spec = importlib.util.find_spec(module)
    if spec is None or spec.origin is None:
        raise IncompatibleError(f"{path} is not there: no module {module}")
    tree = ast.parse(Path(spec.origin).read_text())
    for node in tree.body:
        if isinstance(node, ast.ClassDef) and node.name == name:
            return frozenset(_bound_in(node))
    raise IncompatibleError(f"{path} is not there")


def _bound_in(owner: ast.ClassDef) -> Iterator[str]:
    for statement in owner.body:
        if isinstance(statement, (ast.FunctionDef, ast.AsyncFunctionDef)):
            yield statement.name
        elif isinstance(statement, (ast.Assign, ast.AnnAssign)):
            targets = statement.targets if isinstance(statement, ast.Assign) else [statement.target]
            yield from (target.id for target in targets if isinstance(target, ast.Name))
    for node in ast.walk(owner):
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            yield from [node.attr] if ast.unparse(node.value) == "self" else []
