"""The `mm_ext` block of a request: read, checked, and kept while the request is rendered."""

from __future__ import annotations

from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

from pydantic import ValidationError

from vllm_mm_ext.config.options import DEFAULT_OPTIONS, RequestOptions
from vllm_mm_ext.config.schema import problems
from vllm_mm_ext.errors import MediaError
from vllm_mm_ext.request.blocks import KEY


class OptionError(MediaError):
    """A request's option is unknown, out of bounds, or not available where it was sent."""

    code = "option"


@dataclass(frozen=True)
class RequestContext:
    """What a request asks beyond the OpenAI API.

    Attributes:
        options: Its `mm_ext` block; the defaults without one.
        session: The conversation it says it belongs to, if it says so.
    """

    options: RequestOptions = DEFAULT_OPTIONS
    session: str | None = None


_NOTHING_ASKED = RequestContext()
_current: ContextVar[RequestContext] = ContextVar("mm_ext_request", default=_NOTHING_ASKED)


def current_request() -> RequestContext:
    """The request being rendered; one that asks nothing outside of requests."""
    return _current.get()


def open_request(raw: Any, session: str | None) -> RequestContext:
    """Start a request in the current context.

    Args:
        raw: Value of the body's `mm_ext`; None when it has none.
        session: Session id of the request.

    Raises:
        OptionError: An option is wrong; the message names its key, the value and what is valid.
    """
    context = RequestContext(read_options(raw), session)
    _current.set(context)
    return context


def read_options(raw: Any) -> RequestOptions:
    """Check a block against its schema.

    Raises:
        OptionError: See ``open_request``.
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

    Raises:
        OptionError: There is one.
    """
    if raw is not None:
        raise OptionError(f"{route} takes no {KEY}; send it to /v1/chat/completions", parameter=KEY)
