"""Reads the fields of an event one by one, so that a wrong or unknown field is told by its name."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from typing import Any, TypeVar

from vllm_mm_ext.live.wire_error import WireError

T = TypeVar("T")
_WORDS = {
    dict: "an object",
    list: "an array",
    str: "a string",
    bool: "a boolean",
    int: "an integer",
    float: "a number",
    type(None): "null",
}


class EventFields:
    """The fields of one JSON object. Each is taken once; ``end`` refuses those that nobody took.

    ``null`` stands for a field that is not given.

    Args:
        given: The JSON value that should be an object.
        path: Of the object within the event; empty for the event itself.

    Raises:
        WireError: The value is no object.
    """

    def __init__(self, given: object, path: str = "") -> None:
        if not isinstance(given, Mapping):
            raise wrong_type(path or "event", "an object", given)
        self._left: dict[str, Any] = dict(given)
        self._path = path

    def name(self, field: str) -> str:
        """The path of a field, as an error names it."""
        return f"{self._path}.{field}" if self._path else field

    def has(self, field: str) -> bool:
        """Whether the field is there and was not taken yet, be it ``null``."""
        return field in self._left

    def peek(self, field: str) -> Any:
        """The field's value, which stays to be taken; None if it is not there."""
        return self._left.get(field)

    def take(self, field: str) -> Any:
        """The field's value as it came; None if it is not there."""
        return self._left.pop(field, None)

    def required(self, field: str, value: T | None) -> T:
        """Hand on the value of a field.

        Raises:
            WireError: It is None.
        """
        if value is None:
            name = self.name(field)
            raise WireError(
                f"Missing required parameter: '{name}'.",
                code="missing_required_parameter",
                param=name,
            )
        return value

    def text(
        self, field: str, *, choices: Collection[str] = (), longest: int | None = None
    ) -> str | None:
        """A string, one of ``choices`` if there are any, of at most ``longest`` characters."""
        value = self.take(field)
        if value is None:
            return None
        if not isinstance(value, str):
            raise wrong_type(self.name(field), "a string", value)
        if choices and value not in choices:
            raise wrong_value(self.name(field), value, choices)
        if longest is not None and len(value) > longest:
            raise WireError(
                f"'{self.name(field)}' has {len(value)} characters; at most {longest} are taken.",
                code="string_above_max_length",
                param=self.name(field),
            )
        return value

    def boolean(self, field: str) -> bool | None:
        """``true`` or ``false``."""
        value = self.take(field)
        if value is not None and not isinstance(value, bool):
            raise wrong_type(self.name(field), "a boolean", value)
        return value

    def integer(self, field: str, low: int, high: int) -> int | None:
        """A whole number from ``low`` to ``high``."""
        value = self.take(field)
        if value is None:
            return None
        if isinstance(value, bool) or not isinstance(value, int):
            raise wrong_type(self.name(field), "an integer", value)
        self._check_range(field, value, low, high)
        return value

    def number(self, field: str, low: float, high: float) -> float | None:
        """A finite number from ``low`` to ``high``."""
        value = self.take(field)
        if value is None:
            return None
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise wrong_type(self.name(field), "a number", value)
        self._check_range(field, value, low, high)
        return float(value)

    def object(self, field: str) -> EventFields | None:
        """An object, to be read in its turn."""
        value = self.take(field)
        return None if value is None else EventFields(value, self.name(field))

    def array(self, field: str) -> list[Any] | None:
        """An array, its elements as they came."""
        value = self.take(field)
        if value is not None and not isinstance(value, list):
            raise wrong_type(self.name(field), "an array", value)
        return value

    def unsupported(self, field: str, why: str, *, off: Collection[str] = ()) -> None:
        """Refuse a field of the protocol that live sessions do not have.

        Args:
            field: ``null``, ``false``, an empty array and the values in ``off`` ask for nothing
                and pass.
            why: What there is instead, as a sentence.
            off: Words that mean the same as no field.
        """
        value = self.take(field)
        nothing = value is None or value is False or value == []
        if nothing or (isinstance(value, str) and value in off):
            return
        name = self.name(field)
        raise WireError(
            f"'{name}' is not supported here. {why}", code="unsupported_parameter", param=name
        )

    def end(self) -> None:
        """Refuse fields that were not taken.

        Raises:
            WireError: There is one.
        """
        for field in self._left:
            name = self.name(field)[:200]
            raise WireError(f"Unknown parameter: '{name}'.", code="unknown_parameter", param=name)

    def _check_range(self, field: str, value: float, low: float, high: float) -> None:
        # A comparison with NaN is false, so the range is asked for, not its opposite.
        if not low <= value <= high:
            bounds = f"from {low} to {high}" if math.isfinite(high) else f"of at least {low}"
            raise WireError(
                f"Invalid '{self.name(field)}': {str(value)[:40]}. Expected a number {bounds}.",
                param=self.name(field),
            )


def wrong_type(name: str, expected: str, value: object) -> WireError:
    """The error of a value of another type than the field takes."""
    got = _WORDS.get(type(value), "something else")
    return WireError(
        f"Invalid type for '{name}': expected {expected}, but got {got} instead.",
        code="invalid_type",
        param=name,
    )


def wrong_value(name: str, value: str, choices: Collection[str]) -> WireError:
    """The error of a word that is not among those that the field takes."""
    known = ", ".join(f"'{choice}'" for choice in choices)
    return WireError(f"Invalid value: '{value[:100]}'. Supported values are: {known}.", param=name)
