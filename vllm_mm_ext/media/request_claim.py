"""The claim on the media budget of the request whose context this is."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

from vllm_mm_ext.media.fetch.byte_gate import Claim, MediaBudget


class _Request:
    """A request that is being rendered, and its claim once it has media."""

    claim: Claim | None = None


_request: ContextVar[_Request | None] = ContextVar("mm_ext_claim", default=None)


def current_claim(budget: MediaBudget) -> Claim | None:
    """The claim on ``budget`` of the request being rendered; None outside of ``claiming``."""
    request = _request.get()
    if request is None:
        return None
    if request.claim is None:
        request.claim = budget.claim()
    return request.claim


@contextmanager
def claiming() -> Iterator[None]:
    """Let all media of a request, while it is rendered, wait for the media budget as one."""
    request = _Request()
    token = _request.set(request)
    try:
        yield
    finally:
        _request.reset(token)
        if request.claim is not None:
            request.claim.end()
