"""Marks text of clients that reads like a placeholder of media, so that it stays text.

A tokenizer makes a special token of such text, which would then stand for a media item of the
request. With a mark inside, the text is no special token; the mark is where the prompt is cut into
parts that are tokenized one by one.
"""

from __future__ import annotations

import re
from bisect import bisect_left
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

# No text has this code point: Unicode keeps it for a program's own use.
MARK = "\ufdd0"


def marked(messages: Sequence[Any], placeholders: Sequence[str]) -> Sequence[Any]:
    """Messages with a mark inside each placeholder in their text.

    Args:
        messages: OpenAI chat messages; they are not changed.
        placeholders: Special tokens that stand for media.

    Returns:
        ``messages`` itself if there is nothing to mark.
    """
    if not placeholders:
        return messages
    pattern = re.compile("|".join(map(re.escape, placeholders)))
    made = [_message(message, pattern) for message in messages]
    changed = any(new is not old for new, old in zip(made, messages, strict=True))
    return made if changed else messages


def unmarked(value: Any) -> Any:
    """A text, or the texts in a message or its parts, without marks."""
    if isinstance(value, str):
        return value.replace(MARK, "")
    if isinstance(value, list):
        return [unmarked(item) for item in value]
    if isinstance(value, dict):
        return {key: unmarked(item) for key, item in value.items()}
    return value


def _message(message: Any, pattern: re.Pattern[str]) -> Any:
    content = message.get("content") if isinstance(message, Mapping) else None
    if isinstance(content, str):
        (text,) = _texts([content], pattern)
        return message if text == content else {**message, "content": text}
    if not isinstance(content, list):
        return message
    parts = list(content)
    run: list[int] = []
    # Chat templates write texts that follow each other without anything between.
    for index in range(len(parts) + 1):
        if index < len(parts) and _text(parts[index]) is not None:
            run.append(index)
        else:
            found = _texts([_text(parts[i]) or "" for i in run], pattern)
            for i, text in zip(run, found, strict=True):
                if text != _text(parts[i]):
                    parts[i] = text if isinstance(parts[i], str) else {**parts[i], "text": text}
            run = []
    return message if parts == content else {**message, "content": parts}


def _text(part: Any) -> str | None:
    text = part.get("text") if isinstance(part, Mapping) else part
    return text if isinstance(text, str) else None


def _texts(texts: Sequence[str], pattern: re.Pattern[str]) -> list[str]:
    """Texts that follow each other, with a mark after the first character of each match."""
    cuts = [match.start() + 1 for match in pattern.finditer("".join(texts))]
    made, begin = [], 0
    for text in texts:
        end = begin + len(text)
        inside = cuts[bisect_left(cuts, begin) : bisect_left(cuts, end)]
        edges = [0, *(cut - begin for cut in inside), len(text)]
        made.append(MARK.join(text[a:b] for a, b in pairwise(edges)))
        begin = end
    return made
