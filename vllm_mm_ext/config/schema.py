"""Words for pydantic models: what a field accepts, what is wrong with a value, reference tables.

Serves the configuration and the options of requests, so that both explain themselves alike.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from typing import Any, Literal, NamedTuple, get_args, get_origin

from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo

# Longer values are cut in messages: they go to logs and over the network.
_MAX_SHOWN = 120


class Problem(NamedTuple):
    """One thing wrong with given settings.

    Attributes:
        key: Full path of the setting, e.g. ``mm_ext.media.resize``.
        value: What was given there.
        text: What is wrong and what is valid.
    """

    key: str
    value: Any
    text: str

    def __str__(self) -> str:
        value = repr(self.value)
        shown = value if len(value) <= _MAX_SHOWN else f"{value[:_MAX_SHOWN]}..."
        return f"{self.key} = {shown}: {self.text}"


def problems(error: ValidationError, root: type[BaseModel], prefix: str) -> list[Problem]:
    """Explain a validation error of ``root``, whose keys are named below ``prefix``."""
    found = []
    for item in error.errors():
        path = [str(part) for part in item["loc"]]
        key = ".".join([prefix, *path])
        if item["type"] == "extra_forbidden":
            section = _section_at(root, path[:-1])
            valid = ", ".join(section.model_fields) if section else "none"
            found.append(Problem(key, item["input"], f"unknown key; valid keys here: {valid}"))
            continue
        message = item["msg"].removeprefix("Value error, ")
        field = _field_at(root, path)
        # What a whole section says about itself names its keys already.
        if field is not None and section_of(field) is None:
            message += f"; valid: {describe_type(field)}"
        found.append(Problem(key, item["input"], message))
    return found


def section_of(field: FieldInfo) -> type[BaseModel] | None:
    """The model a field holds (possibly optional); None for a plain value or a list."""
    if get_origin(field.annotation) in (tuple, list):
        return None
    for annotation in (field.annotation, *get_args(field.annotation)):
        if isinstance(annotation, type) and issubclass(annotation, BaseModel):
            return annotation
    return None


def _section_at(root: type[BaseModel], path: list[str]) -> type[BaseModel] | None:
    section: type[BaseModel] | None = root
    field: FieldInfo | None = None
    for part in path:
        if field is not None and get_origin(field.annotation) in (tuple, list):
            # A place in a list, which may be one of models.
            element = get_args(field.annotation)[0]
            is_model = isinstance(element, type) and issubclass(element, BaseModel)
            section, field = element if is_model else None, None
            continue
        field = section.model_fields.get(part) if section else None
        section = section_of(field) if field else None
    return section


def _field_at(root: type[BaseModel], path: list[str]) -> FieldInfo | None:
    section = _section_at(root, path[:-1]) if path else None
    return section.model_fields.get(path[-1]) if section else None


def describe_type(field: FieldInfo) -> str:
    """Words for what a field accepts: its choices, or its type, bounds and length."""
    annotation: Any = field.annotation
    if get_origin(annotation) is Literal:
        return " | ".join(repr(choice) for choice in get_args(annotation))
    if isinstance(annotation, type) and get_origin(annotation) is None:
        name = annotation.__name__
    elif get_origin(annotation) in (tuple, list):
        name = f"list of {get_args(annotation)[0].__name__}"
    else:
        name = " | ".join(getattr(t, "__name__", str(t)) for t in get_args(annotation))
        name = name.replace("NoneType", "null")
    symbols = {"gt": ">", "ge": ">=", "lt": "<", "le": "<="}
    bounds = [
        f"{symbol} {getattr(meta, attr)}"
        for meta in field.metadata
        for attr, symbol in symbols.items()
        if getattr(meta, attr, None) is not None
    ]
    bounds += _length(field)
    return " ".join([name, *([f"({', '.join(bounds)})"] if bounds else [])])


def _length(field: FieldInfo) -> list[str]:
    """Words for how long a text or a list may be, if that is bounded."""
    least, most = (
        next((n for meta in field.metadata if (n := getattr(meta, attr, None)) is not None), None)
        for attr in ("min_length", "max_length")
    )
    unit = "values" if get_origin(field.annotation) in (tuple, list) else "characters"
    if least is None:
        return [] if most is None else [f"at most {most} {unit}"]
    return [f"{least} or more {unit}" if most is None else f"{least} to {most} {unit}"]


def shown_default(field: FieldInfo) -> str:
    """A field's default as one would write it in a settings file."""
    return _written(field.default)


def _written(value: Any) -> str:
    if value is None:
        return "null"
    if isinstance(value, BaseModel):
        inner = ", ".join(f"{k}: {_written(v)}" for k, v in value if k in value.model_fields_set)
        return f"{{{inner}}}"
    if isinstance(value, (tuple, list)):
        return f"[{', '.join(map(_written, value))}]"
    # A line break would end a row of the tables.
    return str(value).lower() if isinstance(value, bool) else str(value).replace("\n", "\\n")


def iter_fields(
    section: type[BaseModel], prefix: str
) -> Iterator[tuple[str, type[BaseModel], list[tuple[str, FieldInfo]]]]:
    """Yield ``(path, section class, its own leaf fields)`` depth first."""
    leaves: list[tuple[str, FieldInfo]] = []
    nested: list[tuple[str, type[BaseModel]]] = []
    for name, field in section.model_fields.items():
        inner = section_of(field)
        if inner is None:
            leaves.append((name, field))
        else:
            nested.append((name, inner))
    yield prefix, section, leaves
    for name, inner_section in nested:
        yield from iter_fields(inner_section, f"{prefix}.{name}")


def reference_tables(root: type[BaseModel], prefix: str) -> list[str]:
    """Markdown lines: one section per model under ``root`` with a table of its settings."""
    lines = []
    for path, section, leaves in iter_fields(root, prefix):
        if not leaves:
            continue
        lines += ["", f"## `{path}`", "", inspect.cleandoc(section.__doc__ or ""), ""]
        lines += ["| key | accepts | default | meaning |", "| --- | --- | --- | --- |"]
        for name, field in leaves:
            accepts = describe_type(field).replace("|", "\\|")
            lines.append(
                f"| `{name}` | {accepts} | `{shown_default(field)}` | {field.description} |"
            )
        lines += [
            f"| `{name}` | `{path}.{name}` below | | {field.description} |"
            for name, field in section.model_fields.items()
            if section_of(field) is not None and field.description
        ]
    return lines
