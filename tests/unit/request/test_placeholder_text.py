"""Text that reads like a placeholder is marked, and nothing else is touched."""

from __future__ import annotations

import copy
import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllm_mm_ext.errors import MediaError
from vllm_mm_ext.request.conversation import list_contents
from vllm_mm_ext.request.placeholder_text import MARK, marked, marked_arguments, unmarked

PADS = ["<|video_pad|>", "<image>"]


def user(content: Any) -> dict[str, Any]:
    return {"role": "user", "content": content}


def text(content: str) -> dict[str, Any]:
    return {"type": "text", "text": content}


def joined(message: Any) -> str:
    content = message["content"]
    parts = [content] if isinstance(content, str) else content
    return "".join(p if isinstance(p, str) else p.get("text") or "" for p in parts)


@pytest.mark.parametrize(
    "content",
    [
        "a <|video_pad|> b",
        "<image><image>",
        [text("<image>"), text("and <|video_pad|>")],
        [text("<im"), text("age>")],
        ["<", "i", "mage>", text("<|video"), text(""), text("_pad|>")],
        [text("<im"), {"type": "text", "text": None}, text("age>")],
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


@given(st.lists(st.text("<image>|vdo_p \n", max_size=14), max_size=4))
def test_texts_that_a_template_strips_or_joins_make_no_placeholder(texts: list[str]) -> None:
    (made,) = marked([user([text(one) for one in texts])], PADS)
    written = [part["text"] for part in made["content"]]
    assert not any(pad in "".join(map(str.strip, written)) for pad in PADS)
    assert not any(pad in "".join(written) for pad in PADS)
    assert unmarked(written) == texts


def function(arguments: Any) -> dict[str, Any]:
    return {"type": "function", "id": "1", "function": {"name": "look", "arguments": arguments}}


@pytest.mark.parametrize(
    "message",
    [
        user([{"type": "refusal", "refusal": "no <image>"}]),
        user([{"type": "thinking", "thinking": "<image>?"}]),
        user([{"type": "tool_reference", "name": "<image>"}]),
        {"role": "assistant", "content": None, "reasoning": "an <image>"},
        {"role": "user", "name": "<image>", "content": "hello"},
        {"role": "<image>", "content": "hello"},
        {"role": "assistant", "content": "", "tool_calls": [function({"<image>": ["<image>"]})]},
        {"role": "assistant", "content": "", "tool_calls": [function('{"a": "<image>"}')]},
        {"role": "assistant", "content": "", "tool_calls": [function("no JSON, <image>")]},
        {"role": "developer", "content": "", "tools": [{"description": "<image>"}]},
    ],
    ids=str,
)
def test_all_that_a_template_may_write_of_a_message_is_marked(message: dict[str, Any]) -> None:
    before = copy.deepcopy(message)
    (made,) = marked([message], PADS)
    assert message == before
    assert "<image>" not in str(made)
    assert unmarked(made) == before


def test_a_placeholder_written_with_escapes_in_a_tool_call_is_marked() -> None:
    call = function('{"\\u003cimage>": ["\\u003cimage\\u003e"], "n": 1.50}')
    (made,) = marked([{"role": "assistant", "content": "", "tool_calls": [call]}], PADS)
    arguments = json.loads(made["tool_calls"][0]["function"]["arguments"])
    assert "<image>" not in str(arguments)
    assert unmarked(arguments) == {"<image>": ["<image>"], "n": 1.5}


def test_what_a_template_gets_beside_messages_is_marked_except_itself() -> None:
    arguments = {
        "tools": [{"function": {"description": "<image>", "parameters": {"<image>": 1}}}],
        "chat_template": "<image>",
        "enable_thinking": True,
    }
    before = copy.deepcopy(arguments)
    made = marked_arguments(arguments, PADS)
    assert arguments == before
    assert "<image>" not in str(made["tools"])
    assert (made["chat_template"], made["enable_thinking"]) == ("<image>", True)
    assert unmarked(made) == before
    assert marked_arguments(before, []) == before


def test_content_that_can_be_read_once_is_read_once_and_marked() -> None:
    messages = [user(iter([text("<image>"), text("b")]))]
    list_contents(messages)
    (made,) = marked(messages, PADS)
    assert unmarked(made) == user([text("<image>"), text("b")])
    assert made["content"][0]["text"] != "<image>"


def test_messages_nested_too_deeply_are_the_clients_fault() -> None:
    deep = '{"a":' * 100_000
    with pytest.raises(MediaError, match="messages is nested too deeply"):
        marked([{"role": "assistant", "content": "", "tool_calls": [function(deep)]}], PADS)


@pytest.mark.parametrize(
    "message",
    [
        user("<video_pad>"),
        user(None),
        user([{"type": "image_url", "image_url": {"url": "<image>"}}, text("age>")]),
        user([]),
        {"role": "assistant", "content": "", "tool_calls": [function('{"a":  "\\u003cb>"}')]},
    ],
    ids=str,
)
def test_other_messages_are_passed_on_as_they_are(message: dict[str, Any]) -> None:
    messages = [message, "no message"]
    assert marked(messages, PADS) is messages
    assert marked([user("<image>")], []) == [user("<image>")]
