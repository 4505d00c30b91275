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
from typing import Any

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
        found = _in_source(self.path) if self.by_source else _of_class(self.path)
        missing = [name for name in self.names if name not in found]
        if missing:
            raise IncompatibleError(f"{self.path} no longer has {', '.join(missing)}")


# The lists of several features name the same classes.
@lru_cache(maxsize=256)
def _of_class(path: str) -> frozenset[str]:
    module, _, name = path.partition(":")
    try:
        found: Any = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise IncompatibleError(f"{path} is not there: {error}") from None
    names = set(dir(found))
    for owner in found.__mro__:
        # Of an annotation alone, a class has no attribute.
        names.update(vars(owner).get("__annotations__", ()))
        for value in vars(owner).values():
            names.update(_set_on_self(value))
    return frozenset(names)


def _set_on_self(value: object) -> Iterator[str]:
    """Attributes that a method sets on its first parameter, by its compiled code."""
    function = value.fget if isinstance(value, property) else value
    function = inspect.unwrap(function) if callable(function) else function
    code = getattr(function, "__code__", None)
    if code is None or not code.co_varnames:
        return
    first, before = code.co_varnames[0], None
    for instruction in dis.get_instructions(code):
        # From Python 3.13 on, one instruction may load two variables; the last one is set.
        loaded = before[-1] if isinstance(before, tuple) else before
        if instruction.opname == "STORE_ATTR" and loaded == first:
            yield instruction.argval
        # ``LOAD_DEREF`` where the method has a closure over it.
        loads = instruction.opname.startswith(("LOAD_FAST", "LOAD_DEREF"))
        before = instruction.argval if loads else None


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
        stored = isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store)
        if stored and isinstance(node.value, ast.Name) and node.value.id == "self":
            yield node.attr
