"""``vllm-mm live`` and its page against real sessions, whose engine is a stand-in."""

from __future__ import annotations

import asyncio
import re
import wave
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from tests.support.live_front import EchoEngine, EchoSession, live_front
from vllm_mm_ext.adapters.live.live_page import page
from vllm_mm_ext.testing.media import Tone, make_audio, make_clip
from vllm_mm_ext.tools.bench.live_feed import made_feed
from vllm_mm_ext.tools.cli import live_session as command
from vllm_mm_ext.tools.cli.live_client import (
    RATE,
    LiveAnswer,
    LiveError,
    LiveRefusedError,
    LiveSession,
    live_session,
    socket_url,
)
from vllm_mm_ext.tools.cli.live_media import pictures_of, sound_of
from vllm_mm_ext.tools.cli.main import app

runner = CliRunner(env={"COLUMNS": "200"})


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("live") / "clip.mp4"
    make_clip(path, width=64, height=48, fps=8, duration=2.0, audio=[Tone(440.0, 0.5, 1.5)])
    return path


async def live(*args: str) -> tuple[int, str]:
    """Exit status and output of the command, run beside the server of this event loop."""
    result = await asyncio.to_thread(runner.invoke, app, ["live", *args])
    return result.exit_code, result.output


async def test_questions_about_files_are_answered_with_times_and_what_they_took(
    clip: Path,
) -> None:
    async with live_front() as (url, engine, _):
        status, output = await live(
            *("--mic", str(clip), "--camera", str(clip), "--url", f"{url}/v1"),
            *("--ask", "one two three", "--ask", "four"),
        )
        assert not engine.sessions
    assert status == 0, output
    lines = output.splitlines()
    assert re.fullmatch(r" +0:0\d\.\d asked one two three", lines[0])
    assert re.fullmatch(r" +0:0\d\.\d model one two three *", lines[1])
    assert re.search(r"first token \d+ ms; 3 tokens in \d+ ms; prompt 10, 5 from KV", lines[2])
    assert "model four" in output
    assert lines[-1].startswith("2 answers; first token ")
    # The units of sound and pictures were computed before anything was asked.
    assert engine.appended >= 1


async def test_sound_that_is_too_short_for_a_commit_is_asked_about_too(tmp_path: Path) -> None:
    path = tmp_path / "click.wav"
    make_audio(path, duration=0.05, tones=[Tone(1000.0, 0.0, 0.05)])
    async with live_front() as (url, *_):
        status, output = await live("--mic", str(path), "--url", url, "--ask", "what was it")
    assert status == 0, output
    assert "model what was it" in output


async def test_a_question_is_asked_again_and_again_while_files_are_shown(clip: Path) -> None:
    async with live_front() as (url, *_):
        status, output = await live(
            *("--camera", str(clip), "--url", url, "--ask", "what now", "--every", "0.6")
        )
    assert status == 0, output
    assert output.count("model what now") >= 3


