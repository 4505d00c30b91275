"""Reads the videos and the text of a conversation from its OpenAI messages."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, MutableMapping, Sequence
from typing import Any

from vllm_mm_ext.errors import MediaError

# Tokens that a chat template puts around a message or a media item (role names, start and end
# markers), and around the whole conversation (a default system prompt, the answer's header). The
# numbers are generous: a request planned a little too small is served, one planned a little too
# large is refused.
_PER_MESSAGE = 12
_PER_PART = 4
_PER_CONVERSATION = 48


def list_contents(messages: Sequence[Any]) -> None:
    """Make lists of the contents of messages that can be read once only.

    Where pydantic matches a message with the types of the OpenAI client alone (an assistant's call
    of a custom tool, an output of the Responses API that is sent back), it makes an iterator of the
    message's content. ``LLM.chat`` hands on whatever its caller made. The other functions of this
    module, and vLLM after them, read lists.

    Args:
        messages: OpenAI chat messages; their ``content`` and ``tool_calls`` are replaced.

    Raises:
        MediaError: An iterator of pydantic comes to a part that these types do not have.
    """
    for number, message in enumerate(messages):
        for key in ("content", "tool_calls") if isinstance(message, MutableMapping) else ():
            value = message.get(key)
            if not isinstance(value, Iterable) or isinstance(value, list | str | Mapping):
                continue
            try:
                message[key] = list(value)
            except ValueError:
                where = f"messages[{number}].{key}"
                raise MediaError(
                    f"{where} has a part of no known type, or one that a message with these fields "
                    "cannot have",
                    parameter=where,
                ) from None


def video_urls(messages: Sequence[Any]) -> list[str]:
    """URLs of the videos in the order of the messages, as the client spelled them.

    Both spellings that vLLM takes count: ``{"type": "video_url", "video_url": {"url": ...}}``, and
    the URL as a plain string (where the part has a ``uuid``, or no type). Parts without a URL are
    left out: they name a video that was sent before.
    """
    return [url for part in _video_parts(messages) if (url := _url(part)) is not None]


def videos_without_url(messages: Sequence[Any]) -> int:
    """Number of videos given by the ``uuid`` of a video sent before, or as embeddings."""
    named = sum(1 for part in _video_parts(messages) if _url(part) is None)
    return named + sum(1 for part in _parts(messages) if "video_embeds" in part)


def embeds_sound(messages: Sequence[Any]) -> bool:
    """Whether a conversation has sound that is given as embeddings."""
    return any("audio_embeds" in part for part in _parts(messages))


def text_of(messages: Sequence[Any], tools: Sequence[Any] | None) -> str:
    """All text of a conversation, for counting its tokens.

    Args:
        messages: OpenAI chat messages.
        tools: Tool definitions that the chat template writes into the prompt.
    """
    texts = [message["content"] for message in messages if isinstance(_content(message), str)]
    for part in _contents(messages):
        texts += _texts(part, "text", "thinking", "refusal")
    for message in messages:
        if isinstance(message, Mapping):
            if message.get("tool_calls"):
                texts.append(str(message["tool_calls"]))
            # From vLLM 0.33 on these may be embeddings instead of a text.
            texts += _texts(message, "reasoning")
    if tools:
        texts.append(json.dumps(tools, default=str))
    return "\n".join(texts)


def template_tokens(messages: Sequence[Any]) -> int:
    """An upper estimate of the tokens that a chat template adds to a conversation's text."""
    parts = sum(1 for _ in _contents(messages))
    return _PER_CONVERSATION + _PER_MESSAGE * len(messages) + _PER_PART * parts


def _video_parts(messages: Sequence[Any]) -> Iterator[Mapping[str, Any]]:
    for part in _parts(messages):
        if "video_url" in part and part.get("type") in ("video_url", None):
            yield part


def _url(part: Mapping[str, Any]) -> str | None:
    url = part["video_url"]
    url = url.get("url") if isinstance(url, Mapping) else url
    return url if isinstance(url, str) and url else None


def _content(message: Any) -> Any:
    return message.get("content") if isinstance(message, Mapping) else None


def _parts(messages: Sequence[Any]) -> Iterator[Mapping[str, Any]]:
    yield from (part for part in _contents(messages) if isinstance(part, Mapping))


def _contents(messages: Sequence[Any]) -> Iterator[Any]:
    """All parts of all messages."""
    for message in messages:
        content = _content(message)
        if isinstance(content, list):
            yield from content


def _texts(part: Any, *keys: str) -> list[str]:
    """The texts of a part, which vLLM lets be a plain text."""
    if isinstance(part, str):
        return [part]
    found = [part.get(key) for key in keys] if isinstance(part, Mapping) else []
    return [text for text in found if isinstance(text, str)]


def question_of(messages: Sequence[Any]) -> str:
    """The text of the last message of a user that has any; empty where none has."""
    for message in reversed(messages):
        if isinstance(message, Mapping) and message.get("role") == "user":
            content = message.get("content")
            texts = [text for part in _contents([message]) for text in _texts(part, "text")]
            text = content if isinstance(content, str) else "\n".join(texts)
            if text.strip():
                return text.strip()
    return ""


def with_texts_for_videos(messages: Sequence[Any], texts: Mapping[str, str]) -> list[Any]:
    """A conversation in which texts stand where videos stood.

    Args:
        messages: OpenAI chat messages; they are not changed.
        texts: For the URL of each video. Where a video is shown again, nothing stands.
    """
    left = dict(texts)
    made: list[Any] = []
    for message in messages:
        content = _content(message)
        if not isinstance(content, list):
            made.append(message)
            continue
        parts: list[Any] = []
        for part in content:
            if not isinstance(part, Mapping) or not any(_video_parts([{"content": [part]}])):
                parts.append(part)
            elif text := left.pop(_url(part) or "", ""):
                parts.append({"type": "text", "text": text})
        made.append({**message, "content": parts or ""})
    return made
