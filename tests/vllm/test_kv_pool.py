"""What the block pool keeps and what it gives up first, on the real KV cache manager."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import count, islice

import pytest
from kv_harness import BLOCK, BLOCK_BYTES, Clock, Engine, Media, Part, Text, request
from vllm.v1.core.block_pool import BlockPool

from vllm_mm_ext.adapters.kv import install as adapter
from vllm_mm_ext.config.kv_settings import KVSettings
from vllm_mm_ext.policies.kv.control import KVControl
from vllm_mm_ext.policies.kv.sessions import session_key
from vllm_mm_ext.tools.bench.traces import FAMILIES

ALL = KVSettings(max_visual_cache_share=1, pressure_limit=1, min_items=0)
PROMPT = Text(0, 8)
# With two segments of five blocks each after two blocks of text.
VIDEO = (PROMPT, Media("a.0", 20), Media("a.1", 20), Text(1, 6))
MEDIA_TOKENS = 48


_other_text = count(10)


def churn(engine: Engine, requests: int, *, tokens: int = 40) -> None:
    for number in islice(_other_text, requests):
        engine.serve(request(f"text {number}", [Text(number, tokens)]))
        engine.pool.check_integrity()


def served(engine: Engine, name: str, parts: Sequence[Part], session: str | None = None) -> int:
    found = engine.serve(request(name, parts, session=session))
    engine.pool.check_integrity()
    return found


def test_a_video_and_the_text_before_it_outlive_any_amount_of_text() -> None:
    engine, stock = Engine(64), Engine(64, settings=None)
    for each in (engine, stock):
        each.serve(request("first", VIDEO))
        for number in range(20):
            each.serve(request(f"text {number}", [Text(10 + number, 40)]))
    assert stock.serve(request("second", VIDEO)) == 0
    assert served(engine, "second", VIDEO) == MEDIA_TOKENS


def test_text_after_a_video_is_text() -> None:
    engine = Engine(64)
    served(engine, "first", [*VIDEO, Text(3, 20)])
    churn(engine, 20)
    assert served(engine, "second", [*VIDEO, Text(3, 20)]) == MEDIA_TOKENS


def test_blocks_tell_the_item_they_hold() -> None:
    engine = Engine(64)
    engine.admit(request("first", VIDEO))
    blocks = engine.manager.get_block_ids("first")[0]
    engine.finish("first")
    holds = [engine.pool.holds(block_id) for block_id in blocks]
    assert [item.identifier if item else None for item in holds] == (
        [None] * 2 + ["a.0"] * 5 + ["a.1"] * 5 + [None] * 2
    )
    assert {item.modality for item in holds if item} == {"video"}
    engine.pool.release([item.number for item in engine.pool.registry])
    assert not any(engine.pool.holds(block_id) for block_id in blocks)


def test_a_request_that_needs_everything_gets_everything() -> None:
    engine = Engine(40, ALL)
    served(engine, "a", VIDEO)
    assert served(engine, "all", [Text(5, 39 * BLOCK - 3)]) == 0
    assert not len(engine.pool.registry)


def test_items_go_whole_and_the_last_segment_first() -> None:
    engine = Engine(16, ALL)
    served(engine, "a", VIDEO)
    # Two blocks of text, ten of video; two unhashed ones and one more are free.
    assert engine.pool.free_block_queue.listed == 3
    served(engine, "text", [Text(5, 16)])
    assert [item.identifier for item in engine.pool.registry] == ["a.0"]
    assert engine.pool.free_block_queue.kept == 7
    # What was given up, and was not needed, is still found.
    assert served(engine, "again", VIDEO) == MEDIA_TOKENS - BLOCK


def test_of_two_videos_after_the_same_text_one_can_go_without_the_other() -> None:
    engine = Engine(64)
    other = (PROMPT, Media("b.0", 20), Text(1, 6))
    served(engine, "a", VIDEO)
    served(engine, "b", other)
    (first, _, second) = engine.pool.registry
    assert first.before == second.before
    engine.pool.release([first.number])
    engine.pool.check_integrity()
    assert [item.identifier for item in engine.pool.registry] == ["b.0"]
    churn(engine, 20)
    assert served(engine, "b again", other) == 28
    assert served(engine, "a again", VIDEO) == 8


def test_what_follows_a_given_up_item_is_given_up() -> None:
    engine = Engine(64)
    served(engine, "a", VIDEO)
    (first, second) = engine.pool.registry
    assert second.parent is first
    engine.pool.release([first.number])
    assert not len(engine.pool.registry)
    engine.pool.check_integrity()


def test_evicting_one_block_gives_up_all_that_is_not_found_any_more() -> None:
    engine = Engine(64)
    served(engine, "a", VIDEO)
    (_, second) = engine.pool.registry
    engine.manager.evict_blocks({second.blocks[0]})
    engine.pool.check_integrity()
    assert [item.identifier for item in engine.pool.registry] == ["a.0"]
    (first,) = engine.pool.registry
    engine.manager.evict_blocks({first.before[0]})
    engine.pool.check_integrity()
    assert not len(engine.pool.registry)


def test_items_that_were_given_up_but_are_still_there_are_kept_again_when_found() -> None:
    engine = Engine(64)
    served(engine, "a", VIDEO)
    engine.pool.release([item.number for item in engine.pool.registry])
    longer = (*VIDEO[:3], Media("a.2", 12), Text(1, 6))
    assert served(engine, "again", longer) == MEDIA_TOKENS
    assert [item.identifier for item in engine.pool.registry] == ["a.0", "a.1", "a.2"]
    churn(engine, 20)
    assert served(engine, "once more", longer) == MEDIA_TOKENS + 12


def test_requests_that_share_blocks_may_end_at_once() -> None:
    engine = Engine(64)
    served(engine, "before", VIDEO)
    first, second = request("first", VIDEO), request("second", VIDEO)
    assert engine.admit(first) == engine.admit(second) == MEDIA_TOKENS + BLOCK
    blocks = []
    for each in (first, second):
        blocks += reversed(engine.manager.pop_blocks_for_free(each))
    engine.pool.free_blocks(blocks)
    engine.pool.check_integrity()
    assert engine.pool.free_block_queue.kept == 12


def test_a_session_protects_an_item_whose_equal_it_computed() -> None:
    engine = Engine(64)
    engine.admit(request("first", VIDEO), chunk=3)
    engine.admit(request("second", VIDEO, session="s"), chunk=3)
    for name in ("first", "second"):
        engine.extend(name)
        engine.pool.check_integrity()
    engine.finish("first")
    engine.extend("second")
    engine.pool.check_integrity()
    assert KVControl(engine.pool).media()[0].sessions == ("s",)


def test_the_quota_bounds_what_is_kept() -> None:
    settings = KVSettings(max_visual_cache_gb=12 * BLOCK_BYTES / 2**30, min_items=0)
    engine = Engine(200, settings)
    for number in range(8):
        served(engine, f"v{number}", [Media(f"{number}", 20), Text(number, 3)])
        assert engine.pool.free_block_queue.kept <= 12
    assert engine.pool.limits.block_bytes == BLOCK_BYTES


def test_pressure_gives_media_up_but_for_the_minimum() -> None:
    engine = Engine(101, KVSettings(max_visual_cache_share=0.6, min_items=2))
    for number in range(8):
        served(engine, f"v{number}", [Media(f"{number}", 20), Text(number, 3)])
    assert len(engine.pool.registry) == 8
    assert engine.pool.true_pressure() == pytest.approx(0.4)
    engine.admit(request("large", [Text(1, 70 * BLOCK)]))
    engine.pool.check_integrity()
    assert engine.pool.true_pressure() == pytest.approx(0.8)
    assert len(engine.pool.registry) == 2
    engine.admit(request("more", [Text(2, 25 * BLOCK)]))
    assert engine.pool.true_pressure() > 0.9


def test_media_of_a_live_session_go_after_others_and_pinned_ones_last() -> None:
    engine, clock = Engine(42, ALL), Clock()
    engine.pool.sessions._clock = clock
    control = KVControl(engine.pool)
    assert control.pin("p") == 0
    for name, session in (("pinned", "p"), ("live", "s"), ("other", None)):
        served(engine, name, [Media(name, 40), Text(1, 3)], session)
    for blocks, left in ((15, ["pinned", "live"]), (25, ["pinned"])):
        served(engine, f"text {blocks}", [Text(blocks, blocks * BLOCK)])
        assert [item.identifier for item in engine.pool.registry] == left
    assert control.unpin("p") == 1
    assert control.release("p") == 1
    assert not len(engine.pool.registry)
    engine.pool.check_integrity()


def test_sessions_of_two_cache_salts_never_meet() -> None:
    engine = Engine(100, ALL)
    control = KVControl(engine.pool)
    for salt in (None, "a", "b"):
        engine.serve(request(f"salt {salt}", [Media("v", 40), Text(1, 3)], session="s", salt=salt))
    assert len(engine.pool.registry) == 3
    for salt in (None, "a", "b"):
        assert control.release(session_key("s", salt)) == 1
    assert not len(engine.pool.registry)
    engine.pool.check_integrity()


def test_a_session_ends_with_its_ttl() -> None:
    engine, clock = Engine(32, ALL.model_copy(update={"session_ttl_s": 60})), Clock()
    engine.pool.sessions._clock = clock
    served(engine, "a", [Media("a", 40), Text(1, 3)], "s")
    served(engine, "b", [Media("b", 40), Text(1, 3)])
    clock.now_s = 61
    served(engine, "b again", [Media("b", 40), Text(1, 3)])
    served(engine, "text", [Text(5, 15 * BLOCK)])
    assert [item.identifier for item in engine.pool.registry] == ["b"]


def test_what_is_cached_is_told_by_content() -> None:
    engine = Engine(100)
    served(engine, "a", VIDEO, "s")
    served(engine, "b", [Text(4, 12), Media("a.0", 20), Text(1, 5)])
    served(engine, "c", VIDEO)
    found = {media.identifier: media for media in KVControl(engine.pool).media()}
    assert found["a.0"].places == 2
    assert found["a.0"].sessions == ("s",)
    assert found["a.0"].hits == 1
    assert found["a.1"].tokens == 20
    assert found["a.1"].bytes == 5 * BLOCK_BYTES
    # Later in the prompt, more to attend to; encoding comes on top.
    assert found["a.1"].cost > 20 * 1.5


def test_reset_empties_everything_but_pins() -> None:
    engine = Engine(64)
    control = KVControl(engine.pool)
    control.pin("s")
    served(engine, "a", VIDEO, "s")
    assert engine.manager.reset_prefix_cache()
    engine.pool.check_integrity()
    assert engine.pool.free_block_queue.kept == 0
    assert served(engine, "again", VIDEO, "s") == 0
    assert control.pin("s") == 2


def test_a_running_request_keeps_reset_from_happening() -> None:
    engine = Engine(64)
    served(engine, "a", VIDEO)
    engine.admit(request("b", [Text(3, 9)]))
    assert not engine.manager.reset_prefix_cache()
    engine.finish("b")
    assert served(engine, "again", VIDEO) >= MEDIA_TOKENS


def test_small_items_inside_a_block_are_part_of_what_follows() -> None:
    engine = Engine(64)
    parts = [Text(0, 5), Media("dot", 2, "image"), Text(1, 6), Media("a", 20), Text(2, 3)]
    served(engine, "a", parts)
    assert [item.identifier for item in engine.pool.registry] == ["a"]
    churn(engine, 20)
    assert served(engine, "again", parts) == 32


def test_without_prefix_caching_nothing_is_kept() -> None:
    engine = Engine(64)
    config = engine.manager.kv_cache_config
    pool = adapter.pool_factory(KVSettings(), config, 64)(64, False, BLOCK)
    pool.free_blocks(pool.get_new_blocks(63))
    assert pool.free_block_queue.kept == 0
    pool.check_integrity()


def test_stock_pools_are_back_after_the_block() -> None:
    from vllm.v1.core import kv_cache_coordinator

    assert isinstance(Engine(8).manager.block_pool, BlockPool)
    assert kv_cache_coordinator.BlockPool is BlockPool


@pytest.mark.parametrize("family", FAMILIES)
def test_no_kind_of_traffic_finds_less_than_with_stock_lru(family: str) -> None:
    share, items = {"zipf": (0.25, 400), "sessions": (1.0, 60), "scans": (1.0, 100)}[family]
    found = []
    for settings in (ALL, None):
        engine = Engine(int(share * items * 8) + 2, settings)
        for number, each in enumerate(FAMILIES[family](0, length=4000, equal=True)):
            parts = [Media(f"{each.key}.0", 16), Media(f"{each.key}.1", 16), Text(number % 9, 3)]
            engine.serve(request(f"r{number}", parts))
        found.append(engine.hit_tokens)
    assert found[0] >= 0.98 * found[1]
