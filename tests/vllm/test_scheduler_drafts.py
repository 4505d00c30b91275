"""Speculative decoding: vLLM pads what has one token left to the size of a decode with drafts."""

from __future__ import annotations

from typing import Any
from unittest.mock import patch

import pytest
from scheduler_harness import BLOCK, Play, make_scheduler, request
from test_scheduler_elsewhere import decode_node, prefilled
from vllm.config import SpeculativeConfig, VllmConfig

DRAFTS = 3
VIDEO = [512, 512, 511]


def drafting(config: Any) -> None:
    config.speculative_config = SpeculativeConfig(
        method="ngram",
        num_speculative_tokens=DRAFTS,
        prompt_lookup_max=3,
        prompt_lookup_min=2,
        target_model_config=config.model_config,
        target_parallel_config=config.parallel_config,
    )


def is_padded(play: Play, name: str) -> bool:
    """Whether the first step of a request had room for drafts."""
    first = next(output for output in play.steps if name in output.num_scheduled_tokens)
    return int(first.num_scheduled_tokens[name]) == 1 + DRAFTS


@pytest.mark.parametrize("asynchronous", [False, True])
@pytest.mark.parametrize("others", [0, 2])
@pytest.mark.parametrize(("text", "items"), [(129, []), (65, VIDEO)])
def test_a_prompt_that_is_cached_but_for_its_last_token_is_answered(
    text: int, items: list[int], others: int, asynchronous: bool
) -> None:
    scheduler = make_scheduler(change=drafting, asynchronous=asynchronous, encoder_tokens=8192)
    play = Play(scheduler, depth=1 + asynchronous)
    first, again = (
        request(name, text=text, items=items, digest="same", prompt=5)
        for name in ("first", "again")
    )
    assert again.num_tokens % BLOCK == 1
    play.add(first)
    play.run()
    play.add(*[request(f"other{number}", text=64, answer=40) for number in range(others)])
    for _ in range(3 * others):
        play.step()
    play.add(again)
    play.run(most=400)
    assert is_padded(play, "again")
    assert len(play.timings["again"].tokens) == 4


def test_padded_prompts_take_no_room_from_one_another() -> None:
    play = Play(make_scheduler(change=drafting, slots=8, settings={"target_itl_ms": 20.0}))
    prompts = [request(f"r{number}", text=65, prompt=5) for number in range(5)]
    play.add(prompts[0])
    play.run()
    play.add(*prompts[1:])
    assert set(play.step().num_scheduled_tokens.values()) == {1 + DRAFTS}
    assert len(play.scheduler.running) == 4


@pytest.mark.parametrize("others", [0, 2])
def test_a_decode_node_goes_on_where_another_node_left_off(others: int) -> None:
    play = decode_node(change=drafting)
    play.add(*[request(f"other{number}", text=64, answer=40) for number in range(others)])
    for _ in range(3 * others):
        play.step()
    play.add(prefilled("there", do_remote_prefill=True))
    play.step()
    play.scheduler.finished_recving_kv_req_ids.add("there")
    play.run(most=400)
    assert is_padded(play, "there")
    assert len(play.timings["there"].tokens) == 4


@pytest.mark.parametrize("asked", [1, 4])
@pytest.mark.parametrize("items", [[1200, 1200], [512, 512, 512], [400, 400]])
def test_beside_a_drafter_that_reads_ahead_all_are_answered_whom_vllm_answers(
    items: list[int], asked: int
) -> None:
    """With vLLM's own encoder cache, of whose items 0.32 keeps each until the next one is read."""
    steps = {}
    for plugin in (False, True):
        with patch.object(VllmConfig, "num_prefill_lookahead_tokens", 1):
            play = Play(make_scheduler(plugin=plugin, slots=8))
        play.add(*[request(f"r{number}", items=items) for number in range(asked)])
        while play.busy and len(play.steps) < 200:
            play.step()
        steps[plugin] = len(play.steps)
    assert steps[True] < 200 or steps[False] == 200
