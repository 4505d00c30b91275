"""Marks text of clients that reads like a placeholder of media, so that it stays text.

A tokenizer makes a special token of such text, which would then stand for a media item of the
request. With a mark inside, the text is no special token; the mark is where the prompt is cut into
parts that are tokenized one by one.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import lru_cache
from typing import Any

from vllm_mm_ext.errors import MediaError

# No text has this code point: Unicode keeps it for a program's own use.
MARK = "\ufdd0"

# Where parts of a message have text that vLLM puts into the prompt; `name` is of a tool.
_TEXTS = ("text", "refusal", "thinking", "name")

Mark = Callable[[str], str]


def marked(messages: Sequence[Any], placeholders: Sequence[str]) -> Sequence[Any]:
    """Messages with a mark inside each placeholder in their text, reasoning and tool calls.

    Args:
        messages: OpenAI chat messages whose contents are texts or lists; they are not changed.
        placeholders: Special tokens that stand for media.

    Returns:
        ``messages`` itself if there is nothing to mark.

    Raises:
        MediaError: The messages are nested too deeply.
    """
    if not placeholders:
        return messages
    mark = _marking(tuple(placeholders))
    with _not_too_deep("messages"):
        made = [_message(message, mark) for message in messages]
    changed = any(new is not old for new, old in zip(made, messages, strict=True))
    return made if changed else messages


def marked_arguments(arguments: Mapping[str, Any], placeholders: Sequence[str]) -> dict[str, Any]:
    """What a chat template gets beside messages (tools, documents), with marks likewise.

    Args:
        arguments: The template's arguments by name; they are not changed.
        placeholders: Special tokens that stand for media.

    Raises:
        MediaError: The arguments are nested too deeply.
    """
    if not placeholders:
        return dict(arguments)
    mark = _marking(tuple(placeholders))
    with _not_too_deep("chat_template_kwargs"):
        return {
            # The template itself is no text of the conversation.
            name: value if name == "chat_template" else _value(value, mark)
            for name, value in arguments.items()
        }


def is_marked(value: Any) -> bool:
    """Whether a text, or a text in a message or its parts, has a mark."""
    if isinstance(value, str):
        return MARK in value
    if isinstance(value, Mapping):
        return any(is_marked(key) or is_marked(item) for key, item in value.items())
    return isinstance(value, list) and any(map(is_marked, value))


def unmarked(value: Any) -> Any:
    """A text, or the texts in a message or its parts, without marks."""
    if isinstance(value, str):
        return value.replace(MARK, "")
    if isinstance(value, list):
        return [unmarked(item) for item in value]
    if isinstance(value, dict):
        return {unmarked(key): unmarked(item) for key, item in value.items()}
    return value


@contextmanager
def _not_too_deep(parameter: str) -> Iterator[None]:
    try:
        yield
    except RecursionError:
        raise MediaError(f"{parameter} is nested too deeply", parameter=parameter) from None


@lru_cache(maxsize=8)
def _marking(placeholders: tuple[str, ...]) -> Mark:
    """Puts a mark after the first character of each placeholder in a text.

    What follows a text in the prompt (the next part of its message) may complete a placeholder that
    the text only begins, so a beginning at the end of a text is marked too.
    """
    found = re.compile("|".join(f"{re.escape(p[0])}(?={re.escape(p[1:])})" for p in placeholders))
    beginnings = tuple({p[:length] for p in placeholders for length in range(1, len(p))})

    def mark(text: str) -> str:
        made = found.sub(rf"\g<0>{MARK}", text)
        # Templates strip texts.
        end = len(made.rstrip())
        begins = made.endswith(beginnings, 0, end)
        return f"{made[:end]}{MARK}{made[end:]}" if begins else made

    return mark


def _message(message: Any, mark: Mark) -> Any:
    if not isinstance(message, Mapping):
        return message
    made = {
        key: _content(value, mark) if key == "content" else _value(value, mark)
        for key, value in message.items()
    }
    return message if made == message else made


def _content(content: Any, mark: Mark) -> Any:
    if isinstance(content, str):
        return mark(content)
    return [_part(part, mark) for part in content] if isinstance(content, list) else content


def _part(part: Any, mark: Mark) -> Any:
    """A part of a message; URLs and data of media stay as they are."""
    if isinstance(part, str):
        return mark(part)
    if not isinstance(part, Mapping):
        return part
    texts = {key: mark(part[key]) for key in _TEXTS if isinstance(part.get(key), str)}
    return part if all(part[key] == text for key, text in texts.items()) else {**part, **texts}


def _value(value: Any, mark: Mark) -> Any:
    """Marks all texts in a value of JSON, the names of an object's members too."""
    if isinstance(value, str):
        return mark(value)
    if isinstance(value, list):
        return [_value(item, mark) for item in value]
    if isinstance(value, Mapping):
        return {_value(key, mark): _member(key, item, mark) for key, item in value.items()}
    return value


def _member(key: Any, item: Any, mark: Mark) -> Any:
    """A member of an object; of a function call, ``arguments`` are JSON which vLLM parses."""
    if key != "arguments" or not isinstance(item, str):
        return _value(item, mark)
    try:
        # A placeholder may be written with escapes.
        plain = json.dumps(json.loads(item), ensure_ascii=False)
    except ValueError:
        return mark(item)
    made = mark(plain)
    return item if made == plain else made
