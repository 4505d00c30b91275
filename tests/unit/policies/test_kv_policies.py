"""The pure parts of the KV blocks: placement, pieces, sessions, order, cost, control."""

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
from vllm_mm_ext.policies.kv.pieces import (
    TEXT_CONTENT,
    Content,
    Piece,
    Tree,
    merge,
    paths,
    prefill_cost,
)
from vllm_mm_ext.policies.kv.placement import Feature as Placed
from vllm_mm_ext.policies.kv.placement import end_of, runs
from vllm_mm_ext.policies.kv.retention import Retention, kind_of
from vllm_mm_ext.policies.kv.sessions import MAX_ENDS, MAX_SESSIONS, Sessions


@dataclass
class Range:
    offset: int
    length: int


@dataclass
class Feature:
    mm_position: Any
    identifier: str = "x"
    modality: str = "video"


@st.composite
def prompts(draw: st.DrawFn) -> list[Placed]:
    features: list[Placed] = []
    position = 0
    for _ in range(draw(st.integers(1, 6))):
        position += draw(st.integers(0, 30))
        length = draw(st.integers(1, 40))
        features.append(Feature(Range(position, length)))
        position += length
    return features


@given(prompts(), st.sampled_from([4, 8]), st.integers(0, 12), st.integers(0, 40))
def test_blocks_hold_the_first_item_that_ends_in_or_after_them(
    features: list[Placed], size: int, first: int, count: int
) -> None:
    found = list(runs(features, range(first, first + count), size))
    assert [index for _, run in found for index in run] == list(range(first, first + count))
    for feature, run in found:
        for block in run:
            end = (block + 1) * size
            inside = [f for f in features if f.mm_position.offset < end <= end_of(f)]
            assert ([feature] if feature is not None else []) == inside[:1]


def test_the_sound_of_a_video_in_the_same_place_holds_nothing() -> None:
    items: list[Placed] = [
        Feature(Range(8, 40)),
        Feature(Range(8, 40), "s", "audio"),
        Feature(Range(60, 20), "y"),
    ]
    found = [(f and f.identifier, run) for f, run in runs(items, range(22), 4)]
    assert found == [
        (None, range(2)),
        ("x", range(2, 12)),
        (None, range(12, 15)),
        ("y", range(15, 20)),
        (None, range(20, 22)),
    ]


def test_attention_makes_later_tokens_dearer() -> None:
    assert prefill_cost(0, 1, 4096) == 1.0
    assert prefill_cost(0, 100, 64) == pytest.approx(
        sum(1 + position / (6 * 64) for position in range(100))
    )


@given(st.data())
# No deadline: the machine may be busy.
def test_sessions_follow_a_simple_model(data: st.DataObject) -> None:
    sessions: Sessions[int] = Sessions()
    pinned: set[str] = set()
    # By session, when the latest prompt came that ends in a piece.
    ends: dict[str, dict[int, int]] = {}
    for _ in range(data.draw(st.integers(0, 60))):
        name = data.draw(st.sampled_from("abc"))
        action = data.draw(st.sampled_from(["use", "pin", "unpin", "trim", "release", "gone"]))
        piece = data.draw(st.integers(0, 6))
        of_session = ends.get(name, {})
        if action == "use":
            # Prompts may be computed in another order than they came in, and pieces at once.
            came_s = data.draw(st.integers(0, 3))
            sessions.use(name, piece, [piece - 1, piece], came_s)
            of_session = ends.setdefault(name, {})
            of_session[piece] = max(came_s, of_session.get(piece, 0), of_session.pop(piece - 1, 0))
        elif action == "pin":
            assert set(sessions.pin(name)) == ends.setdefault(name, {}).keys()
            pinned.add(name)
        elif action == "unpin":
            assert set(sessions.unpin(name)) == (of_session.keys() if name in pinned else set())
            pinned.discard(name)
        elif action == "trim":
            latest = [one for one, at in of_session.items() if at == max(of_session.values())]
            assert set(sessions.trim(name)) == of_session.keys() - set(latest)
            if name in ends:
                ends[name] = {one: of_session[one] for one in latest}
        elif action == "release":
            assert set(sessions.release(name)) == ends.pop(name, {}).keys()
            pinned.discard(name)
        else:
            sessions.replace(piece, piece - 1 if piece else None)
            for known in ends.values():
                if piece in known:
                    at = known.pop(piece)
                    if piece:
                        known[piece - 1] = max(known.get(piece - 1, 0), at)
        sessions.check_integrity()
        assert set("abc") & ends.keys() == {each for each in "abc" if each in sessions}
        for number in range(7):
            users = {each for each, known in ends.items() if number in known}
            assert sessions.ending(number) == users
            assert sessions.pinned(number) == bool(users & pinned)


