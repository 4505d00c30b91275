"""What the block pool keeps and what it gives up first, on the real KV cache manager."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import chain, count, islice
from types import SimpleNamespace
from typing import Any

import pytest
from kv_harness import BLOCK, BLOCK_BYTES, Engine, Media, Part, Text, request
from vllm.sampling_params import SamplingParams
from vllm.v1.core.block_pool import BlockPool
from vllm.v1.engine.parallel_sampling import ParentRequest
from vllm.v1.request import Request

from vllm_mm_ext.adapters.kv import install as adapter
from vllm_mm_ext.config.kv_settings import KVSettings
from vllm_mm_ext.policies.kv.control import KVControl
from vllm_mm_ext.policies.kv.sessions import MAX_ENDS, session_key
from vllm_mm_ext.tools.bench.traces import FAMILIES

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


def items(engine: Engine) -> list[str]:
    """The mm items that are kept, in prompt order."""
    pieces = sorted(engine.pool.tree, key=lambda piece: piece.start)
    return [piece.content.identifier for piece in pieces if piece.content.identifier]


def test_a_video_outlives_any_amount_of_text_that_nobody_asks_for_again() -> None:
    engine, stock = Engine(64), Engine(64, settings=None)
    for each in (engine, stock):
        each.serve(request("first", VIDEO))
        for number in range(20):
            each.serve(request(f"text {number}", [Text(10 + number, 40)]))
    assert stock.serve(request("second", VIDEO)) == 0
    assert served(engine, "second", VIDEO) >= MEDIA_TOKENS


def test_text_that_is_asked_for_again_and_again_outlives_videos_seen_once() -> None:
    engine = Engine(64)
    for number in range(12):
        served(engine, f"text {number}", [Text(3, 80)])
        served(engine, f"video {number}", [Media(f"v{number}", 120), Text(4, 6)])
    assert served(engine, "text", [Text(3, 80)]) == 76


def test_a_conversation_that_goes_on_outlives_those_that_ended() -> None:
    engine = Engine(90)
    talk: tuple[Part, ...] = (Media("talk", 40),)
    for turn in range(8):
        talk = (*talk, Text(100 + turn, 8))
        served(engine, f"turn {turn}", talk)
        for other in range(2):
            served(engine, f"other {turn} {other}", [Media(f"{turn}.{other}", 100), Text(1, 6)])
    assert served(engine, "next", (*talk, Text(99, 8))) >= 40 + 8 * 7


def test_blocks_tell_the_item_they_hold() -> None:
    engine = Engine(64)
    engine.admit(request("first", VIDEO))
    blocks = engine.manager.get_block_ids("first")[0]
    engine.finish("first")
    holds = [engine.pool.holds(block_id) for block_id in blocks]
    found = [piece.content.identifier if piece else "none" for piece in holds]
    assert found == [None] * 2 + ["a.0"] * 5 + ["a.1"] * 5 + [None] + ["none"]
    assert {p.content.modality for p in holds if p} == {"text", "video"}
    assert len(engine.pool.take_down(lambda one: one == "a.0")) == 11
    assert [engine.pool.holds(block_id) is None for block_id in blocks] == [False] * 2 + [True] * 12
    engine.pool.check_integrity()
    assert served(engine, "again", VIDEO) == 8


def test_a_request_that_needs_everything_gets_everything() -> None:
    engine = Engine(40)
    served(engine, "a", VIDEO)
    assert served(engine, "all", [Text(5, 39 * BLOCK - 3)]) == 0
    assert items(engine) == []


def test_the_end_goes_first_and_no_more_than_is_needed() -> None:
    engine = Engine(16)
    served(engine, "a", VIDEO)
    # One block of 15 never got a hash, and one more is free.
    assert engine.pool.free_block_queue.listed == 2
    served(engine, "text", [Text(5, 16)])
    # Before the last two of four blocks, the text after the video went.
    kept = {p.content.identifier: len(p.blocks) for p in engine.pool.tree if p.content.identifier}
    assert kept == {"a.0": 5, "a.1": 4}
    assert served(engine, "again", VIDEO) == 8 + 20 + 16


def test_requests_that_go_on_in_other_ways_share_what_is_before() -> None:
    engine = Engine(100)
    served(engine, "a", [Text(1, 40), Text(2, 20)])
    served(engine, "b", [Text(1, 40), Text(3, 20)])
    sizes = sorted((piece.start, len(piece.blocks)) for piece in engine.pool.tree)
    # The prompts end inside a block, which the answer does not fill.
    assert sizes == [(0, 10), (10, 5), (10, 5)]
    (shared,) = (piece for piece in engine.pool.tree if piece.parent is None)
    assert shared.hits == 1
    assert len(shared.children) == 2


def answers(name: str, n: int, arrival_time: float, parts: Sequence[Part]) -> Iterator[Request]:
    """The requests that vLLM makes of one that asks for so many answers."""
    asked: Any = SimpleNamespace(
        request_id=name, external_req_id=name, params=SamplingParams(n=n), arrival_time=arrival_time
    )
    parent = ParentRequest(asked)
    for number in range(n):
        child = request(parent.get_child_info(number)[0], parts)
        child.arrival_time = arrival_time
        yield child


def test_several_answers_to_one_request_are_one_use_and_one_moment() -> None:
    several, single = Engine(100), Engine(100)
    for arrival_time in (1.0, 2.0):
        for child in answers(f"asks at {arrival_time}", 8, arrival_time, VIDEO):
            several.serve(child)
        (one,) = answers(f"asks at {arrival_time}", 1, arrival_time, VIDEO)
        single.serve(one)
    for engine in (several, single):
        engine.pool.check_integrity()
        assert {piece.hits for piece in engine.pool.tree} == {1}
    assert known(several) == known(single)


def test_prompts_that_come_together_are_a_use_each() -> None:
    engine = Engine(100)
    for number in range(3):
        one = request(f"{number}-abc", VIDEO)
        one.arrival_time = 1.0
        engine.serve(one)
    assert {piece.hits for piece in engine.pool.tree} == {2}


def known(engine: Engine) -> list[float]:
    """How soon each piece is expected to be used again, in prompt order."""
    history = engine.pool.retention.history
    return [history.rate(one.key) for one in sorted(engine.pool.tree, key=lambda one: one.start)]


def test_what_is_known_of_a_conversations_items_grows_with_the_items_alone() -> None:
    engine = Engine(700)
    talk: list[Part] = []
    for turn in range(300):
        talk.append(Media(f"item {turn}", 2 * BLOCK))
        engine.serve(request(f"turn {turn}", talk))
    assert links(engine) == 300
    # What comes in the place of media leaves nothing of them.
    served(engine, "text", [Text(5, 699 * BLOCK - 3)])
    engine.pool._marks._chains.clear()
    assert links(engine) <= 1


def links(engine: Engine) -> int:
    """How many records of an item are kept for takedowns."""
    found: dict[int, Any] = {}
    marks = engine.pool._marks
    for link in (*(mark[1] for mark in marks._marks if mark), *chain(*marks._chains.values())):
        while link is not None and id(link) not in found:
            found[id(link)] = link
            link = link.before
    return len(found)


def test_a_piece_is_not_cut_before_a_block_whose_hash_vllm_dropped() -> None:
    """As vLLM does with states of Mamba layers."""
    engine = Engine(100)
    engine.serve(request("first", [Text(0, 4), Text(1, 4)]))
    (piece,) = {engine.pool.holds(block.block_id) for block in engine.pool.blocks} - {None}
    assert len(piece.blocks) == 2
    engine.pool.blocks[piece.blocks[1]].reset_hash()
    engine.serve(request("second", [Text(0, 4), Text(2, 4)]))
    assert len(piece.blocks) == 2


def test_of_two_videos_after_the_same_text_one_can_go_without_the_other() -> None:
    engine = Engine(64)
    other = (PROMPT, Media("b.0", 20), Text(1, 6))
    served(engine, "a", VIDEO)
    served(engine, "b", other)
    engine.pool.take_down(lambda one: one == "a.0")
    engine.pool.check_integrity()
    assert items(engine) == ["b.0"]
    assert served(engine, "b again", other) == 32
    assert served(engine, "a again", VIDEO) == 8


@pytest.mark.parametrize(("read_ahead", "text_stays"), [(0, True), (1, False)])
def test_what_a_drafter_made_of_the_item_behind_a_block_goes_with_the_item(
    read_ahead: int, text_stays: bool
) -> None:
    engine = Engine(64, read_ahead=read_ahead)
    parts = (Text(0, BLOCK), Media("a", 2 * BLOCK), Text(1, 6))
    served(engine, "first", parts)
    engine.pool.take_down(lambda one: one == "a")
    assert served(engine, "again", parts) == (BLOCK if text_stays else 0)


def test_evicting_one_block_gives_up_all_that_is_not_found_any_more() -> None:
    engine = Engine(64)
    served(engine, "a", VIDEO)
    first, second = (p for p in engine.pool.tree if p.content.identifier)
    engine.manager.evict_blocks({second.blocks[2]})
    engine.pool.check_integrity()
    assert (len(first.blocks), len(second.blocks)) == (5, 2)
    assert first.parent is not None
    engine.manager.evict_blocks({first.parent.blocks[0]})
    engine.pool.check_integrity()
    assert not len(engine.pool.tree)


def test_what_was_given_up_but_is_still_there_is_kept_again_when_found() -> None:
    engine = Engine(64)
    control = KVControl(engine.pool)
    served(engine, "a", VIDEO, "s")
    assert control.release("s") == 2
    assert not len(engine.pool.tree)
    longer = (*VIDEO[:3], Media("a.2", 12), Text(1, 6))
    assert served(engine, "again", longer) == MEDIA_TOKENS
    assert items(engine) == ["a.0", "a.1", "a.2"]


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
    assert engine.pool.free_block_queue.kept == 13


def test_a_session_knows_an_item_whose_equal_it_computed() -> None:
    engine = Engine(64)
    engine.admit(request("first", VIDEO), chunk=3)
    engine.admit(request("second", VIDEO, session="s"), chunk=3)
    for name in ("first", "second"):
        engine.extend(name)
        engine.pool.check_integrity()
    engine.finish("first")
    engine.extend("second")
    engine.pool.check_integrity()
    assert KVControl(engine.pool).media()[0].sessions == 1


def test_the_quota_bounds_what_media_keep() -> None:
    settings = KVSettings(max_visual_cache_gb=12 * BLOCK_BYTES / 2**30, min_items=0)
    engine = Engine(200, settings)
    for number in range(8):
        served(engine, f"v{number}", [Media(f"{number}", 20), Text(number, 3)])
        assert engine.pool.retention.idle.blocks <= 12
    assert engine.pool.limits.block_bytes == BLOCK_BYTES


def test_pressure_gives_media_up_but_for_the_minimum() -> None:
    engine = Engine(101, KVSettings(pressure_limit=0.8, min_items=2))
    for number in range(8):
        served(engine, f"v{number}", [Media(f"{number}", 20), Text(number, 3)])
    assert len(items(engine)) == 8
    assert engine.pool.true_pressure() == pytest.approx(0.4)
    engine.admit(request("large", [Text(1, 70 * BLOCK)]))
    engine.pool.check_integrity()
    assert engine.pool.true_pressure() == pytest.approx(0.8)
    assert len(items(engine)) == 2
    engine.admit(request("more", [Text(2, 25 * BLOCK)]))
    assert engine.pool.true_pressure() > 0.9


def test_pinned_media_go_last() -> None:
    engine = Engine(42)
    control = KVControl(engine.pool)
    assert control.pin("p") == 0
    for name, session in (("pinned", "p"), ("other", None), ("again", None), ("again", None)):
        served(engine, name, [Media(name, 40), Text(1, 3)], session)
    served(engine, "text", [Text(30, 31 * BLOCK)])
    assert items(engine) == ["pinned"]
    assert control.unpin("p") == 1
    assert control.release("p") == 1
    assert items(engine) == []
    engine.pool.check_integrity()


def test_blocks_that_a_window_left_behind_are_taken_and_those_in_use_stay_known() -> None:
    engine = Engine(64, window=12)
    engine.admit(request("long", [Text(1, 100)]), chunk=8)
    while engine.running["long"].num_computed_tokens < 100:
        assert engine.extend("long", 8)
    full = engine.manager.get_block_ids("long")[0]
    left = engine.pool.free_block_queue.kept
    assert left > 10
    free = engine.pool.get_num_free_blocks()
    taken = engine.pool.get_new_blocks(free)
    engine.pool.check_integrity()
    assert engine.pool.free_block_queue.kept == 0
    assert all(engine.pool.holds(block_id) is not None for block_id in full)
    engine.pool.free_blocks(taken)


def test_a_pinned_session_that_goes_on_in_another_way_lets_go_of_what_it_had() -> None:
    engine = Engine(100)
    control = KVControl(engine.pool)
    control.pin("s")
    served(engine, "long", (PROMPT, Media("old", 40), Text(1, 8)), session="s")
    (end,) = engine.pool.sessions.ends("s")
    served(engine, "cut", (PROMPT, Media("new", 20), Text(2, 8)), session="s")
    assert engine.pool.sessions.pinned(end)
    assert control.trim("s") == 1
    engine.pool.check_integrity()
    assert not engine.pool.sessions.pinned(end)
    assert items(engine) == ["new"]
    (end,) = engine.pool.sessions.ends("s")
    assert engine.pool.sessions.pinned(end)
    assert served(engine, "on", (PROMPT, Media("new", 20), Text(2, 8)), session="s") == 32
    assert control.trim("unknown") == 0


def two_prompts(engine: Engine) -> KVControl:
    """Let a pinned session have a prompt, and then one that does not go on from there."""
    control = KVControl(engine.pool)
    control.pin("s")
    served(engine, "long", (PROMPT, Media("old", 40), Text(1, 8)), session="s")
    served(engine, "cut", (PROMPT, Media("new", 20), Text(2, 8)), session="s")
    return control


def test_a_trim_keeps_the_latest_prompt_while_the_session_answers_aside() -> None:
    engine = Engine(100)
    control = two_prompts(engine)
    aside = request("aside", (PROMPT, Media("old", 40), Text(3, 8)), session="s aside")
    engine.admit(aside)
    for _ in range(2 * BLOCK):
        assert engine.extend("aside")
    assert control.trim("s") == 1
    engine.pool.check_integrity()
    (end,) = engine.pool.sessions.ends("s")
    assert engine.pool.sessions.pinned(end)
    assert sorted(items(engine)) == ["new", "old"]
    assert engine.extend("aside", BLOCK)
    control.release("s aside")
    assert items(engine) == ["new"]
    engine.finish("aside")
    engine.pool.check_integrity()
    control.release("s")
    assert items(engine) == []


def test_a_trim_keeps_the_latest_prompt_after_the_end_of_an_earlier_one_was_given_up() -> None:
    engine = Engine(100)
    control = two_prompts(engine)
    old, new = engine.pool.sessions.ends("s")
    engine.pool.let_go([old])
    assert set(engine.pool.sessions.ends("s")) == {old.parent, new}
    assert control.trim("s") == 1
    engine.pool.check_integrity()
    assert engine.pool.sessions.ends("s") == [new]
    assert items(engine) == ["new"]


def test_a_trim_keeps_the_latest_prompt_in_each_group_of_layers() -> None:
    engine = Engine(200, window=12)
    control = two_prompts(engine)
    assert len(engine.pool.sessions.ends("s")) == 4
    # An item counts once for each group.
    assert control.trim("s") == 2
    engine.pool.check_integrity()
    ends = engine.pool.sessions.ends("s")
    assert len(ends) == 2
    assert all(engine.pool.sessions.pinned(end) for end in ends)
    assert set(items(engine)) == {"new"}


def test_a_pinned_session_may_have_more_prompts_than_are_remembered() -> None:
    engine = Engine(200)
    KVControl(engine.pool).pin("a")
    for number in range(MAX_ENDS + 4):
        engine.serve(request(f"r{number}", [Text(number, 2 * BLOCK)], session="a"))
        engine.pool.check_integrity()
    pinned = [piece for piece in engine.pool.tree if engine.pool.sessions.pinned(piece)]
    assert len(pinned) == MAX_ENDS


def test_releasing_a_session_spares_what_others_go_on_from() -> None:
    engine = Engine(100)
    control = KVControl(engine.pool)
    for name, session in (("a", "s"), ("b", "t"), ("c", None)):
        served(engine, name, [Media("v", 40), Text(len(name), 3), Text(ord(name), 9)], session)
    assert control.release("s") == 1
    assert items(engine) == ["v"]
    assert control.media()[0].sessions == 1
    assert control.release("t") == 1
    assert items(engine) == ["v"]


def test_sessions_of_two_cache_salts_never_meet() -> None:
    engine = Engine(100)
    control = KVControl(engine.pool)
    for salt in (None, "a", "b"):
        engine.serve(request(f"salt {salt}", [Media("v", 40), Text(1, 3)], session="s", salt=salt))
    assert len(items(engine)) == 3
    for salt in (None, "a", "b"):
        assert control.release(session_key("s", salt)) == 1
    assert items(engine) == []
    engine.pool.check_integrity()


def test_what_is_cached_is_told_by_content() -> None:
    engine = Engine(100)
    served(engine, "a", VIDEO, "s")
    served(engine, "b", [Text(4, 12), Media("a.0", 20), Text(1, 5)])
    served(engine, "c", VIDEO)
    found = {media.identifier: media for media in KVControl(engine.pool).media()}
    assert found["a.0"].places == 2
    assert found["a.0"].sessions == 1
    assert found["a.0"].hits == 1
    assert found["a.1"].tokens == 20
    assert found["a.1"].modalities == {"video": 20}
    assert found["a.1"].bytes == 5 * BLOCK_BYTES
    # Later in the prompt, more to attend to; encoding comes on top.
    assert found["a.1"].cost > 20 * 1.5


def test_each_session_counts_once_however_many_prompts_of_it_hold_an_item() -> None:
    engine = Engine(200)
    both = [Media("v", 40), Media("w", 20)]
    # Two questions of one session about the same, and one about an item of them in another place.
    served(engine, "a", [*both, Text(1, 40)], "s")
    served(engine, "b", [*both, Text(2, 40)], "s")
    served(engine, "c", [Text(9, 20), Media("w", 20), Text(3, 40)], "s")
    for number in range(5):
        served(engine, f"d{number}", [Media("v", 40), Text(4, 3)], f"other {number}")
    served(engine, "e", [Text(8, 20), Media("x", 20)])
    counts = {one.identifier: one.sessions for one in KVControl(engine.pool).media()}
    assert counts == {"v": 6, "w": 1, "x": 0}


def test_kv_of_media_whose_encoder_outputs_are_held_is_worth_less() -> None:
    engine = Engine(48)
    engine.pool.retention.encoded = lambda identifier: identifier == "held"
    for name in ("held", "not held"):
        served(engine, name, [Media(name, 60), Text(1, 3)])
    churn(engine, 6, tokens=8)
    churn(engine, 1, tokens=80)
    sizes = {p.content.identifier: len(p.blocks) for p in engine.pool.tree if p.content.identifier}
    assert sizes["not held"] == 15
    assert sizes.get("held", 0) < 15


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


def test_small_items_inside_a_block_are_part_of_the_text() -> None:
    engine = Engine(64)
    parts: list[Part] = [
        Text(0, 5),
        Media("dot", 2, "image"),
        Text(1, 6),
        Media("a", 20),
        Text(2, 3),
    ]
    served(engine, "a", parts)
    assert items(engine) == ["a"]
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
    for settings in (KVSettings(), None):
        engine = Engine(int(share * items * 8) + 2, settings)
        for number, each in enumerate(FAMILIES[family](0, length=4000, equal=True)):
            parts: list[Part] = [
                Media(f"{each.key}.0", 16),
                Media(f"{each.key}.1", 16),
                Text(number % 9, 3),
            ]
            engine.serve(request(f"r{number}", parts))
        found.append(engine.hit_tokens)
    assert found[0] >= 0.98 * found[1]
