"""Errors a client can cause. No torch, no vLLM: decode workers raise these too.

Each error says what was wrong and, where there is one, the limit that applies.
``vllm_mm_ext.adapters.media.media_connector`` turns them into vLLM's own 400 response.
"""

from __future__ import annotations

from http import HTTPStatus
from typing import Any, ClassVar


class MediaError(ValueError):
    """The client's media cannot be served as asked.

    Args:
        message: What is wrong, in words a client can act on, naming the limit.
        parameter: The request field at fault (``video_url``, ``input_audio``...).
        value: The offending value, if short and safe to echo.
    """

    code = "media_error"
    #: The HTTP status of the answer to a request that fails with this error.
    status: ClassVar[HTTPStatus] = HTTPStatus.BAD_REQUEST
    #: Seconds after which the same request may succeed, for the Retry-After header; None: no such header.
    retry_after_s: ClassVar[int | None] = None

    def __init__(self, message: str, *, parameter: str = "media", value: Any = None) -> None:
        super().__init__(message)
        self.message = message
        self.parameter = parameter
        self.value = value

    def __reduce__(self) -> tuple[Any, ...]:
        return (_rebuild, (type(self), self.message, self.parameter, self.value))


def _rebuild(cls: type[MediaError], message: str, parameter: str, value: Any) -> MediaError:
    return cls(message, parameter=parameter, value=value)


class ForbiddenMediaError(MediaError):
    """The URL, domain or local path is not allowed by the server's settings."""

    code = "forbidden"


class ForbiddenDomainError(ForbiddenMediaError):
    """The URL's host is not among the domains the server allows."""


class UnreachableMediaError(MediaError):
    """The URL leads to no media: the host or the file does not exist, or the origin says no."""

    code = "unreachable"


class OriginError(UnreachableMediaError):
    """The origin failed: a 5xx answer, a broken or refused connection, or no valid HTTP."""

    code = "origin_error"
    status = HTTPStatus.BAD_GATEWAY


class OriginTimeoutError(OriginError):
    """The origin did not deliver the media in time."""

    code = "origin_timeout"
    status = HTTPStatus.GATEWAY_TIMEOUT


class MediaTooLargeError(MediaError):
    """Encoded bytes, pixels, frames or memory are past a limit."""

    code = "too_large"


class MediaTooLongError(MediaError):
    """The duration is past a limit."""

    code = "too_long"


class UnreadableMediaError(MediaError):
    """Not media, truncated, or corrupt beyond use."""

    code = "unreadable"


class NoSuchStreamError(MediaError):
    """The file has no video (or no audio) stream."""

    code = "no_stream"


class DecodeTimeoutError(MediaError):
    """Decoding ran past its time limit and was stopped."""

    code = "decode_timeout"


class DecodeCrashError(MediaError):
    """The decoder process died on this input; the process was replaced."""

    code = "decode_crash"


class OverBudgetError(MediaError):
    """Even at its lowest quality the media takes more tokens than there are."""

    code = "over_budget"


class OptionBoundError(MediaError):
    """An option asks for more than this server allows, or for what its model cannot do."""

    code = "option"


class BusyError(MediaError):
    """The server has no room for the media at present; the same request may succeed later."""

    code = "busy"
    status = HTTPStatus.SERVICE_UNAVAILABLE
    retry_after_s = 1
