"""Notes are fitted into the room there is: what matters stays, in order, and it always ends."""

from __future__ import annotations

import random
import re
from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from simulated_model import SimulatedModel, count

from vllm_mm_ext.config.long_video_settings import LongVideoOptions, LongVideoSettings
from vllm_mm_ext.long_video.looking import Looks
from vllm_mm_ext.long_video.note_store import NoteStore
from vllm_mm_ext.long_video.notes import Entry, lines_of
from vllm_mm_ext.long_video.reducing import reduced
from vllm_mm_ext.long_video.selecting import selected
from vllm_mm_ext.long_video.task import task_of


def looks(model: SimulatedModel, select_tokens: int) -> Looks:
    task = task_of(
        LongVideoSettings(select_tokens=select_tokens, note_tokens=64),
        LongVideoOptions(),
        strategy="map_reduce",
        question="When is the blue flash?",
        durations=[100.0],
        answer_room=4000,
    )
    return Looks(task, model, NoteStore(1 << 20, 60), lambda _: None)


def entries(number: int) -> list[Entry]:
    colours = ["blue" if i % 37 == 5 else "red" for i in range(number)]
    return [
        Entry(0, i * 9.0, f"{colour} flash {i}", window=i // 4) for i, colour in enumerate(colours)
    ]


async def test_what_matters_stays_in_order_and_prompts_fit_the_context() -> None:
    model = SimulatedModel([], context_tokens=1000)
    kept, is_thinned = await reduced(looks(model, 6000), entries(2000), 2000)
    assert [e.text for e in kept] == [e.text for e in entries(2000) if "blue" in e.text]
    assert not is_thinned
    assert len(model.asks) > 30


async def test_what_fits_is_not_asked_about() -> None:
    model = SimulatedModel([])
    kept, is_thinned = await reduced(looks(model, 6000), entries(20), 1000)
    assert (kept, is_thinned, model.asks) == (entries(20), False, [])


@pytest.mark.parametrize("reply", [lambda prompt: prompt, lambda _: "None.", lambda _: ""])
async def test_where_the_model_does_not_choose_notes_are_thinned_evenly(
    reply: Callable[[str], str],
) -> None:
    model = SimulatedModel([], select=reply)
    kept, is_thinned = await reduced(looks(model, 1000), entries(1000), 800)
    numbers = [int(e.text.split()[-1]) for e in kept]
    assert is_thinned
    assert 0.9 * 800 < count(lines_of(kept)) <= 800
    assert numbers == sorted(numbers)
    gaps = [b - a for a, b in zip([0, *numbers], [*numbers, 1000], strict=True)]
    assert max(gaps) < 3 * 1000 / len(numbers)


async def test_a_summary_that_has_no_room_does_not_take_the_place_of_the_notes() -> None:
    model = SimulatedModel([], select=lambda _: "word " * 900, context_tokens=14_000)
    kept, is_thinned = await reduced(looks(model, 6000), entries(3000), 700)
    assert is_thinned
    assert 0.9 * 700 < count(lines_of(kept)) <= 700


async def test_a_group_whose_prompt_fails_is_kept_until_there_is_no_room() -> None:
    model = SimulatedModel([], fails_on_text=True)
    kept, is_thinned = await reduced(looks(model, 1000), entries(300), 800)
    assert is_thinned
    assert count(lines_of(kept)) <= 800


@settings(max_examples=25)
@given(st.integers(0, 200), st.integers(96, 900), st.integers(300, 2000), st.integers(0, 1000))
async def test_whatever_the_model_replies_it_ends_within_the_room(
    number: int, room: int, context: int, seed: int
) -> None:
    chance = random.Random(seed)

    def reply(prompt: str) -> str:
        notes = re.findall(r"\[[^;\n]+", prompt)
        return chance.choice(
            [
                prompt,
                "",
                "Many flashes. " * chance.randrange(400),
                "; ".join(note for note in notes if chance.random() < 0.7),
                "; ".join(f"[9:{i % 60:02}:00] invented" for i in range(50)),
            ]
        )

    model = SimulatedModel([], select=reply, context_tokens=context)
    kept, _ = await reduced(looks(model, 600), entries(number), room)
    assert sum(count(f"{e};") for e in kept) <= room
    assert kept or not number
    assert [e.time for e in kept] == sorted(e.time for e in kept)


GROUP = [
    Entry(0, 100.0, "blue flash", 3),
    Entry(0, 104.0, "A man enters the room.", 3),
    Entry(0, 130.0, "blue flash", 4),
    Entry(0, 151.0, "high tone rise, bar", 5),
]


@pytest.mark.parametrize(
    ("reply", "numbers"),
    [
        ("[0:01:40] blue flash; [0:02:31] high tone rise, bar", [0, 3]),
        ("- **[2:10]** Blue flash.\n- [2:31] High tone rise, bar", [2, 3]),
        ("[0:01:45] a man enters", [1]),
        ("[0:02:09] blue flash", [2]),
        ("[0:02:30]", [3]),
        ("blue flash; high tone rise, bar", [0, 3]),
        ("[0:02:31] high tone; [0:01:40] blue flash; [0:01:40] blue flash", [0, 2, 3]),
        ("[0:01:40] blue flash; [0:05:00] a spaceship lands", [0]),
        ("None.", []),
        ("", []),
        ("Nothing", []),
    ],
)
def test_a_reply_selects_the_entries_that_it_copies_and_no_others(
    reply: str, numbers: list[int]
) -> None:
    assert selected(reply, GROUP) == [GROUP[n] for n in numbers]


def test_a_reply_that_copies_nothing_is_kept_with_the_time_of_its_group() -> None:
    assert lines_of(selected("Two flashes and a tone.", GROUP)) == (
        "[0:01:40-0:02:31] Two flashes and a tone."
    )
