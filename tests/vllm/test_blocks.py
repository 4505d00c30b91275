"""The report in a stream: in the last chunk and nowhere else, nothing else changed or delayed."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator, Sequence
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from vllm.entrypoints.generate.base.protocol import DeltaMessage
from vllm.entrypoints.openai.chat_completion.protocol import (
    ChatCompletionResponseStreamChoice,
    ChatCompletionStreamResponse,
)
from vllm.entrypoints.serve.engine.protocol import UsageInfo

from vllm_mm_ext.request.blocks import with_block

DONE = "data: [DONE]\n\n"
BLOCK = {"videos": [], "tokens": {"visual": 3}}


def chunk(index: int, text: str, finish: str | None = None, usage: bool = False) -> str:
    choice = ChatCompletionResponseStreamChoice(
        index=index, delta=DeltaMessage(content=text), finish_reason=finish
    )
    made = ChatCompletionStreamResponse(id="c", created=0, choices=[choice], model="m")
    if usage:
        made.usage = UsageInfo(prompt_tokens=1, completion_tokens=1, total_tokens=2)
    return f"data: {made.model_dump_json(exclude_unset=True)}\n\n"


def usage_chunk() -> str:
    usage = UsageInfo(prompt_tokens=1, completion_tokens=1, total_tokens=2)
    made = ChatCompletionStreamResponse(id="c", created=0, choices=[], model="m", usage=usage)
    return f"data: {made.model_dump_json(exclude_unset=True, exclude_none=True)}\n\n"


def passed(chunks: Sequence[str], choices: int) -> list[str]:
    async def source() -> AsyncGenerator[str, None]:
        for one in chunks:
            yield one

    async def collect() -> list[str]:
        return [one async for one in with_block(source(), choices, lambda: BLOCK)]

    return asyncio.run(collect())


def parsed(text: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(text.removeprefix("data: "))
    return found


@given(
    texts=st.lists(st.tuples(st.integers(0, 2), st.text()), max_size=8),
    finish_order=st.permutations([0, 1, 2]),
    usage=st.booleans(),
    continuous=st.booleans(),
)
def test_only_the_last_chunk_gains_the_block(
    texts: list[tuple[int, str]], finish_order: list[int], usage: bool, continuous: bool
) -> None:
    chunks = [chunk(i, text, usage=continuous) for i, text in texts]
    chunks += [chunk(i, "", "stop", usage=continuous) for i in finish_order]
    chunks += [usage_chunk()] if usage else []
    *others, last, done = passed([*chunks, DONE], 3)
    assert done == DONE
    assert others == chunks[:-1]
    assert parsed(last) == {**parsed(chunks[-1]), "mm_ext": BLOCK}


@pytest.mark.parametrize(
    "text",
    ['"finish_reason":"stop"', '"choices":[]', "data: [DONE]", '\\"choices":[]', "é\n\u2028"],
)
def test_generated_text_that_looks_like_a_last_chunk_is_not_one(text: str) -> None:
    chunks = [chunk(0, text), chunk(0, text), chunk(0, "", "stop")]
    assert passed([*chunks, DONE], 1)[:2] == chunks[:2]


@pytest.mark.parametrize(
    "event",
    [
        'data: {"type":"message-end","id":"c","delta":{"finish_reason":"COMPLETE"}}\n\n',
        'event: message_delta\ndata: {"delta":{"stop_reason":"end_turn"},"choices":[]}\n\n',
        'event: done\ndata: {"finish_reason":"stop"}\n\n',
    ],
    ids=["Cohere", "Anthropic", "named"],
)
def test_events_of_other_apis_pass_unchanged(event: str) -> None:
    for chunks in ([event], [event, event, DONE], [chunk(0, "a"), event, chunk(0, "", "length")]):
        assert passed(chunks, 1)[: len(chunks) - 1] == chunks[:-1]
    assert passed([event, DONE], 1) == [event, DONE]


def test_a_stream_that_ends_in_an_error_is_untouched() -> None:
    error = 'data: {"error": {"message": "Internal server error", "code": 500}}\n\n'
    for chunks in ([error, DONE], [chunk(0, "a"), error, DONE]):
        assert passed(chunks, 1) == chunks
    finished = [chunk(0, "a", "stop"), error, DONE]
    assert passed(finished, 1) == finished


def test_every_token_passes_before_the_next_is_asked_for() -> None:
    async def follow() -> list[str]:
        log = []

        async def source() -> AsyncGenerator[str, None]:
            for number in range(3):
                log.append(f"made {number}")
                yield chunk(0, str(number))

        async for one in with_block(source(), 1, lambda: BLOCK):
            log.append(f"sent {parsed(one)['choices'][0]['delta']['content']}")
        return log

    log = asyncio.run(follow())
    assert log == ["made 0", "sent 0", "made 1", "sent 1", "made 2", "sent 2"]


def test_a_client_that_leaves_closes_the_engine_side() -> None:
    async def leave() -> bool:
        closed = False

        async def source() -> AsyncGenerator[str, None]:
            nonlocal closed
            try:
                while True:
                    yield chunk(0, "a")
            finally:
                closed = True

        stream = with_block(source(), 1, lambda: BLOCK)
        await anext(stream)
        await stream.aclose()
        return closed

    assert asyncio.run(leave())
