"""Chunks of a streamed chat completion: those before its answer, and those of the answer."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from vllm_mm_ext.long_video.asking import Cost

DONE = "data: [DONE]\n\n"
_DATA = "data: "
# The first one in a chunk is its own: quotes inside a JSON string are escaped.
_CREATED = re.compile(r'"created":\d+')


@dataclass(frozen=True)
class Head:
    """What all chunks of a stream have in common.

    Attributes:
        id: Of the completion.
        model: Name of the model.
        created: Seconds since 1970.
    """

    id: str
    model: str
    created: int = field(default_factory=lambda: int(time.time()))


def event(value: Mapping[str, Any]) -> str:
    """A server-sent event."""
    return f"{_DATA}{json.dumps(value, separators=(',', ':'))}\n\n"


def without_text(head: Head, more: Mapping[str, Any]) -> str:
    """A chunk that adds nothing to the answer.

    Args:
        head: Of the stream.
        more: Further fields.
    """
    return event(
        {
            "id": head.id,
            "object": "chat.completion.chunk",
            "created": head.created,
            "model": head.model,
            "choices": [{"index": 0, "delta": {}, "finish_reason": None}],
            **more,
        }
    )


def joined(chunk: str, head: Head, cost: Cost) -> str:
    """A chunk of the answer as one of the whole stream.

    Args:
        chunk: As vLLM made it.
        head: Of the stream.
        cost: What the prompts before the answer took.
    """
    chunk = _CREATED.sub(f'"created":{head.created}', chunk, count=1)
    if '"usage":{' not in chunk:
        return chunk
    value = json.loads(chunk[len(_DATA) :])
    return event({**value, "usage": with_cost(value["usage"], cost)})


def with_cost(usage: Mapping[str, Any], cost: Cost) -> dict[str, Any]:
    """The usage of an answer, and of the prompts before it.

    Args:
        usage: OpenAI's ``usage``, of the answer alone.
        cost: What the prompts before the answer took.
    """
    more = {
        "prompt_tokens": cost.prompt_tokens,
        "completion_tokens": cost.completion_tokens,
        "total_tokens": cost.prompt_tokens + cost.completion_tokens,
    }
    made = {**usage, **{key: usage[key] + tokens for key, tokens in more.items()}}
    details = usage.get("prompt_tokens_details")
    # vLLM tells cached tokens only where the operator lets it.
    if details and details.get("cached_tokens") is not None:
        cached = details["cached_tokens"] + cost.cached_tokens
        made["prompt_tokens_details"] = {**details, "cached_tokens": cached}
    return made