def test_of_too_many_prompts_the_one_that_came_first_is_forgotten() -> None:
    sessions: Sessions[int] = Sessions()
    for number in range(MAX_ENDS):
        sessions.use("s", number, came_s=number)
    # The session comes back to its first prompt, and the second one loses its end.
    sessions.use("s", 0, came_s=MAX_ENDS)
    sessions.replace(1, -1)
    assert sessions.use("s", MAX_ENDS + 1, came_s=MAX_ENDS + 1) == -1


def test_ids_and_prompts_that_clients_make_up_do_not_pile_up() -> None:
    sessions: Sessions[int] = Sessions()
    for number in range(MAX_SESSIONS + 5):
        sessions.use(f"s{number}", number)
    assert len(sessions) == MAX_SESSIONS
    assert not any(sessions.ending(number) for number in range(5))
    for number in range(100):
        sessions.use("s5", -number)
    assert len(sessions.pin("s5")) == MAX_ENDS


def test_pins_that_clients_make_up_do_not_pile_up() -> None:
    sessions: Sessions[int] = Sessions()
    for number in range(MAX_SESSIONS):
        sessions.pin(f"s{number}")
    sessions.use("s0", 7)
    sessions.use("s1", 8)
    assert sessions.pin("another") == [7]
    assert not sessions.pinned(7)
    assert sessions.pinned(8)
    for number in range(MAX_SESSIONS):
        sessions.use(f"unpinned {number}", 9)
    assert sessions.unpin("s1") == [8]
    sessions.check_integrity()


class Unread(set[str]):
    """A set that nobody may go through."""

    def __iter__(self) -> NoReturn:
        raise AssertionError("all sessions of a piece were looked at")


def test_whether_a_piece_is_pinned_is_known_without_looking_at_its_sessions() -> None:
    sessions: Sessions[int] = Sessions()
    for number in range(100):
        sessions.use(f"s{number}", 1)
    sessions._of_piece[1] = Unread(sessions._of_piece[1])
    assert not sessions.pinned(1)
    sessions.pin("s7")
    sessions.pin("s8")
    sessions.unpin("s7")
    assert sessions.pinned(1)
    sessions.unpin("s8")
    assert not sessions.pinned(1)


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


def piece(key: bytes, blocks: int, parent: Piece | None = None, media: str | None = None) -> Piece:
    start = parent.start + len(parent.blocks) if parent is not None else 0
    content = Content(media, "video", 4 * start) if media else TEXT_CONTENT
    made = Piece(key, content, start, 4, parent, "request")
    made.blocks = list(range(start, start + blocks))
    return made


def test_a_piece_cannot_go_before_what_follows_it() -> None:
    tree = Tree()
    first, other = piece(b"1", 2), piece(b"x", 1)
    tree.add(first)
    second = piece(b"2", 3, first)
    tree.add(second)
    with pytest.raises(ValueError, match="1 cached pieces come after"):
        tree.remove(first)
    with pytest.raises(ValueError, match="not cached"):
        tree.add(piece(b"3", 1, other))
    assert tree.descendants(first) == [second, first]
    tree.remove(second)
    tree.remove(first)
    tree.check_integrity()


@given(st.integers(1, 8), st.integers(1, 8), st.booleans())
def test_a_piece_that_is_cut_is_the_same_in_two(head: int, rest: int, media: bool) -> None:
    tree = Tree()
    above = piece(b"0", 3)
    whole = piece(b"1", head + rest, above, "video" if media else None)
    if media:
        whole.modalities = {"video": 4 * (head + rest) - 1, "text": 1}
    tree.add(above)
    tree.add(whole)
    after = piece(b"9", 1, whole)
    tree.add(after)
    cost, blocks = whole.saved(64, encoded=True), list(whole.blocks)
    first = tree.split(whole, head, b"2")
    tree.check_integrity()
    assert all(sum(part.modalities.values()) == media * part.tokens for part in (first, whole))
    assert (first.key, whole.key) == (b"1", b"2")
    assert first.blocks + whole.blocks == blocks
    assert (first.parent, whole.parent, after.parent) == (above, first, whole)
    assert first.saved(64, encoded=True) + whole.saved(64, encoded=True) == pytest.approx(cost)
    assert paths([after]) == {above, first, whole, after}
    assert first.begins_item == media
    assert not whole.begins_item
    (found,) = merge(tree, 10, 64, {}) if media else (None,)
    assert found is None or (found.places, found.blocks) == (1, head + rest)


