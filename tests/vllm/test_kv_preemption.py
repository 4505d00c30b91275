"""Blocks of requests that are preempted in the scheduling pass that gave them tokens."""

from __future__ import annotations

from typing import Any

import pytest
from scheduler_harness import BLOCK, Play, make_scheduler, request

from vllm_mm_ext.adapters.kv import install as adapter
from vllm_mm_ext.adapters.kv.block_pool import MMExtBlockPool

CHUNK = 4 * BLOCK


def chunks_of_four_blocks(config: Any) -> None:
    config.scheduler_config.long_prefill_token_threshold = CHUNK
    config.scheduler_config.adaptive_long_prefill_threshold = False


def without_our_pool(config: Any) -> None:
    chunks_of_four_blocks(config)
    config.additional_config["mm_ext"]["kv"] = {"enabled": False}


def preempted_in_the_pass_that_scheduled_it(
    *, media: bool, change: Any = chunks_of_four_blocks
) -> Play:
    """In the fifth step "first" gets the last four blocks, which "urgent" then lacks one of."""
    adapter.install()
    # Stock vLLM's scheduler: the plugin's lets nobody in onto blocks that begun prompts lack.
    scheduler = make_scheduler(
        plugin=False,
        policy="priority",
        # The null block, 1 of "other", 20 of "first" and 8 of "urgent", which needs one more.
        blocks=1 + 1 + 20 + 8,
        change=change,
    )
    play = Play(scheduler)
    prompt = {"text": CHUNK, "items": [3 * CHUNK]} if media else {"text": 5 * CHUNK}
    # vLLM bounds the chunks of a prompt only where there are other requests.
    play.add(request("other", text=4, answer=12, priority=-1))
    play.add(request("first", **prompt, answer=4, priority=1))  # type: ignore[arg-type]
    play.step()
    play.step()
    play.add(request("urgent", text=2 * CHUNK + BLOCK, answer=1, priority=0))
    for _ in range(3):
        play.step()
    return play


def begins(output: Any) -> dict[str, int]:
    """Where a step begins each request that steps before it have begun."""
    cached = output.scheduled_cached_reqs
    return dict(zip(cached.req_ids, cached.num_computed_tokens, strict=True))


@pytest.mark.parametrize("media", [False, True], ids=["text", "video"])
def test_what_a_preempted_request_had_not_computed_is_not_found_in_the_cache(media: bool) -> None:
    play = preempted_in_the_pass_that_scheduled_it(media=media)
    pool = play.scheduler.kv_cache_manager.block_pool
    assert isinstance(pool, MMExtBlockPool)
    assert play.steps[-1].preempted_req_ids == {"first"}
    assert play.timings["urgent"].ended is not None
    pool.check_integrity()
    # Four steps have computed a chunk each; what they computed is found.
    assert begins(play.step())["first"] == 4 * CHUNK
    play.run()
    assert play.timings["first"].ended is not None


def test_without_our_pool_it_is_not_found_either() -> None:
    play = preempted_in_the_pass_that_scheduled_it(media=False, change=without_our_pool)
    assert not isinstance(play.scheduler.kv_cache_manager.block_pool, MMExtBlockPool)
    assert begins(play.step())["first"] == 4 * CHUNK
