"""The `mm_ext` block of a request: read, checked, and kept while the request is rendered."""

from __future__ import annotations

from typing import Any

from pydantic import ValidationError

from vllm_mm_ext.config.options import DEFAULT_OPTIONS, RequestOptions
from vllm_mm_ext.config.schema import problems
from vllm_mm_ext.errors import MediaError
from vllm_mm_ext.request.blocks import KEY


class OptionError(MediaError):
    """A request's option is unknown, out of bounds, or not available where it was sent."""

    code = "option"


def read_options(raw: Any) -> RequestOptions:
    """Check a block against its schema.

    Args:
        raw: Value of the body's `mm_ext`; None when it has none.

    Raises:
        OptionError: An option is wrong; the message names its key, the value and what is valid.
    """
    if raw is None:
        return DEFAULT_OPTIONS
    if not isinstance(raw, dict):
        raise OptionError(f"{KEY} must be an object, got a {type(raw).__name__}", parameter=KEY)
    try:
        return RequestOptions.model_validate(raw, strict=True)
    except ValidationError as error:
        found = problems(error, RequestOptions, KEY)
        message = "; ".join(str(problem) for problem in found)
        raise OptionError(message, parameter=found[0].key) from None


def refuse_options(raw: Any, route: str) -> None:
    """Refuse a block on a route without options.

    Args:
        raw: Value of the body's `mm_ext`; None when it has none.
        route: Path of the route, for the message.

    Raises:
        OptionError: There is one.
    """
    if raw is not None:
        raise OptionError(f"{route} takes no {KEY}; send it to /v1/chat/completions", parameter=KEY)
