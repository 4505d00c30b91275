"""Who may use the routes of the plugin's own: by API key, and by the page that a browser shows."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Collection
from typing import Any

from starlette.datastructures import Headers


def key_check(args: Namespace) -> Any:
    """vLLM's own check, with its keys, for paths that vLLM does not check; None without keys.

    Args:
        args: Of vLLM's command line.
    """
    from vllm import envs
    from vllm.entrypoints.serve.middleware.authenticate import AuthenticationMiddleware

    keys = [key for key in (args.api_key or [envs.VLLM_API_KEY]) if key]
    return AuthenticationMiddleware(None, keys) if keys else None


def allows_origin(headers: Headers, origins: Collection[str]) -> bool:
    """Whether the page that asks, if it is one, may: this server's own, or one of some origins.

    Args:
        headers: Of the request.
        origins: As vLLM's ``--allowed-origins`` lists them; ``*`` is for all.
    """
    origin = headers.get("origin")
    if origin is None or "*" in origins or origin in origins:
        return True
    return origin.partition("://")[2] == headers.get("host")