async def test_a_question_is_asked_again_after_the_server_refused_it_during_a_reply_of_its_own(
    clip: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    respond, refusals = LiveSession.respond, []

    async def respond_late(session: LiveSession) -> LiveAnswer:
        if not refusals:
            await session.say("busy " * 500)
            await session.request("response.created", "response.create")
        try:
            return await respond(session)
        except LiveRefusedError as error:
            refusals.append(str(error))
            raise

    monkeypatch.setattr(LiveSession, "respond", respond_late)
    async with live_front() as (url, *_):
        status, output = await live(
            *("--camera", str(clip), "--url", url, "--ask", "what now", "--every", "0.5")
        )
    assert status == 0, output[-200:]
    assert "already has an active response" in refusals[0]
    # Once more while the file is shown, and at its end.
    assert output.count("model what now") >= 2


async def test_what_the_server_refuses_is_an_error_with_its_words(clip: Path) -> None:
    async with live_front() as (url, *_):
        status, output = await live(
            *("--mic", str(clip), "--url", url, "--ask", "x", "--max-tokens", "99999999")
        )
        assert (status, "max_output_tokens" in output) == (1, True), output
        status, output = await live("--mic", str(clip), "--url", url, "--model", "other")
        assert (status, "other" in output) == (1, True), output


async def test_an_answer_that_fails_is_told_and_ends_the_command_with_an_error(clip: Path) -> None:
    async with live_front() as (url, *_):
        status, output = await live("--camera", str(clip), "--url", url, "--ask", "break")
    assert status == 1
    assert "failed: It broke." in output
    assert output.splitlines()[-1].startswith("1 answers")


async def test_an_answer_that_never_ends_is_told_and_ends_the_command_with_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    speech = tmp_path / "speech.wav"
    with wave.open(str(speech), "wb") as file:
        file.setparams((1, 2, RATE, 0, "NONE", ""))
        file.writeframes(made_feed(0.6, 0.0, seed=1).sound)

    async def wait(*_: object) -> None:
        await asyncio.Event().wait()

    monkeypatch.setattr(EchoSession, "_answer", wait)
    monkeypatch.setattr(command, "_ANSWER_S", 0.2)
    async with live_front(engine := EchoEngine()) as (url, *_):
        # The server answers by itself when the speech has ended.
        status, output = await live("--mic", str(speech), "--url", url)
    assert (status, engine.sessions) == (1, set())
    assert "the last answer has not ended within 0.2 s" in output


async def test_errors_of_the_protocol_reach_whoever_asked_and_nobody_else() -> None:
    async with live_front() as (url, *_), live_session(url, None) as session:
        await session.update(audio={"input": {"turn_detection": None}})
        with pytest.raises(LiveError, match="buffer"):
            await session.commit()
        with pytest.raises(LiveError, match="no_such"):
            await session.request("x", "conversation.item.delete", item_id="no_such")
        await session.say("still here")
        assert (await session.respond()).text.strip() == "still here"
        assert not session.errors


async def test_a_session_that_the_server_closes_says_why() -> None:
    async with live_front(max_sessions=1) as (url, *_), live_session(url, None):
        with pytest.raises(LiveError, match=r"1013.*max_sessions"):
            async with live_session(url, None):
                pass


def test_a_server_that_is_not_there_and_bad_arguments_are_told(clip: Path) -> None:
    for scheme in ("http", "ws"):
        gone = runner.invoke(app, ["live", "--mic", str(clip), "--url", f"{scheme}://127.0.0.1:9"])
        assert (gone.exit_code, "no answer from ws://127.0.0.1:9" in gone.output) == (1, True)
    for args, told in (
        ([], "--mic or --camera"),
        (["--camera", str(clip)], "needs --mic"),
        (["--camera", str(clip), "--url", "ftp://host"], "is no address"),
        (["--camera", str(clip), "--every", "2"], "--ask"),
    ):
        result = runner.invoke(app, ["live", *args])
        assert (result.exit_code, told in result.output) == (2, True), result.output


def test_sound_and_pictures_of_a_file_are_those_of_the_file(tmp_path: Path, clip: Path) -> None:
    path = tmp_path / "tone.wav"
    make_audio(path, duration=1.0, tones=[Tone(1000.0, 0.0, 1.0)])
    samples = np.frombuffer(sound_of(path), "<i2")
    assert len(samples) == RATE
    spectrum = np.abs(np.fft.rfft(samples))
    assert abs(int(spectrum.argmax()) - 1000) <= 1
    times, images = zip(*pictures_of(clip, 4.0, 32), strict=True)
    np.testing.assert_allclose(times, np.arange(8) / 4)
    assert all(image.startswith(b"\xff\xd8") for image in images)


def test_sessions_are_found_below_any_base_url() -> None:
    for url, address in (
        ("http://host:8000/v1", "ws://host:8000/mm_ext/realtime"),
        ("https://host/prefix/v1/", "wss://host/prefix/mm_ext/realtime"),
        ("http://host", "ws://host/mm_ext/realtime"),
    ):
        assert socket_url(url, None) == address
    assert socket_url("http://h", "a/b c").endswith("?model=a%2Fb+c")


def test_the_page_is_one_file_and_refers_to_elements_that_it_has() -> None:
    text = page()
    assert not re.findall(r"""(?:src|href)\s*=\s*["'](?!data:)""", text)
    ids = set(re.findall(r'\bid="(\w+)"', text))
    assert set(re.findall(r"\$\('(\w+)'\)", text)) <= ids
