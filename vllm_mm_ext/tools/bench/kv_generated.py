"""Traces of KV accesses made of generated prompts, without an engine."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable

from vllm_mm_ext.tools.bench.commands import AccessKind
from vllm_mm_ext.tools.bench.kv_trace import Access, Item, KVTrace
from vllm_mm_ext.tools.bench.kv_traffic import CONCURRENT, TRAFFIC, Part, Prompt

# As the engine of the recorded traces makes them of the same prompts.
_BLOCK, _HIDDEN = 32, 128
_FRAME_TOKENS, _WORD_TOKENS, _ITEM_TOKENS = 16, 3, 128
_ANSWER = 8


def generated(kind: AccessKind, seed: int) -> KVTrace:
    """A trace of generated traffic.

    Args:
        kind: The traffic.
        seed: Of its generator.
    """
    return trace_of(TRAFFIC[kind](seed), CONCURRENT.get(kind, 1))


def trace_of(prompts: Iterable[Prompt], concurrent: int) -> KVTrace:
    """What prompts access, so many of them at a time."""
    blocks: dict[tuple[object, ...], int] = {}
    items: dict[Part, dict[int, int]] = {}
    accesses: list[Access] = []
    events: list[tuple[int, bool]] = []
    running: deque[int] = deque()
    contents = 0
    for number, prompt in enumerate(prompts):
        offset = 0
        parts: list[tuple[object, int, int]] = []
        found: list[Item] = []
        for part in prompt.parts:
            length = part.size * (_FRAME_TOKENS if part.video else _WORD_TOKENS)
            parts.append((part, offset, offset + length))
            own = items.setdefault(part, {})
            for start in range(0, length if part.video else 0, _ITEM_TOKENS):
                if start not in own:
                    own[start] = contents
                    contents += 1
                size = min(_ITEM_TOKENS, length - start)
                found.append(Item(own[start], offset + start, size))
            offset += length
        parts.append((number, offset, offset + _ANSWER))
        used = []
        before: int | None = None
        for end in range(_BLOCK, offset + _ANSWER + 1, _BLOCK):
            # A block is what it holds after what is before it.
            holds = tuple(
                part for part, first, last in parts if first < end and last > end - _BLOCK
            )
            before = blocks.setdefault((before, holds), len(blocks))
            used.append(before)
        if len(running) >= concurrent:
            events.append((running.popleft(), False))
        events.append((number, True))
        running.append(number)
        accesses.append(Access(prompt.session, offset, _ANSWER, tuple(used), tuple(found)))
    events += ((number, False) for number in running)
    return KVTrace(_BLOCK, _HIDDEN, tuple(accesses), tuple(events))
