"""Text that reads like a placeholder is marked, and nothing else is touched."""

from __future__ import annotations

import copy
from typing import Any

import pytest

from vllm_mm_ext.request.placeholder_text import MARK, marked, unmarked

PADS = ["<|video_pad|>", "<image>"]


def user(content: Any) -> dict[str, Any]:
    return {"role": "user", "content": content}


def text(content: str) -> dict[str, Any]:
    return {"type": "text", "text": content}


def joined(message: Any) -> str:
    content = message["content"]
    parts = [content] if isinstance(content, str) else content
    return "".join(p if isinstance(p, str) else p.get("text", "\n") for p in parts)


@pytest.mark.parametrize(
    "content",
    [
        "a <|video_pad|> b",
        "<image><image>",
        [text("<image>"), text("and <|video_pad|>")],
        [text("<im"), text("age>")],
        ["<", "i", "mage>", text("<|video"), text(""), text("_pad|>")],
        [{"type": "video_url", "video_url": {"url": "u"}}, text("<image>")],
    ],
    ids=str,
)
def test_no_placeholder_is_left_and_the_text_is_the_same_without_marks(content: Any) -> None:
    messages = [user(content)]
    before = copy.deepcopy(messages)
    (made,) = marked(messages, PADS)
    assert messages == before
    assert not any(pad in joined(made) for pad in PADS)
    assert MARK in joined(made)
    assert unmarked([made]) == before


@pytest.mark.parametrize(
    "content",
    [
        "<video_pad>",
        None,
        [text("<im"), {"type": "image_url", "image_url": {"url": "<image>"}}, text("age>")],
        [],
    ],
    ids=str,
)
def test_other_messages_are_passed_on_as_they_are(content: Any) -> None:
    messages = [user(content), "no message"]
    assert marked(messages, PADS) is messages
    assert marked([user("<image>")], []) == [user("<image>")]
