"""The server events of the Realtime protocol, as its text-out core has them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

from vllm_mm_ext.live.effects import Usage

Event = dict[str, Any]
ItemStatus = Literal["completed", "incomplete", "in_progress"]
ResponseStatus = Literal["completed", "cancelled", "failed", "incomplete", "in_progress"]


def error_event(
    message: str,
    *,
    code: str,
    error_type: str = "invalid_request_error",
    param: str | None = None,
    event_id: str | None = None,
) -> Event:
    """``error``.

    Args:
        message: For people.
        code: For programs.
        error_type: ``invalid_request_error`` or ``server_error``.
        param: Path of the field at fault.
        event_id: Of the client's event at fault.
    """
    return {
        "type": "error",
        "error": {
            "type": error_type,
            "code": code,
            "message": message,
            "param": param,
            "event_id": event_id,
        },
    }


def session_event(
    kind: Literal["session.created", "session.updated"], session: Mapping[str, Any]
) -> Event:
    """``session.created`` and ``session.updated``."""
    return {"type": kind, "session": dict(session)}


def speech_started(audio_start_ms: int, item_id: str) -> Event:
    """``input_audio_buffer.speech_started``."""
    return {
        "type": "input_audio_buffer.speech_started",
        "audio_start_ms": audio_start_ms,
        "item_id": item_id,
    }


def speech_stopped(audio_end_ms: int, item_id: str) -> Event:
    """``input_audio_buffer.speech_stopped``."""
    return {
        "type": "input_audio_buffer.speech_stopped",
        "audio_end_ms": audio_end_ms,
        "item_id": item_id,
    }


def timeout_triggered(audio_start_ms: int, audio_end_ms: int, item_id: str) -> Event:
    """``input_audio_buffer.timeout_triggered``."""
    return {
        "type": "input_audio_buffer.timeout_triggered",
        "audio_start_ms": audio_start_ms,
        "audio_end_ms": audio_end_ms,
        "item_id": item_id,
    }


def committed(previous_item_id: str | None, item_id: str) -> Event:
    """``input_audio_buffer.committed``."""
    return {
        "type": "input_audio_buffer.committed",
        "previous_item_id": previous_item_id,
        "item_id": item_id,
    }


def cleared() -> Event:
    """``input_audio_buffer.cleared``."""
    return {"type": "input_audio_buffer.cleared"}


def item_event(
    kind: Literal["conversation.item.added", "conversation.item.done"],
    previous_item_id: str | None,
    item: Event,
) -> Event:
    """``conversation.item.added`` and ``conversation.item.done``."""
    return {"type": kind, "previous_item_id": previous_item_id, "item": item}


def item_retrieved(item: Event) -> Event:
    """``conversation.item.retrieved``."""
    return {"type": "conversation.item.retrieved", "item": item}


def item_deleted(item_id: str) -> Event:
    """``conversation.item.deleted``."""
    return {"type": "conversation.item.deleted", "item_id": item_id}


def item_truncated(item_id: str, audio_end_ms: int) -> Event:
    """``conversation.item.truncated``."""
    return {
        "type": "conversation.item.truncated",
        "item_id": item_id,
        "content_index": 0,
        "audio_end_ms": audio_end_ms,
    }


def conversation_truncated(item_ids: Sequence[str], tokens: int) -> Event:
    """``mm_ext.truncated``: the oldest turns went, for the context is full.

    Args:
        item_ids: Items that went; the oldest media of an item can go while the item stays.
        tokens: What went had about as many tokens.
    """
    return {"type": "mm_ext.truncated", "items": list(item_ids), "tokens": tokens}


def item(item_id: str, role: str, status: ItemStatus, content: Sequence[Event]) -> Event:
    """An item, as events show it."""
    return {
        "id": item_id,
        "object": "realtime.item",
        "type": "message",
        "status": status,
        "role": role,
        "content": list(content),
    }


def response(
    response_id: str,
    *,
    conversation_id: str | None,
    status: ResponseStatus,
    details: Event | None,
    output: Sequence[Event],
    max_output_tokens: int | Literal["inf"],
    metadata: Mapping[str, str] | None,
    usage: Usage | None,
) -> Event:
    """A response, as ``response.created`` and ``response.done`` show it.

    Args:
        response_id: Names the response.
        conversation_id: None: the answer is no item of the conversation.
        status: How far it is.
        details: Why it is ``cancelled``, ``incomplete`` or ``failed``.
        output: Its items, at most one.
        max_output_tokens: As asked for.
        metadata: The client's.
        usage: None: not known (yet).
    """
    return {
        "id": response_id,
        "object": "realtime.response",
        "status": status,
        "status_details": None if details is None else {"type": status, **details},
        "output": list(output),
        "conversation_id": conversation_id,
        "output_modalities": ["text"],
        "max_output_tokens": max_output_tokens,
        "metadata": None if metadata is None else dict(metadata),
        "usage": None if usage is None else _usage(usage),
    }


def _usage(usage: Usage) -> Event:
    text = usage.input_tokens - usage.audio_tokens - usage.image_tokens
    return {
        "total_tokens": usage.input_tokens + usage.output_tokens,
        "input_tokens": usage.input_tokens,
        "output_tokens": usage.output_tokens,
        "input_token_details": {
            "text_tokens": text,
            "audio_tokens": usage.audio_tokens,
            "image_tokens": usage.image_tokens,
            "cached_tokens": usage.cached_tokens,
        },
        "output_token_details": {"text_tokens": usage.output_tokens, "audio_tokens": 0},
    }


def response_event(kind: Literal["response.created", "response.done"], shown: Event) -> Event:
    """``response.created`` and ``response.done``."""
    return {"type": kind, "response": shown}


def output_item_event(
    kind: Literal["response.output_item.added", "response.output_item.done"],
    response_id: str,
    shown: Event,
) -> Event:
    """``response.output_item.added`` and ``response.output_item.done``."""
    return {"type": kind, "response_id": response_id, "output_index": 0, "item": shown}


def content_part_event(
    kind: Literal["response.content_part.added", "response.content_part.done"],
    response_id: str,
    item_id: str,
    text: str,
) -> Event:
    """``response.content_part.added`` and ``response.content_part.done``."""
    return _of_text(kind, response_id, item_id) | {"part": {"type": "text", "text": text}}


def text_delta(response_id: str, item_id: str, delta: str) -> Event:
    """``response.output_text.delta``."""
    return _of_text("response.output_text.delta", response_id, item_id) | {"delta": delta}


def text_done(response_id: str, item_id: str, text: str) -> Event:
    """``response.output_text.done``."""
    return _of_text("response.output_text.done", response_id, item_id) | {"text": text}


def _of_text(kind: str, response_id: str, item_id: str) -> Event:
    return {
        "type": kind,
        "response_id": response_id,
        "item_id": item_id,
        "output_index": 0,
        "content_index": 0,
    }


def rate_limits_updated(limit: int, remaining: int) -> Event:
    """``rate_limits.updated``: what is left of the context before the oldest turns go."""
    return {
        "type": "rate_limits.updated",
        "rate_limits": [
            {"name": "tokens", "limit": limit, "remaining": remaining, "reset_seconds": 0.0}
        ],
    }
