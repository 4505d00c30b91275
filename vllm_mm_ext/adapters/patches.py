"""Makes changes to vLLM's classes, tables and objects. Nothing else under ``adapters/`` may.

Changes to classes and tables are made when the plugin is loaded: each is on record and can be taken
back, and a feature that changes several places is installed in all of them or in none. Changes to
objects are made later, by what was installed. ``patch_list`` says why each change is made.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, MutableMapping
from contextlib import contextmanager
from functools import partial, wraps
from typing import Any

_MISSING = object()


# Where each change was made, and how to take it back.
Changes = list[tuple[str, Callable[[], Any]]]

_ledger: dict[str, list[str]] = {}
_open: list[Changes] = []


def ledger() -> dict[str, list[str]]:
    """The places in vLLM that were changed in this process, ``module:attribute.path``, by feature.

    Features that changed nothing are not in it.
    """
    return {feature: list(targets) for feature, targets in _ledger.items()}


@contextmanager
def all_or_none(feature: str) -> Iterator[None]:
    """Put changes made while this is open on record; take all of them back if it ends in an error.

    Plugins are loaded by one thread, so changes belong to the feature opened last.
    """
    made: Changes = []
    _open.append(made)
    try:
        yield
    except BaseException:
        for _, undo in reversed(made):
            undo()
        raise
    finally:
        _open.pop()
    for target, _ in made:
        known = _ledger.setdefault(feature, [])
        if target not in known:
            known.append(target)


def replace_attribute(owner: Any, name: str, value: object) -> None:
    """Set an attribute of a class or module of vLLM's."""
    before = vars(owner).get(name, _MISSING)
    setattr(owner, name, value)
    undo = (
        partial(delattr, owner, name)
        if before is _MISSING
        else partial(setattr, owner, name, before)
    )
    module = getattr(owner, "__module__", owner.__name__)
    path = f"{owner.__qualname__}.{name}" if isinstance(owner, type) else name
    _record(f"{module}:{path}", undo)


def before_entry_changes(table: MutableMapping[Any, Any], key: object, target: str) -> None:
    """Put the change of an entry of one of vLLM's tables on record, before it is made.

    Args:
        table: The table.
        key: Of the entry.
        target: How the ledger calls the table.
    """
    before = table.get(key, _MISSING)
    undo = (
        partial(table.pop, key, None)
        if before is _MISSING
        else partial(table.__setitem__, key, before)
    )
    _record(f"{target}[{key!r}]", undo)


def wrap(owner: Any, method: str, make: Callable[[Callable[..., Any]], Callable[..., Any]]) -> None:
    """Replace ``owner.method`` by ``make(original)``, once for each place ``make`` comes from.

    Args:
        owner: A class or a module.
        method: Name of the method or function.
        make: Makes the replacement.
    """
    original = getattr(owner, method)
    done: frozenset[str] = getattr(original, "_mm_ext", frozenset())
    if make.__qualname__ in done:
        return
    wrapper = wraps(original)(make(original))
    wrapper._mm_ext = done | {make.__qualname__}  # type: ignore[attr-defined]
    replace_attribute(owner, method, wrapper)


def set_on(owner: Any, target: str, value: object) -> None:
    """Set an attribute of one of vLLM's objects.

    Args:
        owner: The object.
        target: ``module:Class.attribute``, as ``patch_list`` has it.
        value: Of the attribute.
    """
    setattr(owner, _attribute(target), value)


@contextmanager
def set_meanwhile(owner: Any, target: str, value: object) -> Iterator[None]:
    """Set an attribute of one of vLLM's objects or modules for as long as this is open.

    Args:
        owner: The object or module.
        target: ``module:Class.attribute`` or ``module:attribute``, as ``patch_list`` has it.
        value: Of the attribute.
    """
    name = _attribute(target)
    before = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, before)


def _attribute(target: str) -> str:
    return target.rpartition(":")[2].rpartition(".")[2]


def _record(target: str, undo: Callable[[], Any]) -> None:
    if _open:
        _open[-1].append((target, undo))
