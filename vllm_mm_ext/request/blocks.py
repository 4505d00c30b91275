"""Puts the `mm_ext` block into the last chunk of an answer that is streamed."""

from __future__ import annotations

import json
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from typing import Any

KEY = "mm_ext"
_DATA = "data: "
_DONE = "data: [DONE]"


async def with_block(
    chunks: AsyncGenerator[str, None],
    choices: int,
    block: Callable[[], dict[str, Any]],
    hear: Callable[[str], None] = lambda _: None,
) -> AsyncGenerator[str, None]:
    """Pass on a stream of chunks, with the block in the last chunk before ``[DONE]``.

    Only a chunk that may be the last one is held back until the next one arrives: the chunk that
    finishes the last choice, and the chunk with the usage. vLLM sends the next one at once, so no
    token comes late.

    Args:
        chunks: Server-sent events of an OpenAI completion.
        choices: Number of choices of the answer.
        block: Makes the block; called when the stream ends.
        hear: Called with each chunk, before any block that comes after it is made.
    """
    finished: set[int] = set()
    held: str | None = None
    async with aclosing(chunks):
        async for chunk in chunks:
            hear(chunk)
            if held is not None:
                yield _with(held, block()) if chunk.startswith(_DONE) else held
                held = None
            if _may_be_last(chunk, choices, finished):
                held = chunk
            else:
                yield chunk
        if held is not None:
            yield _with(held, block())


def _may_be_last(chunk: str, choices: int, finished: set[int]) -> bool:
    """Whether a chunk may be the last one; adds the choices that it finishes to ``finished``."""
    # Quotes inside a JSON string are escaped, so these patterns never match generated text.
    if '"finish_reason":"' not in chunk and '"choices":[]' not in chunk:
        return False
    # Events of other APIs have no choices (Cohere's have a finish_reason), or begin with a name.
    if not chunk.startswith(_DATA) or "choices" not in (event := json.loads(chunk[len(_DATA) :])):
        return False
    finished.update(choice["index"] for choice in event["choices"] if choice.get("finish_reason"))
    return len(finished) == choices


def _with(chunk: str, block: dict[str, Any]) -> str:
    # The block is spliced in as text, so the rest of the chunk stays as vLLM wrote it.
    last = chunk.rindex("}")
    return f'{chunk[:last]},"{KEY}":{json.dumps(block, separators=(",", ":"))}{chunk[last:]}'
