"""Errors that end a live session's prompts: which may pass, and what clients are told of them."""

from __future__ import annotations

from http import HTTPStatus

from vllm.exceptions import GracefulHTTPError, RetryableRequestError, VLLMClientError

from vllm_mm_ext.adapters import vllm_compat
from vllm_mm_ext.adapters.live.live_prompt import PromptError

logger = vllm_compat.logger


class UnknownModelError(Exception):
    """The server has no model or adapter of the name that a client gave, or no longer."""


class TooLongError(Exception):
    """A prompt leaves no room for an answer."""

    def __init__(self, tokens: int, limit: int) -> None:
        super().__init__(
            f"The conversation has {tokens} tokens; the model's context has {limit}, "
            "and an answer needs at least one."
        )


def may_pass(error: Exception) -> bool:
    """Whether the same prompt may be taken later: the engine is paused, or has too much to do."""
    if isinstance(error, GracefulHTTPError):
        return bool(error.http_status == HTTPStatus.SERVICE_UNAVAILABLE)
    return isinstance(error, RetryableRequestError)


def told(error: Exception) -> tuple[str, str, str]:
    """Type, code and message of an error as a client is told; the log gets what is unexpected."""
    if isinstance(error, TooLongError):
        return "invalid_request_error", "context_length_exceeded", str(error)
    if isinstance(error, PromptError):
        return "invalid_request_error", "invalid_conversation", str(error)
    if may_pass(error):
        return "server_error", "try_again", str(error)
    if isinstance(error, VLLMClientError):
        too_long = getattr(error, "parameter", None) == "input_tokens"
        code = "context_length_exceeded" if too_long else "invalid_prompt"
        return "invalid_request_error", code, str(error)
    logger.error("mm_ext: a response of a live session failed", exc_info=error)
    return "server_error", "internal_error", "The server failed to answer."
