"""The pure parts of the KV blocks: placement, sessions, order, cost, control."""

from __future__ import annotations

import random
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, NoReturn

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vllm_mm_ext.config.kv_settings import KVSettings
from vllm_mm_ext.policies.eviction.sampled_worst import SampledWorst
from vllm_mm_ext.policies.kv import control
from vllm_mm_ext.policies.kv.control import KVControl
from vllm_mm_ext.policies.kv.item_registry import Registry, prefill_cost
from vllm_mm_ext.policies.kv.placement import Placement, end_of
from vllm_mm_ext.policies.kv.sessions import MAX_SESSIONS, Protection, Sessions


@dataclass
class Range:
    offset: int
    length: int


@dataclass
class Feature:
    mm_position: Range
    identifier: str = "x"
    modality: str = "video"


@st.composite
def prompts(draw: st.DrawFn) -> list[Feature]:
    features, position = [], 0
    for _ in range(draw(st.integers(1, 6))):
        position += draw(st.integers(0, 30))
        length = draw(st.integers(1, 40))
        features.append(Feature(Range(position, length)))
        position += length
    return features


@given(prompts(), st.sampled_from([1, 2]), st.integers(0, 12), st.integers(0, 40))
def test_blocks_belong_to_the_first_item_that_ends_in_or_after_them(
    features: list[Feature], factor: int, first: int, count: int
) -> None:
    hashed, size = 4, 4 * factor
    placement = Placement(features, hashed)
    runs = dict(placement.runs(range(first, first + count), size))
    for block in range(first, first + count):
        index = placement.owner((block + 1) * size)
        if index is None:
            named = [i for i in range(len(features)) if placement.hash_index(i) is not None]
            assert all((block + 1) * size > end_of(features[i]) for i in named)
            continue
        feature = features[index]
        assert (block + 1) * size <= end_of(feature)
        holds = (block + 1) * size > feature.mm_position.offset
        assert holds == (index in runs and block in runs[index])
        assert holds or block in placement.before(index, size)
    for index, own in runs.items():
        before = placement.before(index, size)
        # Together they are all blocks since the parent's.
        assert before.stop == own.start
        parent = placement.parent(index)
        assert before.start == (end_of(features[parent]) // size if parent is not None else 0)


def test_the_sound_of_a_video_in_the_same_place_owns_nothing() -> None:
    video, sound = Feature(Range(8, 40)), Feature(Range(8, 40), "s", "audio")
    after = Feature(Range(60, 20), "y")
    placement = Placement([video, sound, after], 4)
    assert [index for index, _ in placement.runs(range(20), 4)] == [0, 2]
    assert placement.parent(2) == 0
    assert placement.parent(0) is None


def test_attention_makes_later_tokens_dearer() -> None:
    assert prefill_cost(0, 1, 4096) == 1.0
    assert prefill_cost(0, 100, 64) == pytest.approx(
        sum(1 + position / (6 * 64) for position in range(100))
    )


@given(st.data())
# No deadline: the machine may be busy.
@settings(deadline=None)
def test_sessions_follow_a_simple_model(data: st.DataObject) -> None:
    now = [0.0]
    sessions = Sessions(10.0, lambda: now[0])
    last: dict[str, float] = {}
    pinned: set[str] = set()
    items: dict[str, set[int]] = {}
    for _ in range(data.draw(st.integers(0, 60))):
        now[0] += data.draw(st.floats(0, 4))
        name = data.draw(st.sampled_from("abc"))
        action = data.draw(st.sampled_from(["use", "pin", "unpin", "release", "expire", "forget"]))
        item = data.draw(st.integers(0, 3))
        if action == "use":
            lost = sessions.use(name, item)
            items.setdefault(name, set()).add(item)
            last[name] = now[0]
            over = [n for n in last if n not in pinned and last[n] + 10 <= now[0]]
            # Three sessions, of which at least the one in use is alive.
            assert lost == {number for old in over for number in items.pop(old)}
            for old in over:
                del last[old]
        elif action == "pin":
            assert sessions.pin(name) == items.setdefault(name, set())
            pinned.add(name)
            last.setdefault(name, now[0])
        elif action == "unpin":
            found = sessions.unpin(name)
            assert found == (items[name] if name in pinned else set())
            if name in pinned:
                pinned.discard(name)
                last[name] = now[0]
        elif action == "release":
            assert sessions.release(name) == items.pop(name, set())
            pinned.discard(name)
            last.pop(name, None)
        elif action == "expire":
            sessions.expire()
            for old in [n for n in last if n not in pinned and last[n] + 10 <= now[0]]:
                del last[old]
                items.pop(old, None)
        else:
            sessions.forget_item(item)
            for of_session in items.values():
                of_session.discard(item)
        sessions.check_integrity()
        for number in range(4):
            holders = {n for n, of_session in items.items() if number in of_session}
            expected = Protection.NONE
            if holders:
                expected = Protection.PINNED if holders & pinned else Protection.SESSION
            assert sessions.protection(number) is expected
            assert sessions.ids(number) == tuple(sorted(holders))


def test_ids_that_clients_make_up_do_not_pile_up() -> None:
    now = [0.0]
    sessions = Sessions(1e6, lambda: now[0])
    lost: set[int] = set()
    for number in range(MAX_SESSIONS + 5):
        lost |= sessions.use(f"s{number}", number)
        assert len(sessions) <= MAX_SESSIONS
    assert lost == set(range(5))
    now[0] = 1e6
    # Those past their TTL go a few at a time, and faster than new ones come.
    for number in range(MAX_SESSIONS // 2):
        assert len(sessions.use("new", -number)) == 2
    assert len(sessions) == 1


class Unread(set[str]):
    """A set that nobody may go through."""

    def __iter__(self) -> NoReturn:
        raise AssertionError("all sessions of an item were looked at")


def test_what_protects_an_item_is_known_without_looking_at_its_sessions() -> None:
    sessions = Sessions(100.0, lambda: 0.0)
    for number in range(100):
        sessions.use(f"s{number}", 1)
    sessions._of_item[1].ids = Unread(sessions._of_item[1].ids)
    assert sessions.protection(1) is Protection.SESSION
    sessions.pin("s7")
    sessions.use("s7", 1)
    assert sessions.protection(1) is Protection.PINNED
    sessions.unpin("s7")
    sessions.use("s8", 1)
    assert sessions.protection(1) is Protection.SESSION


def test_without_ttl_only_pins_protect() -> None:
    sessions = Sessions(0.0)
    sessions.use("s", 1)
    assert len(sessions) == 0
    sessions.pin("s")
    sessions.use("s", 1)
    assert sessions.protection(1) is Protection.PINNED
    assert sessions.unpin("s") == {1}
    assert sessions.protection(1) is Protection.NONE


def test_the_worst_of_few_goes_and_of_many_one_of_the_worst() -> None:
    ranks = {number: (float(number % 997), number) for number in range(5000)}
    members: SampledWorst[int] = SampledWorst(ranks.__getitem__, random.Random(0))
    for number in range(60):
        members.add(number)
    assert members.worst() == 0
    for number in range(60, 5000):
        members.add(number)
    order = sorted(ranks.values())
    lost = []
    for _ in range(1000):
        worst = members.worst()
        assert worst is not None
        lost.append(order.index(ranks[worst]) / len(order))
        members.remove(worst)
        order.remove(ranks[worst])
        members.check_integrity()
    assert sum(lost) / len(lost) < 0.08
    assert max(lost) < 0.4


def test_a_member_that_comes_back_is_ranked_anew() -> None:
    ranks = {number: (float(number), number) for number in range(200)}
    members: SampledWorst[int] = SampledWorst(ranks.__getitem__, random.Random(0))
    for number in range(200):
        members.add(number)
    worst = members.worst()
    assert worst is not None
    members.remove(worst)
    ranks[worst] = (1e9, 1000)
    members.add(worst)
    for _ in range(150):
        found = members.worst()
        assert found is not None
        assert found != worst
        members.remove(found)


def test_an_item_cannot_go_before_what_follows_it() -> None:
    registry = Registry()
    first = registry.add(b"1", "a", "video", None)
    second = registry.add(b"2", "b", "video", first)
    with pytest.raises(ValueError, match="1 cached items after it"):
        registry.remove(first)
    with pytest.raises(ValueError, match="already"):
        registry.add(b"1", "a", "video", None)
    assert registry.descendants(first) == [second, first]
    registry.remove(second)
    registry.remove(first)
    with pytest.raises(ValueError, match="not cached"):
        registry.add(b"2", "b", "video", first)
    registry.check_integrity()


def test_releasing_a_session_spares_what_another_one_uses() -> None:
    sessions = Sessions(100.0, lambda: 0.0)
    released: set[int] = set()
    pool: Any = SimpleNamespace(
        sessions=sessions, reprotect=len, release=released.update, media=list
    )
    sessions.use("a", 1)
    sessions.use("a", 2)
    sessions.use("b", 2)
    assert control.answer(KVControl(pool), "release", "a") == 2
    assert released == {1}
    assert control.answer(KVControl(pool), "media", "") == []
    assert control.answer(None, "media", "") is None


async def test_the_api_side_asks_the_engine_by_one_utility() -> None:
    asked = []

    class Core:
        async def call_utility_async(self, *args: str) -> None:
            asked.append(args)

    client = control.KVClient(SimpleNamespace(engine_core=Core()))
    await client.pin("s")
    await client.unpin("s")
    await client.release("s")
    assert asked == [("mm_ext_kv", action, "s") for action in ("pin", "unpin", "release")]
    with pytest.raises(RuntimeError, match="no vllm_mm_ext block pool"):
        await client.media()


@pytest.mark.parametrize(
    "bad", [{"max_visual_cache_share": 1.5}, {"pressure_limit": 0}, {"max_visual_cache_gb": 0}]
)
def test_settings_have_bounds(bad: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=next(iter(bad))):
        KVSettings.model_validate(bad)
