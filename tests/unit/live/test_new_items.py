"""Items that clients add: what is too much is not read to its end."""

from __future__ import annotations

import pytest
from live_sessions import FAMILY, LIMITS, measure

from vllm_mm_ext.live.client_events import NewItem, ResponseRequest, TextContent
from vllm_mm_ext.live.live_conversation import LiveConversation
from vllm_mm_ext.live.new_items import ItemReader
from vllm_mm_ext.live.prompt import Message
from vllm_mm_ext.live.session_items import Scales
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
    with pytest.raises(WireError, match="'item' has more than 100 tokens"):
        reader.read(NewItem(None, "user", (LONG,) * 50), "item_1", iter(()), "item")
    assert counted.messages == 2


def test_items_of_a_response_that_follow_too_many_tokens_are_not_tokenized() -> None:
    counted = Counted()
    conversation = LiveConversation(FAMILY, LIMITS, counted, None, 0.0)
    items = (NewItem(None, "user", (LONG,) * 10),) * 50
    with pytest.raises(WireError, match="at most 2000"):
        conversation.asked(ResponseRequest(input=items), ())
    assert counted.messages == 40
