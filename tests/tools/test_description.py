"""What ``vllm-mm describe`` makes of an answer: Markdown, WebVTT chapters, a page."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support.html_page import Page
from vllm_mm_ext.testing.media import make_clip
from vllm_mm_ext.tools.cli import describe_pictures
from vllm_mm_ext.tools.cli.describe_formats import to_markdown, to_vtt
from vllm_mm_ext.tools.cli.describe_page import render
from vllm_mm_ext.tools.cli.describe_pictures import MAX_BYTES, window_pictures
from vllm_mm_ext.tools.cli.describe_request import Source
from vllm_mm_ext.tools.cli.description import (
    Description,
    Entry,
    NotedWindow,
    hms,
    with_evidence,
)

DESCRIPTION = with_evidence(
    Description(
        name="a <b> & c.mp4",
        model="tiny",
        question="When is the <blue> flash?",
        answer="At 0:00:05.",
        strategy="search",
        windows=(
            NotedWindow(0, 0.0, 6.0, "[0:00:00] red circle left"),
            NotedWindow(1, 4.0, 10.0, "[0:00:04] bar --> up; [0:00:05] blue <flash>", 0.93),
            NotedWindow(2, 8.0, 12.0, problem="took longer than 60 s"),
            NotedWindow(3, 10.0, 14.0, relevance=0.01),
        ),
        cited=(5.0,),
        cost={"prompt_tokens": 900, "completion_tokens": 30},
    )
)


def test_a_note_falls_into_entries_at_its_times() -> None:
    note = "Before all. [0:00:04] green bar; [1:02:03] blue flash;"
    assert NotedWindow(0, 0, 30, note).entries == (
        Entry(None, "Before all."),
        Entry(4, "green bar"),
        Entry(3723, "blue flash"),
    )
    assert NotedWindow(0, 0, 30, "no times").entries == (Entry(None, "no times"),)
    assert NotedWindow(0, 0, 30).entries == ()


def test_of_two_windows_that_hold_a_cited_time_the_one_that_notes_it_is_evidence() -> None:
    assert [window.number for window in DESCRIPTION.evidence] == [1]
    unnamed = replace(DESCRIPTION, windows=DESCRIPTION.windows[:1], cited=(2.5,))
    assert [window.number for window in with_evidence(unnamed).evidence] == [0]


def test_markdown_has_question_answer_evidence_and_all_windows() -> None:
    text = to_markdown(DESCRIPTION)
    assert text.startswith("# a <b> & c.mp4\n\n**When is the <blue> flash?**\n\nAt 0:00:05.\n")
    assert text.count("- **0:00:04 - 0:00:10** [0:00:04] bar --> up") == 2
    assert "- **0:00:10 - 0:00:14** *not noted*" in text


_NAME = "WEBVTT( [^\n]*)?"
_CLOCK = r"(\d{2,}):([0-5]\d):([0-5]\d)\.(\d{3})"
_TEXT = r"(?:[^\n\r\0&<>]|&(?:amp|lt|gt);)+"


def chapters(text: str) -> list[tuple[float, float, str]]:
    """Cues of a WebVTT file of chapters, held against the syntax of the W3C's recommendation.

    Section 4.1 (body, cue timings) and 4.4 (chapter titles: one line of text, no tags); cues may
    touch, none may hold a part of another.
    """
    head, *blocks = text.removesuffix("\n").split("\n\n")
    assert re.fullmatch(_NAME, head)
    assert "-->" not in head
    found: list[tuple[float, float, str]] = []
    for block in blocks:
        match = re.fullmatch(rf"{_CLOCK} --> {_CLOCK}\n({_TEXT})", block)
        assert match, block
        numbers = [int(group) for group in match.groups()[:8]]
        begin, end = (
            3600 * hour + 60 * minute + second + ms / 1000
            for hour, minute, second, ms in (numbers[:4], numbers[4:])
        )
        assert begin < end
        assert not found or found[-1][1] <= begin
        found.append((begin, end, match[9]))
    return found


def test_vtt_has_a_chapter_for_each_note_at_absolute_times() -> None:
    assert chapters(to_vtt(DESCRIPTION)) == [
        (0.0, 4.0, "[0:00:00] red circle left"),
        (4.0, 8.0, "[0:00:04] bar --&gt; up; [0:00:05] blue &lt;flash&gt;"),
    ]


@settings(max_examples=30)
@given(
    stride=st.floats(0.5, 600),
    overlap=st.floats(0, 0.5),
    notes=st.lists(st.none() | st.text(max_size=40), max_size=8),
    name=st.text(max_size=20),
)
def test_vtt_is_valid_whatever_the_model_wrote(
    stride: float, overlap: float, notes: list[str | None], name: str
) -> None:
    windows = tuple(
        NotedWindow(number, number * stride, (number + 1 + overlap) * stride, note)
        for number, note in enumerate(notes)
    )
    found = chapters(to_vtt(replace(DESCRIPTION, name=name, windows=windows)))
    assert len(found) == sum(bool((note or "").split()) for note in notes)


def test_windows_without_a_note_are_small_pictures_between_the_others() -> None:
    page = Page(render(DESCRIPTION, dict.fromkeys(range(4), "data:image/jpeg;base64,AA")))
    assert page.tags.count("figure") == 1
    assert page.ids == ["w0", "w1", "w2", "w3"]


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("describe") / "a.mp4"
    make_clip(path, width=160, height=90, duration=12, scene="shapes", fps=10, gop=20)
    return path


def test_pictures_show_their_windows_and_stay_small_however_many(
    clip: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    windows = [NotedWindow(number, number / 10, number / 10 + 2) for number in range(100)]
    source = Source.of(str(clip))
    large = window_pictures(source, windows)
    assert list(large) == list(range(100))
    taken = sum(map(len, large.values()))
    assert taken < MAX_BYTES * 4 / 3
    monkeypatch.setattr(describe_pictures, "MAX_BYTES", taken // 6)
    monkeypatch.setattr(describe_pictures, "_MOST", 40)
    small = window_pictures(source, windows)
    assert list(small) == list(range(0, 100, 3))
    assert sum(map(len, small.values())) < taken / 3.5


@pytest.mark.parametrize(
    ("seconds", "text"), [(0, "0:00:00"), (59.99, "0:00:59"), (3725.5, "1:02:05")]
)
def test_times_are_whole_seconds_with_hours(seconds: float, text: str) -> None:
    assert hms(seconds) == text
