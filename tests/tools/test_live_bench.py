"""``vllm-mm bench live`` without a model: arguments, what sessions are shown, nonsense."""

from __future__ import annotations

import io
import json
import random
import wave
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from tests.support.live_front import live_front
from vllm_mm_ext.live.event_codec import read_event
from vllm_mm_ext.live.wire_error import WireError
from vllm_mm_ext.tools.bench import live_bench
from vllm_mm_ext.tools.bench.bench_cli import app
from vllm_mm_ext.tools.bench.commands import LivePart
from vllm_mm_ext.tools.bench.harness import BenchContext, BenchResult
from vllm_mm_ext.tools.bench.live_answers import shown_clips
from vllm_mm_ext.tools.bench.live_bench import PARTS
from vllm_mm_ext.tools.bench.live_feed import made_feed, play
from vllm_mm_ext.tools.bench.live_load import Talk
from vllm_mm_ext.tools.bench.live_nonsense import messages
from vllm_mm_ext.tools.bench.live_sides import as_messages
from vllm_mm_ext.tools.bench.live_timing import first_token_at, forget_last, options
from vllm_mm_ext.tools.cli.live_client import RATE, live_session


def test_the_command_measures_all_parts_but_the_hour_unless_told(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    seen: list[Any] = []

    def run(_: BenchContext, *, parts: Any) -> BenchResult:
        seen.append([str(part) for part in parts])
        return BenchResult("live", [])

    monkeypatch.setattr(live_bench, "run", run)
    for args in ([], ["--part", "hour", "--part", "units"]):
        result = CliRunner().invoke(app, ["live", "--work-dir", str(tmp_path), *args])
        assert result.exit_code == 0, result.output
    assert seen == [[part for part in PARTS if part != "hour"], ["hour", "units"]]
    assert set(PARTS) == {str(part) for part in LivePart}


def test_a_feed_is_sent_whole_in_order_and_in_any_parts() -> None:
    feed = made_feed(1.5, 2.0, seed=1, silence_s=0.5)
    assert feed.seconds == 2.0
    assert [at for at, _ in feed.pictures] == [0.0, 0.5, 1.0]
    for borders in ([0.0, 2.0], [0.0, 0.33, 1.05, 2.0]):
        pieces = [piece for start, end in pairwise(borders) for piece in feed.pieces(start, end)]
        assert b"".join(chunk for _, chunk, _ in pieces) == feed.sound
        assert [image for *_, image in pieces if image] == [image for _, image in feed.pictures]
        assert [at for at, *_ in pieces] == sorted(at for at, *_ in pieces)
    samples = np.frombuffer(feed.sound, "<i2")
    assert np.abs(samples[: RATE // 2]).max() > 3000
    assert not samples[round(1.5 * RATE) :].any()
    other = made_feed(1.5, 2.0, seed=2)
    assert not {image for _, image in feed.pictures} & {image for _, image in other.pictures}


def test_the_same_as_a_chat_completion_has_all_pictures_and_all_of_the_sound() -> None:
    feed = made_feed(1.0, 3.0, seed=3)
    ((message),) = as_messages(feed)
    video, sound = message["content"]
    assert video["video_url"]["url"].count(",") == 3
    data = read_event(
        json.dumps({"type": "input_audio_buffer.append", "audio": sound["input_audio"]["data"]})
    )
    with wave.open(io.BytesIO(data.audio)) as file:  # type: ignore[union-attr]
        assert file.readframes(file.getnframes()) == feed.sound
    assert Image.open(io.BytesIO(feed.pictures[0][1])).size == (224, 224)


def test_what_counts_as_malformed_is_what_the_codec_refuses() -> None:
    refused = 0
    for data, valid in messages(random.Random(0), 2000):
        try:
            read_event(data)
        except WireError:
            refused += 1
            assert not valid, data[:300]
        else:
            # Others find out about broken images and about options of the session.
            later = any(kind in str(data) for kind in ("mm_ext.video.append", "session.update"))
            assert valid or later, data[:300]
    assert refused > 600


def test_clips_are_held_out_have_sound_and_are_asked_about(tmp_path: Path) -> None:
    first, second = shown_clips(0, 2, tmp_path)
    assert first.feed.sound != second.feed.sound
    for shown in (first, second):
        assert shown.questions
        # As long as the clip, but for the padding of its sound's codec.
        assert abs(shown.feed.seconds - len(shown.feed.pictures) / 4) < 0.2


async def test_the_same_conversation_is_asked_again_once_the_answer_is_forgotten() -> None:
    async with live_front() as (url, *_), live_session(url, None) as session:
        await session.update(**options())
        await play(session, made_feed(1.0, 2.0, seed=4), speed=50.0)
        await session.commit()
        await session.say("two words")
        items = list(session.items)
        for _ in range(2):
            assert (await session.respond()).text.split() == ["two", "words"]
            await forget_last(session)
            assert session.items == items


async def test_answers_without_text_are_timed_by_their_end_and_failed_ones_are_counted_apart() -> (
    None
):
    talk = Talk()
    async with live_front() as (url, *_), live_session(url, None) as session:
        await session.update(**options())
        for text in (" ", "break", "two words"):
            await play(session, made_feed(0.2, 0.0, seed=5), speed=50.0)
            await session.say(text)
            await talk.ask(session)
        empty, broken, spoken = session.answers
    assert (empty.text, empty.status, broken.status) == ("", "completed", "failed")
    assert spoken.text.split() == ["two", "words"]
    assert talk.failed == 1
    assert len(talk.first_ms) == 2
    assert min(talk.first_ms) > 0
    assert [row.name for row in talk.rows("x")] == [
        "x: answers, failed",
        "x: commit to first token, median",
        "x: commit to first token, p99",
    ]
    ((row),) = Talk(failed=2).rows("all fail")
    assert (row.stock, row.plugin) == (2, 2)
    with pytest.raises(RuntimeError, match="failed: It broke"):
        first_token_at(broken)
