"""What an encoder instance is asked, and how it tells that from a question for an answer.

It is asked with the client's own request. The conversation stays whole, and so does all that
decides how much of the context its media get: the encoder must plan as the server that asks does.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Final

# Marks a request for encoding, and holds the digests of the plan of the server that asks.
ENCODE_HEADER: Final = "X-MM-Encode"
# The load tier of each video, as the server that asks has decided it.
LEVELS_HEADER: Final = "X-MM-Levels"
# Tokens that an mm item may have at most at the server that asks, by which it has planned.
ITEM_TOKENS_HEADER: Final = "X-MM-Item-Tokens"
# Fields of a chat completion that decide what the model is to see. The others say how an answer is
# made and told, which an encoder does not do.
SEEN: Final = frozenset(
    {
        *("messages", "model", "tools", "tool_choice", "documents", "reasoning_effort"),
        *("chat_template", "chat_template_kwargs", "add_generation_prompt"),
        *("continue_final_message", "add_special_tokens", "media_io_kwargs"),
        *("mm_processor_kwargs", "max_tokens", "max_completion_tokens"),
        *("truncate_prompt_tokens", "truncation_side", "cache_salt", "session_id", "priority"),
        "request_id",
    }
)
_TEXT: Final = frozenset({"text", "input_text", "output_text", "refusal", "thinking", "reasoning"})
# Ends of keys by which vLLM knows a part without a type.
_MEDIA_KEYS: Final = ("_url", "_embeds")


def has_media(messages: Sequence[Any]) -> bool:
    """Whether a conversation has any part that is not text."""
    return next(_media_parts(messages), None) is not None


def is_encode_request(body: Mapping[str, Any]) -> bool:
    """Whether an unmarked request may be that of a proxy that has media encoded.

    vLLM's proxy sends the client's request with one token to generate, and not streamed.
    """
    limit = body.get("max_completion_tokens") or body.get("max_tokens")
    return limit == 1 and not body.get("stream")


def takes_records(body: Mapping[str, Any]) -> bool:
    """Whether the videos of a request may be taken by their records.

    Such a request may have to be rendered again before its first token, which is for requests that
    have one answer. Embeddings and ``mm_processor_kwargs`` lead past the cache in whose place the
    recorded items are. Media with a ``uuid`` may later be named by it alone, which needs its items
    in vLLM's own cache.
    """
    plain = body.get("n") in (None, 1) and not body.get("use_beam_search")
    return (
        plain
        and not body.get("mm_processor_kwargs")
        and not any(
            part.get("uuid") is not None
            or str(part.get("type")).endswith("_embeds")
            or any(key.endswith("_embeds") for key in part)
            for part in _media_parts(body.get("messages") or ())
        )
    )


def levels_in(header: str | None) -> tuple[int, ...] | None:
    """The load tiers that a header tells of; None if it tells of none."""
    if not header:
        return None
    levels = header.split(",")
    # Python refuses to read numbers of thousands of digits.
    known = all(level.isdecimal() and len(level) <= 2 for level in levels)
    return tuple(map(int, levels)) if known else None


def item_tokens_in(header: str | None) -> int:
    """The limit that a header tells of; 0 if it tells of none."""
    known = header is not None and header.isdecimal() and len(header) <= 9
    return int(header) if header and known else 0


def _media_parts(messages: Sequence[Any]) -> Iterator[Mapping[str, Any]]:
    for message in messages:
        content = message.get("content") if isinstance(message, Mapping) else None
        if isinstance(content, str) or not isinstance(content, Sequence):
            continue
        for part in content:
            if isinstance(part, Mapping) and part.get("type", "text") not in _TEXT:
                yield part
            elif isinstance(part, Mapping) and any(key.endswith(_MEDIA_KEYS) for key in part):
                # vLLM takes parts without a type as well.
                yield part
