"""Reads and checks the `mm_ext` block of a request."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import ValidationError

from vllm_mm_ext.config.options import DEFAULT_OPTIONS, RequestOptions
from vllm_mm_ext.config.schema import problems
from vllm_mm_ext.errors import MediaError
from vllm_mm_ext.request.blocks import KEY


class OptionError(MediaError):
    """An option of a request is unknown, out of bounds, or not available on the request's route."""

    code = "option"


def read_options(raw: Any) -> RequestOptions:
    """Check a block against its schema.

    Args:
        raw: Value of `mm_ext` in the request's body; None if the body has none.

    Returns:
        The options; the defaults without a block.

    Raises:
        OptionError: An option is wrong. The message names its key, its value and the valid values.
    """
    if raw is None:
        return DEFAULT_OPTIONS
    if not isinstance(raw, dict):
        raise OptionError(f"{KEY} must be an object, got a {type(raw).__name__}", parameter=KEY)
    try:
        options = RequestOptions.model_validate(raw, strict=True)
    except ValidationError as error:
        found = problems(error, RequestOptions, KEY)
        message = "; ".join(str(problem) for problem in found)
        raise OptionError(message, parameter=found[0].key) from None
    # Only routers look at the key: requests that differ in the key alone are served alike.
    return options if options.key is None else options.model_copy(update={"key": None})


def moves_kv(transfer: Mapping[str, Any] | None) -> bool:
    """Whether one server prefills a request's prompt and another one answers it.

    Args:
        transfer: The request's ``kv_transfer_params``.
    """
    flags = ("do_remote_decode", "do_remote_prefill")
    return transfer is not None and any(transfer.get(flag) for flag in flags)


def refuse_options(raw: Any, route: str) -> None:
    """Refuse a block on a route that takes none but `key`.

    Args:
        raw: Value of `mm_ext` in the request's body; None if the body has none.
        route: Path of the route, for the message.

    Raises:
        OptionError: The body has a block with anything else, or a wrong `key`.
    """
    if isinstance(raw, dict) and set(raw) == {"key"}:
        read_options(raw)
    elif raw is not None:
        raise OptionError(f"{route} takes no {KEY}; send it to /v1/chat/completions", parameter=KEY)


def refuse_long_video(route: str) -> None:
    """Refuse the option `long_video` on a route that does not answer from windows.

    Args:
        route: Path of the route, for the message.

    Raises:
        OptionError: Always.
    """
    raise OptionError(
        f"{route} takes no {KEY}.long_video; send it to /v1/chat/completions",
        parameter=f"{KEY}.long_video",
    )