@given(st.lists(st.integers(0, 40), min_size=1, max_size=4), st.data())
def test_a_piece_that_loses_its_end_tells_the_tokens_that_are_left(
    counts: list[int], data: st.DataObject
) -> None:
    tree = Tree()
    counts[0] += -sum(counts) % 4 or 4 * (not sum(counts))
    one = piece(b"1", sum(counts) // 4, None, "v")
    tree.add(one)
    tree.count(one, {f"modality {number}": count for number, count in enumerate(counts)})
    while one.blocks:
        before = dict(one.modalities)
        tree.cut(one, data.draw(st.integers(1, len(one.blocks))))
        assert sum(tree.modalities.values()) == one.tokens
        assert tree.modalities == one.modalities
        assert all(count <= before[name] for name, count in one.modalities.items())
    tree.remove(one)
    assert (tree.items, tree.modalities) == ({}, {})


class Kept:
    """What a pool does with pieces, without blocks."""

    def __init__(self) -> None:
        self.sessions: Sessions[Piece] = Sessions()
        self.retention = Retention(self.sessions, 64)
        self.tree = Tree()

    def add(self, made: Piece, *, session: bool = False) -> Piece:
        goes_on = made.parent is not None and not made.parent.followed
        like = made.parent.key if made.parent is not None and goes_on else None
        self.retention.history.add(made.key, kind_of(made, session=session), like)
        self.tree.add(made)
        for each in (made, made.parent):
            if each is not None:
                self.retention.settle(each)
        return made

    def drop(self, gone: Piece) -> None:
        self.tree.remove(gone)
        self.retention.drop(gone)
        if gone.parent is not None:
            self.retention.settle(gone.parent)


@given(st.data())
@settings(max_examples=60)
def test_what_goes_is_idle_unpinned_and_not_followed_and_all_can_go(data: st.DataObject) -> None:
    kept = Kept()
    for number in range(data.draw(st.integers(1, 40))):
        pieces = list(kept.tree)
        action = data.draw(st.sampled_from(["add", "add", "use", "busy", "idle", "pin", "drop"]))
        one = data.draw(st.sampled_from(pieces)) if pieces else None
        if action == "add" or one is None:
            key = number.to_bytes(2, "big")
            media = f"m{number}" if data.draw(st.booleans()) else None
            kept.add(piece(key, data.draw(st.integers(1, 6)), one, media))
        elif action == "use":
            kept.retention.history.tick()
            kept.retention.history.use(one.key)
            kept.retention.settle(one)
        elif action in ("busy", "idle"):
            one.busy = int(action == "busy")
            kept.retention.settle(one)
        elif action == "pin":
            kept.sessions.use("s", one)
            kept.sessions.pin("s")
            kept.retention.settle(one)
        else:
            victim = kept.retention.victim()
            if victim is not None:
                kept.drop(victim)
                kept.sessions.replace(victim, None)
        kept.retention.check_integrity(kept.tree)
        may_go = [each for each in kept.tree if each.idle and not each.children]
        victim = kept.retention.victim()
        assert (victim is not None) == bool(may_go)
        assert victim is None or victim in may_go
        if victim is not None and kept.sessions.pinned(victim):
            assert all(kept.sessions.pinned(each) for each in may_go)
        after_media = kept.retention.victim(media=True)
        assert (after_media is not None) == any(each.with_media for each in may_go)


def test_dear_pieces_stay_longer_than_cheap_ones_used_alike() -> None:
    kept = Kept()
    video = kept.add(piece(b"v", 4, None, "v"))
    kept.retention.encoded = lambda _: False
    other = kept.add(piece(b"w", 4, None, "w"))
    assert video.saved(64, encoded=False) == other.saved(64, encoded=False)
    kept.retention.encoded = lambda identifier: identifier == "v"
    assert kept.retention.victim() is video
    kept.retention.encoded = lambda identifier: identifier == "w"
    assert kept.retention.victim() is other
    # Having lost its end, a video needs the encoder in any case.
    video.whole = False
    assert video.saved(64, encoded=False) == video.saved(64, encoded=True)


async def test_the_api_side_asks_the_engine_by_one_utility() -> None:
    asked = []

    class Core:
        async def call_utility_async(self, *args: str) -> int:
            asked.append(args)
            return 1

    client = control.KVClient(SimpleNamespace(engine_core=Core()))
    await client.pin("s")
    await client.unpin("s")
    await client.trim("s")
    await client.release("s")
    assert asked == [("mm_ext_kv", action, "s") for action in ("pin", "unpin", "trim", "release")]


async def test_that_an_engine_keeps_no_kv_is_told_whatever_is_asked() -> None:
    class Core:
        async def call_utility_async(self, _: str, action: str, key: str) -> object:
            return control.answer(None, action, key)

    client = control.KVClient(SimpleNamespace(engine_core=Core()))
    for asked in (client.pin("s"), client.unpin("s"), client.release("s"), client.media()):
        with pytest.raises(control.NoBlockPoolError, match=r"mm_ext\.kv\.enabled"):
            await asked


@pytest.mark.parametrize(
    "bad", [{"max_visual_cache_share": 1.5}, {"pressure_limit": 0}, {"max_visual_cache_gb": 0}]
)
def test_settings_have_bounds(bad: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=next(iter(bad))):
        KVSettings.model_validate(bad)
