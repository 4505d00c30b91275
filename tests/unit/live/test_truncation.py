"""What goes of a conversation that takes more than it may."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from vllm_mm_ext.live.prompt import Frame, Part, Stretch, Text, Unit
from vllm_mm_ext.live.session_items import Item, Weighed
from vllm_mm_ext.live.truncation import Excess, Removal, latest, removals


def stretch(frames: int) -> Stretch:
    seen = tuple(Frame(np.zeros((1, 1, 3), np.uint8), i / 10) for i in range(frames))
    return Stretch("s", (Unit(np.zeros(0, np.float32), seen),))


def weighed(part: Part, tokens: int) -> Weighed:
    frames = len(part.units[0].frames) if isinstance(part, Stretch) else 0
    return Weighed(part, tokens, 10 * tokens, frames)


def tokens(removal: Removal) -> int:
    return removal.tokens


parts = st.one_of(
    st.builds(weighed, st.just(Text("word")), st.integers(1, 50)),
    st.builds(weighed, st.integers(1, 4).map(stretch), st.integers(1, 50)),
)
items = st.builds(
    Item,
    st.just("item"),
    st.sampled_from(["system", "user", "user", "assistant"]),
    st.lists(parts, min_size=1, max_size=4).map(tuple),
    status=st.sampled_from(["completed", "completed", "incomplete", "in_progress"]),
)
open_stretches = st.lists(
    st.builds(weighed, st.integers(1, 4).map(stretch), st.integers(1, 50)), max_size=4
)


@settings(max_examples=300)
@given(
    st.lists(items, max_size=8),
    open_stretches,
    st.integers(1, 400),
    st.integers(0, 100),
    st.integers(0, 6),
)
def test_what_goes_is_enough_or_all_that_can_go(
    held: list[Item], open_parts: list[Weighed], least: int, more: int, keep_frames: int
) -> None:
    excess = least + more
    gone = removals(held, open_parts, Excess(least, excess), tokens, keep_frames)
    taken = sum(removal.tokens for removal in gone)
    if taken >= excess:
        # Nothing goes that need not, but answers go with what they answer.
        while gone and gone[-1].item and gone[-1].item.role == "assistant":
            gone.pop()
        assert sum(removal.tokens for removal in gone[:-1]) < excess
    elif taken < least:
        # The latest frames too.
        all_that_can = removals(held, open_parts, Excess(1 << 30, 1 << 30), tokens, 0)
        assert [(r.item, r.part) for r in gone] == [(r.item, r.part) for r in all_that_can]
    assert not any(r.item and r.item.role == "system" for r in gone)
    assert not any(r.item and r.item.status == "in_progress" for r in gone)
    # Of the open message the first stretches go, never the last one.
    of_open = [r.part for r in gone if r.item is None]
    assert of_open == open_parts[: len(of_open)]
    assert len(of_open) < max(1, len(open_parts))
    order = {id(item): index for index, item in enumerate(held)}
    places = [order.get(id(r.item), len(held)) for r in gone]
    assert places == sorted(places)


def test_the_last_turn_stays_and_what_is_before_it_goes_first() -> None:
    old = Item("a", "user", (weighed(Text("old"), 50),))
    said = Item("b", "assistant", (weighed(Text("said"), 50),))
    last = Item("c", "user", (weighed(stretch(1), 50), weighed(stretch(1), 50)))
    answer = Item("d", "assistant", (weighed(Text("answer"), 50),))
    gone = removals([old, said, last, answer], [], Excess(1000, 1000), tokens, 0)
    assert [(r.item and r.item.item_id, r.part) for r in gone] == [
        ("a", None),
        ("b", None),
        ("c", last.parts[0]),
    ]


def test_a_question_stays_while_its_answer_is_written() -> None:
    old = Item("a", "user", (weighed(Text("old"), 50),))
    asked = Item("b", "user", (weighed(stretch(1), 50), weighed(Text("What?"), 50)))
    answer = Item("c", "assistant", status="in_progress")
    later = Item("d", "user", (weighed(stretch(1), 50),))
    open_parts = [weighed(stretch(1), 50), weighed(stretch(1), 50)]
    gone = removals([old, asked, answer, later], open_parts, Excess(1000, 1000), tokens, 0)
    assert [(r.item and r.item.item_id, r.part) for r in gone] == [
        ("a", None),
        ("d", None),
        (None, open_parts[0]),
    ]


def test_a_question_stays_until_its_answer_begins_though_more_came_in_since() -> None:
    old = Item("a", "user", (weighed(Text("old"), 50),))
    said = Item("b", "assistant", (weighed(Text("said"), 50),))
    asked = Item("c", "user", (weighed(stretch(1), 50), weighed(stretch(1), 50)))
    since = weighed(stretch(1), 50)
    gone = removals([old, said, asked], [since], Excess(1000, 1000), tokens, 0)
    assert [(r.item and r.item.item_id, r.part) for r in gone] == [
        ("a", None),
        ("b", None),
        ("c", asked.parts[0]),
    ]
    # Once it is answered it goes like any other.
    gone = removals([asked, said], [since], Excess(1000, 1000), tokens, 0)
    assert [r.item and r.item.item_id for r in gone] == ["c", "b"]


def test_what_the_last_question_is_about_stays_as_long_as_there_is_another_way() -> None:
    old = Item("a", "user", (weighed(Text("old"), 50),))
    said = Item("b", "assistant", (weighed(Text("said"), 50),))
    heard = Item("c", "user", (weighed(stretch(0), 50), weighed(stretch(0), 50)))
    asked = Item("d", "user", (weighed(Text("What?"), 50),))
    held = [old, said, heard, asked]
    since = weighed(stretch(1), 50)
    for open_parts in ([], [since]):
        gone = removals(held, open_parts, Excess(140, 150), tokens, 0)
        assert [(r.item and r.item.item_id, r.part) for r in gone] == [
            ("a", None),
            ("b", None),
            ("c", heard.parts[0]),
        ]
        # As much as there is need for, if not as much as it was worth.
        gone = removals(held, open_parts, Excess(150, 200), tokens, 0)
        assert len(gone) == 3
        # There is no other way.
        gone = removals(held, open_parts, Excess(151, 160), tokens, 0)
        assert [(r.item and r.item.item_id, r.part) for r in gone] == [
            ("a", None),
            ("b", None),
            ("c", None),
        ]
    # While the answer is written, too.
    answer = Item("e", "assistant", status="in_progress")
    gone = removals([*held, answer], [since], Excess(140, 150), tokens, 0)
    assert [(r.item and r.item.item_id, r.part) for r in gone][-1] == ("c", heard.parts[0])


def test_what_is_left_out_of_one_prompt_stays_in_the_conversation() -> None:
    old = Item("a", "user", (weighed(Text("old"), 50),))
    said = Item("b", "assistant", (weighed(Text("said"), 50),))
    heard = Item("c", "user", (weighed(stretch(0), 50), weighed(stretch(0), 50)))
    held = [old, said, heard]
    parts_held = [item.parts for item in held]

    def shown(instruction_tokens: int) -> list[tuple[str, int]]:
        fit = latest(held, instruction_tokens, "auto", 400, 0)
        assert [item.parts for item in held] == parts_held
        return [(item.item_id, len(item.parts)) for item in fit]

    assert shown(200) == [("a", 1), ("b", 1), ("c", 2)]
    assert shown(201) == [("c", 2)]
    assert shown(300) == [("c", 2)]
    assert shown(350) == [("c", 1)]
    assert latest(held, 350, "disabled", 400, 0) == held


def test_the_latest_frames_stay_while_anything_else_can_go() -> None:
    seen = Item("a", "user", (weighed(stretch(2), 50), weighed(Text("Look"), 20)))
    asked = Item("b", "user", (weighed(Text("old"), 50),))
    last = Item("c", "user", (weighed(Text("new"), 50),))
    held = [seen, asked, last]
    gone = removals(held, [], Excess(70, 70), tokens, 2)
    assert [(r.item and r.item.item_id, r.part) for r in gone] == [
        ("a", seen.parts[1]),
        ("b", None),
    ]
    answer = Item("d", "assistant", (weighed(Text("answer"), 50),))
    gone = removals([held[1], answer, last], [], Excess(10, 10), tokens, 0)
    assert [r.item and r.item.item_id for r in gone] == ["b", "d"]
    gone = removals(held, [], Excess(100, 100), tokens, 2)
    assert [r.item and r.item.item_id for r in gone] == ["a", "b"]
    assert gone[0].part is None
