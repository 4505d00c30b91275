"""The plugin's errors as exceptions that vLLM answers, with the same status on every route.

vLLM makes an answer of an exception in two places: in the exception handlers of its FastAPI
application (OpenAI's routes, pooling, transcription, ``/tokenize``), and in the routes that have an
error body of their own (``/v1/messages``, ``/cohere/v2/chat``). Both call vLLM's
``create_error_response``, which reads the status from the exception: 400 for
``VLLMValidationError``, 422 for ``VLLMUnprocessableEntityError``, and whatever a
``GracefulHTTPError`` says. So an exception of the right class is all that a status needs.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from http import HTTPStatus
from typing import Any

from vllm.exceptions import (
    GracefulHTTPError,
    RetryableRequestError,
    VLLMClientError,
    VLLMError,
    VLLMUnprocessableEntityError,
    VLLMValidationError,
)

from vllm_mm_ext.errors import (
    ForbiddenDomainError,
    InternalMediaError,
    MediaError,
    NoSuchStreamError,
    UnreadableMediaError,
    raising_package,
)
from vllm_mm_ext.media.recorded import RecordError
from vllm_mm_ext.request.context import current_request

logger = logging.getLogger("vllm.mm_ext")


class FailedMediaError(GracefulHTTPError):  # type: ignore[misc]
    """A ``MediaError`` whose status is neither 400 nor 422.

    Attributes:
        parameter: The request field at fault.
    """

    def __init__(self, error: MediaError) -> None:
        super().__init__(error.message, error.status)
        self.parameter = error.parameter


class RefusedMediaError(FailedMediaError, VLLMClientError):  # type: ignore[misc]
    """A ``FailedMediaError`` that is the client's fault."""


class AbortedError(RetryableRequestError):  # type: ignore[misc]
    """The engine gave a prompt up, as ``/pause`` and ``/sleep`` have it do by default.

    vLLM answers what was written until then, with the finish reason "abort". A prompt that is sent
    meanwhile waits for the engine to go on; vLLM 0.33 refuses it with a 503, unless the mode of the
    pause is `keep`.
    """

    def __init__(self) -> None:
        super().__init__("The engine gave this prompt up, as when it is paused. Send it again.")


class NoMediumError(VLLMUnprocessableEntityError, ValueError):  # type: ignore[misc]
    """A file lacks the medium that is asked for, or the medium cannot be decoded.

    vLLM's own media connector raises a ``ValueError`` then, and ``/v1/systemone`` takes that for a
    video without sound.
    """


def answer_to(error: MediaError) -> VLLMError:
    """The exception that vLLM answers with an error's status, message and parameter."""
    if error.status is HTTPStatus.BAD_REQUEST:
        return VLLMValidationError(error.message, parameter=error.parameter, value=error.value)
    if error.status is HTTPStatus.UNPROCESSABLE_ENTITY:
        none = isinstance(error, NoSuchStreamError | UnreadableMediaError)
        answer: Any = NoMediumError if none else VLLMUnprocessableEntityError
        return answer(error.message, parameter=error.parameter, value=error.value)
    return RefusedMediaError(error) if error.status < 500 else FailedMediaError(error)


@contextmanager
def client_errors() -> Iterator[None]:
    """Raise errors as vLLM's exceptions: media errors by their status, faults of ours as a 500.

    vLLM answers any ``ValueError`` or ``TypeError`` with a 400 that quotes it. For an error that
    vLLM's code raised this stays so. An error that the plugin's code did not mean to raise is
    logged with its traceback, and the client learns only that the server failed.
    """
    try:
        yield
    except (VLLMError, RecordError):
        # A record that does not fit is no error of the request: ``recorded_requests``.
        raise
    except Exception as error:
        # No local variable may hold an error, which leads to this frame by its traceback.
        if isinstance(_cause(error), MediaError):
            _note_refusal(_cause(error).code)
        if isinstance(_cause(error), ForbiddenDomainError):
            # As vLLM's own connector does.
            raise ValueError(_cause(error).message) from error
        if isinstance(_cause(error), MediaError):
            raise answer_to(_cause(error)) from error
        if raising_package(_cause(error), ("vllm", "vllm_mm_ext")) != "vllm_mm_ext":
            raise
        logger.exception("A request about media failed by a fault of the plugin")
        _note_refusal(InternalMediaError.code)
        raise answer_to(InternalMediaError()) from error


def _note_refusal(code: str) -> None:
    context = current_request()
    if context is not None:
        context.trace.refused = code


def _cause(error: BaseException) -> Any:
    """The error that led to this one, or itself; a ``MediaError`` speaks for what led to it.

    Where a processor fails, vLLM raises an error of its own that quotes the data.
    """
    while error.__cause__ is not None and not isinstance(error, MediaError):
        error = error.__cause__
    return error


def attach_to(app: Any) -> None:
    """Put the parameter into FastAPI's answers to ``FailedMediaError``.

    vLLM leaves the parameter out of its answer to a ``GracefulHTTPError``.

    Args:
        app: vLLM's FastAPI application.
    """
    # Engine processes import this module too, and need no web framework.
    from fastapi.responses import JSONResponse
    from vllm.entrypoints.serve import create_error_response

    async def handle(_: Any, answer: FailedMediaError) -> Any:
        body = create_error_response(answer)
        body.error.param = answer.parameter
        return JSONResponse(body.model_dump(), status_code=body.error.code)

    app.add_exception_handler(FailedMediaError, handle)
