"""How a client tells routers the key of a request: in two headers, and in the body."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from vllm_mm_ext.fleet.route_key import KEY_HEADER, SESSION_HEADER, route_key


def route_headers(body: Mapping[str, Any]) -> dict[str, str]:
    """Headers that tell routers the key of a request; empty for a request that has none.

    With the openai client: ``create(**body, extra_headers=route_headers(body))``.

    Args:
        body: The request's body, or the arguments of the openai client's ``create``, with what it
            shall get as ``extra_body``.
    """
    # The client puts `extra_body` into the body itself.
    extra = body.get("extra_body")
    key = route_key({**body, **extra} if isinstance(extra, Mapping) else body)
    # Some routers know no header of one's own. The plugin does not take a key for a session.
    return {} if key is None else {KEY_HEADER: key, SESSION_HEADER: key}


def with_route_key(body: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, str]]:
    """A request's body with its key in `mm_ext`, for hops that drop headers, and the headers.

    A request that has no key stays as it is.

    Args:
        body: The request's body; it is not changed.
    """
    headers = route_headers(body)
    if not headers:
        return dict(body), headers
    block = body.get("mm_ext")
    named = {**(block if isinstance(block, Mapping) else {}), "key": headers[KEY_HEADER]}
    return {**body, "mm_ext": named}, headers
