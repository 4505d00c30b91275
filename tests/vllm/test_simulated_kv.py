"""The KV cache of the simulated fleet beside vLLM's manager with the plugin's block pool."""

from __future__ import annotations

from dataclasses import replace

import pytest
from small_fleet import TRAFFIC, VIDEO

from vllm_mm_ext.config.kv_settings import KVSettings
from vllm_mm_ext.fleet.prompt_cache import PromptCache
from vllm_mm_ext.fleet.replica import Conversation
from vllm_mm_ext.fleet.traffic import Ask
from vllm_mm_ext.tools.bench.kv_replay_pools import Replay
from vllm_mm_ext.tools.bench.kv_trace import Access, Item, KVTrace

_BLOCK, _HIDDEN = 16, 256


def simulated(asks: list[Ask], blocks: int, every: int = 1) -> list[int]:
    """Blocks that each request finds, one request at a time.

    Args:
        asks: The requests.
        blocks: The cache's.
        every: So many replicas take turns: this one has the first request, and the one after as
            many others.
    """
    cache, talks, found = PromptCache(blocks, _BLOCK, _HIDDEN), {}, []
    for number, ask in enumerate(asks):
        talk = talks.setdefault(ask.session, Conversation(ask.session))
        talk.say(ask.media, 0, VIDEO.tokens if ask.media >= 0 else 0, ask.text, VIDEO.items)
        if not number % every:
            held = cache.admit(talk.prompt(ask.output))
            assert held is not None
            cache.computed(held)
            cache.release(held)
            found.append(held.found // _BLOCK)
        talk.tokens += ask.output
    return found


def real(asks: list[Ask], blocks: int, every: int = 1) -> list[int]:
    """The same of the real pool."""
    accesses, tokens, media = [], {}, {}
    numbers: dict[tuple[object, ...], int] = {}
    for ask in asks:
        if ask.media >= 0:
            media[ask.session] = ask.media
            tokens[ask.session] = VIDEO.tokens
        tokens[ask.session] += ask.text
        prompt, video = tokens[ask.session], media[ask.session]
        tokens[ask.session] += ask.output
        names = [
            ("video", video, place)
            if (place + 1) * _BLOCK <= VIDEO.tokens
            else ("text", ask.session, place)
            for place in range((prompt + ask.output - 1) // _BLOCK)
        ]
        used = tuple(numbers.setdefault(name, len(numbers)) for name in names)
        size = VIDEO.tokens // VIDEO.items
        items = tuple(
            Item(video * VIDEO.items + place, place * size, size) for place in range(VIDEO.items)
        )
        # Of the last token of an answer no KV is computed.
        accesses.append(Access(str(ask.session), prompt, ask.output - 1, used, items))
    accesses = accesses[::every]
    events = tuple((n, begins) for n in range(len(accesses)) for begins in (True, False))
    trace = KVTrace(_BLOCK, _HIDDEN, tuple(accesses), events)
    return Replay(trace, blocks, KVSettings()).run().found


@pytest.mark.parametrize(("room", "every"), [(3, 1), (8, 1), (20, 1), (8, 2)])
def test_as_much_is_found_as_the_block_pool_of_the_engine_finds(room, every):
    traffic = replace(TRAFFIC, requests=500, videos=30, turns=4.0)
    asks = list(traffic.asks())
    blocks = room * VIDEO.tokens // _BLOCK
    said, found = sum(simulated(asks, blocks, every)), sum(real(asks, blocks, every))
    assert said == pytest.approx(found, rel=0.05)
