"""Errors that end a request about media, and the HTTP status that each is answered with.

This module imports neither torch nor vLLM: decode workers raise these errors too.
``vllm_mm_ext.adapters.error_answers`` turns them into vLLM's exceptions, which vLLM answers on
every route. ``docs/options.md`` lists the statuses for clients.
"""

from __future__ import annotations

import errno
import os
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from http import HTTPStatus
from typing import Any, ClassVar


class MediaError(ValueError):
    """A reference to media, or what was asked about it, is malformed.

    Subclasses are the errors with other causes.

    Args:
        message: What is wrong, in words that a client can act on, naming the limit if one applies.
        parameter: The request field at fault (``video_url``, ``input_audio``...).
        value: The offending value, if it is short and safe to echo.
    """

    code = "media_error"
    #: The HTTP status of the answer to a request that fails with this error.
    status: ClassVar[HTTPStatus] = HTTPStatus.BAD_REQUEST

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
    """The server's settings do not allow the URL's scheme, domain or local path."""

    code = "forbidden"


class ForbiddenDomainError(ForbiddenMediaError):
    """The URL's host is not among the domains the server allows."""


class UnreachableMediaError(MediaError):
    """The URL leads to no media: the host or the file does not exist, or the origin says no."""

    code = "unreachable"
    status = HTTPStatus.UNPROCESSABLE_ENTITY


class OriginError(UnreachableMediaError):
    """The origin failed: a 5xx answer, a broken or refused connection, or no valid HTTP."""

    code = "origin_error"
    status = HTTPStatus.BAD_GATEWAY


class OriginTimeoutError(OriginError):
    """The origin did not deliver the media in time."""

    code = "origin_timeout"
    status = HTTPStatus.GATEWAY_TIMEOUT


class MediaTooLargeError(MediaError):
    """The media's bytes, pixels, frames or memory are past a limit."""

    code = "too_large"
    status = HTTPStatus.REQUEST_ENTITY_TOO_LARGE


class MediaTooLongError(MediaError):
    """The media's duration is past a limit."""

    code = "too_long"
    status = HTTPStatus.REQUEST_ENTITY_TOO_LARGE


class UnreadableMediaError(MediaError):
    """The file is not media, is cut short before its first frame, or is damaged beyond use."""

    code = "unreadable"
    status = HTTPStatus.UNPROCESSABLE_ENTITY


class UnsupportedFormatError(UnreadableMediaError):
    """The file has a format that the server does not take (a picture, subtitles)."""

    code = "unsupported_format"
    status = HTTPStatus.UNSUPPORTED_MEDIA_TYPE


class NoSuchStreamError(MediaError):
    """The file has no video stream where a video was asked for, or no audio stream for audio."""

    code = "no_stream"
    status = HTTPStatus.UNPROCESSABLE_ENTITY


class DecodeTimeoutError(MediaError):
    """The file took longer to decode than the server allows, so the decoder was stopped."""

    code = "decode_timeout"
    status = HTTPStatus.UNPROCESSABLE_ENTITY


class DecodeCrashError(MediaError):
    """Decoder processes died on this input, one after the other."""

    code = "decode_crash"
    status = HTTPStatus.UNPROCESSABLE_ENTITY


class UnheldMediaError(MediaError):
    """A request names media by a `uuid` without their content, and the server does not hold them.

    The status is that of vLLM's own answer.
    """

    code = "unheld"

    @classmethod
    def of(cls, modalities: Sequence[str]) -> UnheldMediaError:
        """The error of a request with items of these modalities that came without their content."""
        what = " and ".join(modalities)
        return cls(
            f"The request names its {what} by uuid alone, and this server does not hold that "
            f"{what}: either the server has dropped it, or a router sent it to another server, or "
            "took it out of this request. Send it with its content.",
            parameter="uuid",
        )


class OverBudgetError(MediaError):
    """The media takes more tokens, even at the lowest quality, than the prompt has room for.

    The status is that of vLLM's own answer to a prompt that is too long.
    """

    code = "over_budget"


class OptionBoundError(MediaError):
    """An option asks for more than this server allows, or for what its model cannot do."""

    code = "option"


class BusyError(MediaError):
    """The server has no room for the media at present; the same request may succeed later."""

    code = "busy"
    status = HTTPStatus.SERVICE_UNAVAILABLE
    #: Seconds after which the same request may succeed, for the Retry-After header.
    retry_after_s: ClassVar[int] = 1


def no_room(why: str | None) -> BusyError:
    """What a client is told when the server, and not the media, is why media cannot be taken.

    Args:
        why: What the server is short of, as the system says it, if it does.
    """
    return BusyError(f"The server cannot take more media at present: {why}.")


FULL_DISK = frozenset({errno.ENOSPC, errno.EDQUOT})
"""Numbers of the system's errors of a disk that is full, and of a quota that is used up."""

_SHORTAGES = frozenset({errno.EAGAIN, errno.EMFILE, errno.ENFILE, errno.ENOMEM})


@contextmanager
def busy_if_short() -> Iterator[None]:
    """Make a ``BusyError`` of an ``OSError`` that says what the server is short of.

    That is processes, memory or descriptors; they may be there again soon.
    """
    try:
        yield
    except OSError as error:
        if error.errno not in _SHORTAGES:
            raise
        raise no_room(os.strerror(error.errno)) from None


class EncodeOnlyError(MediaError):
    """The instance encodes media for others; what it would answer is empty.

    Routers send a request with this status nowhere else, as it would end here again.
    """

    code = "encode_only"
    status = HTTPStatus.MISDIRECTED_REQUEST


class PairError(MediaError):
    """An instance asks an encoder for outputs which that one makes otherwise."""

    code = "pairing"
    status = HTTPStatus.CONFLICT


class _WordedError(MediaError):
    """An error that says the same whatever the media."""

    #: What is said unless another message is given.
    words: ClassVar[str]

    def __init__(
        self, message: str | None = None, *, parameter: str = "media", value: Any = None
    ) -> None:
        super().__init__(message or self.words, parameter=parameter, value=value)


class TakenDownError(_WordedError):
    """The operator took the media down while the request was served."""

    code = "taken_down"
    status = HTTPStatus.GONE
    words = "The media of this request were taken down by the server's operator."


class InternalMediaError(_WordedError):
    """This plugin's own code failed. The message never holds the cause; the server's log does."""

    code = "internal"
    status = HTTPStatus.INTERNAL_SERVER_ERROR
    words = "The server failed to handle the media. The cause is in the server's log."


# The packages that decode media.
_DECODERS = ("av", "decord")


def by_decoder(error: BaseException) -> bool:
    """Whether a decoder raised an error: it cannot cope with the file, which is the file's fault.

    Args:
        error: A caught error, with its traceback.
    """
    return raising_package(error, ("vllm_mm_ext", *_DECODERS)) in _DECODERS


def raising_package(error: BaseException, packages: Sequence[str]) -> str | None:
    """Whose code raised an error: of some packages, the one with the innermost call.

    Args:
        error: A caught error, with its traceback.
        packages: Names of top-level packages. Calls into other packages count for the caller.

    Returns:
        The package's name, or None if no code of these packages is on the error's way.
    """
    found = None
    for frame, _ in traceback.walk_tb(error.__traceback__):
        # Frames of Cython modules have no globals; their file names begin with the package.
        name = frame.f_globals.get("__name__") or frame.f_code.co_filename.replace("/", ".")
        package = name.partition(".")[0]
        if package in packages:
            found = package
    return found
