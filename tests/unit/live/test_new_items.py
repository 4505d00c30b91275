"""Items that clients add: what is too much is not read to its end."""

from __future__ import annotations

import pytest
from live_sessions import FAMILY, LIMITS, measure

from vllm_mm_ext.live.client_events import (
    ItemCreate,
    NewItem,
    ResponseCreate,
    ResponseRequest,
    TextContent,
    texts,
)
from vllm_mm_ext.live.live_conversation import LiveConversation
from vllm_mm_ext.live.new_items import ItemReader
from vllm_mm_ext.live.prompt import Message
from vllm_mm_ext.live.session_items import Scales
from vllm_mm_ext.live.text_counts import TextCounts
from vllm_mm_ext.live.wire_error import WireError

LONG = TextContent("word " * 60)


class Counted:
    """Measures messages, and counts them."""

    def __init__(self) -> None:
        self.messages = 0

    def __call__(self, message: Message) -> int:
        self.messages += 1
        return measure(message)


def test_texts_that_follow_too_many_tokens_are_not_tokenized() -> None:
    counted = Counted()
    reader = ItemReader(FAMILY, Scales(counted), 100, 1 << 20)
    with pytest.raises(WireError, match="'item', there are more than 100 tokens"):
        reader.read(NewItem(None, "user", (LONG,) * 50), "item_1", iter(()), "item")
    assert counted.messages == 2


def test_items_of_a_response_that_follow_too_many_tokens_are_not_tokenized() -> None:
    counted = Counted()
    conversation = LiveConversation(FAMILY, LIMITS, counted, None, 0.0)
    items = (NewItem(None, "user", (LONG,) * 10),) * 50
    with pytest.raises(WireError, match=r"'response.input\[3\]', there are more than 2000 tokens"):
        conversation.asked(ResponseRequest(input=items), (), "auto")
    assert counted.messages == 32


def test_texts_that_were_counted_ahead_are_not_tokenized_again() -> None:
    counted = Counted()
    counts = TextCounts(counted, LIMITS.prompt_tokens)
    conversation = LiveConversation(FAMILY, LIMITS, counts.measure, None, 0.0)
    contents = [TextContent(f"{k} " * 60) for k in range(20)]
    items = tuple(NewItem(None, "user", (one, one)) for one in contents)
    request = ResponseRequest(input=items, instructions="Answer in one word.")
    counts.count((role, text) for _, role, text in texts(ResponseCreate(None, request)))
    # With the instructions, and one more than fit.
    assert counted.messages == 33
    with pytest.raises(WireError, match="more than 2000 tokens"):
        conversation.asked(request, (), "auto")
    assert counted.messages == 33
    item = ItemCreate(None, None, items[0])
    conversation.create(item, ())
    assert counted.messages == 33
    counts.forget()
    conversation.create(item, ())
    assert counted.messages == 35
