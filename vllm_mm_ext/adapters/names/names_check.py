"""Names inside vLLM that the plugin relies on, and how they are checked: existence, parameters."""

from __future__ import annotations

import ast
import importlib
import importlib.util
import inspect
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple, Protocol

# What a method is called on: in its signature or not, as it is looked up.
_BOUND = frozenset({"self", "cls"})


class IncompatibleError(RuntimeError):
    """A vLLM name a feature relies on is missing or takes other parameters."""


class Checked(Protocol):
    """An entry of the lists of what a feature relies on."""

    def check(self) -> None:
        """Raise ``IncompatibleError`` if vLLM is not as the entry says."""


class Parameters(NamedTuple):
    """What a function takes.

    Attributes:
        named: All that have a name.
        required: Those without a default, besides ``self`` and ``cls``.
        any_other: Whether it takes any keyword.
    """

    named: frozenset[str]
    required: frozenset[str]
    any_other: bool


@dataclass(frozen=True)
class VllmName:
    """One name inside vLLM that a feature relies on.

    Attributes:
        path: ``module:attribute.path``.
        params: Parameters it must accept; empty to only require that it exists. Others must have
            defaults, since the plugin calls or overrides it with these.
        by_source: Read the signature from the source instead of importing the module: model
            modules are heavy and only one is ever served.
        passed_on: The plugin hands on all arguments that it is given, or only reads what was made
            with them: other parameters may be required.
        optional: The only parameters beyond ``params`` that it may have; None for any. For names
            whose new parameters mean something that the plugin has to honour, such as a limit.
    """

    path: str
    params: tuple[str, ...] = ()
    by_source: bool = False
    passed_on: bool = False
    optional: tuple[str, ...] | None = None

    def check(self) -> None:
        """Look the name up and check its signature.

        Raises:
            IncompatibleError: The name is gone or lacks a parameter.
        """
        if self.by_source:
            self._check_source()
            return
        target = self.resolve()
        if self.params:
            self._check_parameters(_taken(inspect.signature(target)))

    def _check_source(self) -> None:
        module_name, _, attributes = self.path.partition(":")
        spec = importlib.util.find_spec(module_name)
        if spec is None or spec.origin is None:
            raise IncompatibleError(f"{self.path} is not there: no module {module_name}")
        names = _names_in(spec.origin)
        if attributes not in names:
            raise IncompatibleError(f"{self.path} is not there")
        taken = names[attributes]
        if taken is not None and self.params:
            self._check_parameters(taken)

    def _check_parameters(self, taken: Parameters) -> None:
        missing = sorted(set(self.params) - taken.named)
        if missing and not taken.any_other:
            raise IncompatibleError(f"{self.path} no longer takes {', '.join(missing)}")
        needed = sorted(taken.required - set(self.params))
        if needed and not self.passed_on:
            raise IncompatibleError(f"{self.path} needs {', '.join(needed)} now")
        if self.optional is not None:
            unknown = sorted(taken.named - {*self.params, *self.optional} - _BOUND)
            if unknown:
                raise IncompatibleError(
                    f"{self.path} takes {', '.join(unknown)} now, which the plugin does not know"
                )

    def resolve(self) -> Any:
        """Import and return the object, or raise ``IncompatibleError``."""
        module_name, _, attributes = self.path.partition(":")
        try:
            target: Any = importlib.import_module(module_name)
            for attribute in attributes.split("."):
                target = getattr(target, attribute)
        except (ImportError, AttributeError) as error:
            raise IncompatibleError(f"{self.path} is not there: {error}") from None
        return target


def _taken(signature: inspect.Signature) -> Parameters:
    starred = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    named = [p for p in signature.parameters.values() if p.kind not in starred]
    return Parameters(
        frozenset(p.name for p in named),
        frozenset(p.name for p in named if p.default is p.empty) - _BOUND,
        any(p.kind is p.VAR_KEYWORD for p in signature.parameters.values()),
    )


def _taken_by_source(arguments: ast.arguments) -> Parameters:
    by_place = [a.arg for a in (*arguments.posonlyargs, *arguments.args)]
    by_name = [a.arg for a in arguments.kwonlyargs]
    required = by_place[: len(by_place) - len(arguments.defaults)]
    required += [
        name
        for name, default in zip(by_name, arguments.kw_defaults, strict=True)
        if default is None
    ]
    return Parameters(
        frozenset((*by_place, *by_name)),
        frozenset(required) - _BOUND,
        arguments.kwarg is not None,
    )


# Kept, as tests load the plugin many times in a process.
@cache
def _names_in(source: str) -> dict[str, Parameters | None]:
    """What a module and its classes bind, as ``Class.method``; of functions, what they take."""
    found: dict[str, Parameters | None] = {}

    def read(body: list[ast.stmt], prefix: str) -> None:
        for statement in body:
            taken = None
            if isinstance(statement, ast.FunctionDef):
                taken = _taken_by_source(statement.args)
            for name in _names_bound(statement):
                found[prefix + name] = taken
            if isinstance(statement, ast.ClassDef):
                read(statement.body, f"{prefix}{statement.name}.")

    read(ast.parse(Path(source).read_text()).body, "")
    return found


def _names_bound(statement: ast.stmt) -> list[str]:
    if isinstance(statement, (ast.ClassDef, ast.FunctionDef)):
        return [statement.name]
    if isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name):
        return [statement.target.id]
    if isinstance(statement, ast.Assign):
        return [target.id for target in statement.targets if isinstance(target, ast.Name)]
    if isinstance(statement, ast.ImportFrom):
        return [alias.asname or alias.name for alias in statement.names]
    return []


def problem(names: Iterable[Checked]) -> str | None:
    """Why something that relies on these names cannot work, or None if it can."""
    try:
        for name in names:
            name.check()
    except IncompatibleError as error:
        return str(error)
    return None


def override_problem(cls: type) -> str | None:
    """What vLLM may pass to a method that ``cls`` overrides and that does not take it, or None.

    Lists of names say what vLLM has to have; this says what it has beyond them.

    Args:
        cls: A subclass of one of vLLM's classes.
    """
    for name, ours in vars(cls).items():
        # vLLM asks a class method for the object, or lists name what a constructor is given.
        if name == "__init__":
            continue
        base = next(
            (b for b in cls.__mro__[1:] if b.__module__.startswith("vllm.") and name in vars(b)),
            None,
        )
        if base is None or not callable(getattr(base, name)) or isinstance(ours, type):
            continue
        mine = inspect.signature(getattr(cls, name)).parameters
        theirs = inspect.signature(getattr(base, name)).parameters
        kinds = {parameter.kind for parameter in mine.values()}
        for parameter in theirs.values():
            if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
                continue
            by_place = parameter.kind is not parameter.KEYWORD_ONLY
            takes = parameter.name in mine or parameter.VAR_KEYWORD in kinds
            if not takes and not (by_place and parameter.VAR_POSITIONAL in kinds):
                return f"{base.__name__}.{name} takes {parameter.name} now"
    return None
