"""Notes: untidy marks become times on the video's clock, and overlaps are told once."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllm_mm_ext.long_video.asking import Window
from vllm_mm_ext.long_video.notes import clock, entries_of, lines_of, merged, times_in

WINDOW = Window(0, 60, 1680.0, 1710.0)  # 0:28:00 to 0:28:30


@pytest.mark.parametrize(
    ("mark", "seconds"),
    [
        ("[12]", 12),
        ("[12.5]", 12.5),
        ("[0:12]", 12),
        ("[12s]", 12),
        ("[12 seconds]", 12),
        ("[ 12 ]", 12),
        ("[12-15]", 12),
        ("[0:12 - 0:15]", 12),
        ("[12s to 15s]", 12),
        ("- **[12]**", 12),
        ("[1:02:03]", 30),
        ("[99]", 30),
        ("[0:28:20]", 20),
    ],
)
def test_a_mark_becomes_a_time_of_the_video_within_the_window(mark: str, seconds: float) -> None:
    (entry,) = entries_of(f"{mark} a man enters.", WINDOW)
    assert (entry.time, entry.text) == (1680 + seconds, "a man enters.")


def test_a_note_of_several_entries_is_rewritten_to_the_clock_of_the_video() -> None:
    note = "[0] red circle left; [9] green bar still; [12] blue flash"
    assert lines_of(entries_of(note, WINDOW)) == (
        "[0:28:00] red circle left; [0:28:09] green bar still; [0:28:12] blue flash"
    )


def test_lists_with_an_introduction_and_broken_lines_are_read() -> None:
    note = "Here are the notes:\n\n- [3] A dog\n  barks.\n* **[1]** A sign: [EXIT]\n\n• [40s] Dark"
    assert [(e.time - 1680, e.text) for e in entries_of(note, WINDOW)] == [
        (1, "A sign: [EXIT]"),
        (3, "A dog barks."),
        (30, "Dark"),
    ]


def test_lines_without_marks_get_the_start_of_the_window() -> None:
    entries = entries_of("A dog barks.\n\n- A man enters.", WINDOW)
    assert [(e.time, e.text) for e in entries] == [
        (1680, "A dog barks."),
        (1680, "A man enters."),
    ]


@pytest.mark.parametrize("note", ["", "none", "[0] None.", "- Nothing", "[3] ;", "Notes:"])
def test_a_note_that_says_nothing_has_no_entries(note: str) -> None:
    assert entries_of(note, WINDOW) == []


@given(st.text(), st.floats(0, 1e5), st.floats(0.01, 600))
def test_whatever_a_model_writes_its_times_are_in_order_and_within_the_window(
    text: str, start: float, length: float
) -> None:
    window = Window(0, 3, start, start + length)
    times = [entry.time for entry in entries_of(text, window)]
    assert times == sorted(times)
    assert all(window.start <= time <= window.end for time in times)


@given(st.text(alphabet="[]0123456789:. s-\n;x"))
def test_text_full_of_marks_gives_entries_of_one_line(text: str) -> None:
    assert all(e.text and "\n" not in e.text for e in entries_of(text, WINDOW))


def told(*notes: tuple[Window, str]) -> str:
    return lines_of(merged((window, entries_of(note, window)) for window, note in notes))


FIRST, SECOND, THIRD = Window(0, 0, 0, 30), Window(0, 1, 28, 58), Window(0, 2, 56, 86)


def test_what_two_windows_tell_of_their_overlap_is_told_once() -> None:
    assert told(
        (FIRST, "[5] a bell; [28] Blue flash.; [29] blue flash"),
        (SECOND, "[0] blue flash; [1] blue flash; [1] a cat; [9] blue flash"),
    ) == (
        "[0:00:05] a bell; [0:00:28] Blue flash.; [0:00:29] blue flash\n"
        "[0:00:29] a cat; [0:00:37] blue flash"
    )


def test_what_goes_on_when_a_window_begins_is_told_once() -> None:
    assert (
        told(
            (FIRST, "[0] green bar still; [20] red circle left"),
            (SECOND, "[0] red circle left; [3] green bar still"),
        )
        == "[0:00:00] green bar still; [0:00:20] red circle left\n[0:00:31] green bar still"
    )


def test_windows_that_do_not_overlap_keep_what_they_tell() -> None:
    assert told((FIRST, "[29] a"), (THIRD, "[0] a")) == "[0:00:29] a\n[0:00:56] a"
    after = Window(0, 1, 30, 60)
    assert told((FIRST, "[29] a"), (after, "[0] a")) == "[0:00:29] a\n[0:00:30] a"


@given(st.floats(0, 1e6))
def test_a_time_that_is_written_is_read_again(seconds: float) -> None:
    assert times_in(f"at {clock(seconds)}.") == [int(seconds)]


def test_the_times_of_an_answer_are_found_with_and_without_brackets() -> None:
    assert times_in("[0:28:52] and 1:02:03, then 12:05; ratio 1:2, [0:28:52]") == [1732, 3723, 725]
