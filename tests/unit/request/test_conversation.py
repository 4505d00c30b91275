"""Reading videos and text from conversations as vLLM's request classes hold them."""

from __future__ import annotations

from typing import Any

import pytest
from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest

from vllm_mm_ext.errors import MediaError
from vllm_mm_ext.request.conversation import (
    list_contents,
    question_of,
    template_tokens,
    text_of,
    video_urls,
    videos_without_url,
    with_texts_for_videos,
)

CLIP = "https://host/clip.mp4"


def messages(*content: Any, role: str = "user") -> list[Any]:
    request = ChatCompletionRequest(model="m", messages=[{"role": role, "content": list(content)}])
    return list(request.messages)


@pytest.mark.parametrize(
    "part",
    [
        {"type": "video_url", "video_url": {"url": CLIP}},
        {"type": "video_url", "video_url": {"url": CLIP}, "uuid": "a"},
        {"type": "video_url", "video_url": CLIP, "uuid": "a"},
        {"video_url": CLIP},
        {"video_url": {"url": CLIP}, "uuid": "a"},
    ],
)
def test_every_spelling_of_a_video_is_found(part: dict[str, Any]) -> None:
    assert video_urls(messages(part, {"type": "text", "text": "hi"})) == [CLIP]


@pytest.mark.parametrize(
    "part",
    [
        {"type": "video_url", "video_url": None, "uuid": "a"},
        {"type": "image_url", "image_url": {"url": CLIP}},
        {"type": "text", "text": CLIP},
    ],
)
def test_nothing_else_is_taken_for_a_video(part: dict[str, Any]) -> None:
    assert video_urls(messages(part)) == []


@pytest.mark.parametrize(
    ("part", "count"),
    [
        ({"type": "video_url", "video_url": None, "uuid": "a"}, 1),
        ({"video_url": None, "uuid": "a"}, 1),
        ({"type": "video_url", "video_url": {"url": ""}}, 1),
        ({"type": "video_embeds", "video_embeds": "AAAA"}, 1),
        ({"type": "video_url", "video_url": {"url": CLIP}, "uuid": "a"}, 0),
        ({"type": "image_url", "image_url": None, "uuid": "a"}, 0),
        ({"type": "text", "text": CLIP}, 0),
    ],
)
def test_videos_that_come_without_a_url_are_counted(part: dict[str, Any], count: int) -> None:
    assert videos_without_url([{"role": "user", "content": [part]}]) == count


def test_videos_keep_their_order_and_repeats() -> None:
    urls = ["https://a/1", "https://a/2", "https://a/1"]
    parts = [{"type": "video_url", "video_url": {"url": url}} for url in urls]
    assert video_urls([*messages(*parts[:2]), *messages(parts[2])]) == urls


def test_a_conversation_of_plain_text_has_no_videos() -> None:
    assert video_urls([{"role": "user", "content": "hi"}, {"role": "tool", "content": None}]) == []


def test_all_text_is_counted_and_urls_are_not() -> None:
    conversation = [
        {"role": "system", "content": "be brief"},
        *messages(
            {"type": "video_url", "video_url": {"url": CLIP}}, {"type": "text", "text": "hi"}
        ),
        {"role": "assistant", "tool_calls": [{"function": {"name": "look"}}]},
    ]
    text = text_of(conversation, [{"function": {"name": "zoom"}}])
    assert all(word in text for word in ("be brief", "hi", "look", "zoom"))
    assert CLIP not in text


def test_longer_conversations_reserve_more_for_the_template() -> None:
    one = messages({"type": "text", "text": "hi"})
    assert template_tokens([]) < template_tokens(one) < template_tokens(one * 2)


def test_the_question_is_the_text_of_the_last_user_who_wrote_any() -> None:
    video = {"type": "video_url", "video_url": {"url": "a"}}
    messages = [
        {"role": "user", "content": "What is this?"},
        {"role": "assistant", "content": "A clip."},
        {"role": "user", "content": [video, {"type": "text", "text": "When?"}]},
        {"role": "user", "content": [video]},
    ]
    assert question_of(messages) == "When?"
    assert question_of(messages[:2]) == "What is this?"
    assert question_of([]) == ""


def test_a_text_stands_where_a_video_stood_and_nothing_where_it_is_shown_again() -> None:
    first = {"type": "video_url", "video_url": {"url": "a"}}
    other = {"video_url": "b"}
    text = {"type": "text", "text": "When?"}
    messages = [
        {"role": "user", "content": [first, text, other]},
        {"role": "assistant", "content": "Now."},
        {"role": "user", "content": [first]},
    ]
    made = with_texts_for_videos(messages, {"a": "notes of a", "b": "notes of b"})
    assert made == [
        {
            "role": "user",
            "content": [
                {"type": "text", "text": "notes of a"},
                text,
                {"type": "text", "text": "notes of b"},
            ],
        },
        messages[1],
        {"role": "user", "content": ""},
    ]
    assert messages[0]["content"] == [first, text, other]


# Types of the OpenAI client take these messages, and vLLM's own does not.
@pytest.mark.parametrize(
    "message",
    [
        {"role": "assistant", "function_call": {"name": "look", "arguments": "{}"}},
        {
            "role": "assistant",
            "tool_calls": [
                {"id": "1", "type": "custom", "custom": {"name": "look", "input": "left"}}
            ],
        },
        {"role": "user", "reasoning": {"effort": "low"}},
    ],
    ids=str,
)
def test_a_content_that_can_be_read_once_only_is_read_by_all(message: dict[str, Any]) -> None:
    text = {"type": "text", "text": "What is this?"}
    conversation: list[Any] = [{"role": "user", "content": "hi"}, {**message, "content": [text]}]
    request = ChatCompletionRequest(model="m", messages=conversation)
    assert not isinstance(request.messages[1]["content"], list)
    list_contents(request.messages)
    for _ in range(2):
        assert "What is this?" in text_of(request.messages, None)
    assert template_tokens(request.messages) > template_tokens([{"content": "hi"}] * 2)
    if message["role"] == "user":
        assert question_of(request.messages) == "What is this?"


def test_thoughts_count_as_text_unless_they_are_embeddings() -> None:
    embeddings = {"type": "prompt_embeds", "data": "QUJD" * 1000}
    thoughts: list[Any] = ["Left, I think.", embeddings, None]
    said = [{"role": "assistant", "content": "Left.", "reasoning": one} for one in thoughts]
    assert text_of(said, None).split("\n") == ["Left."] * 3 + ["Left, I think."]


def test_what_a_caller_of_the_library_hands_over_is_read_like_a_list() -> None:
    video = {"type": "video_url", "video_url": {"url": CLIP}}
    for content in ((video, "When?"), iter([video, "When?"])):
        conversation: list[Any] = [{"role": "user", "content": content}]
        list_contents(conversation)
        assert video_urls(conversation) == [CLIP]
        assert question_of(conversation) == "When?"
        assert text_of(conversation, None) == "When?"


@pytest.mark.parametrize("part", [5, None, {"type": "video_url", "video_url": {"url": CLIP}}])
def test_a_part_that_such_a_message_cannot_have_is_named(part: Any) -> None:
    message = {"role": "user", "content": [part], "reasoning": {"effort": "low"}}
    request = ChatCompletionRequest(model="m", messages=[message])
    with pytest.raises(MediaError, match=r"messages\[0\].content has a part"):
        list_contents(request.messages)
