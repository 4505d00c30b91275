"""``vllm-mm live``: a live session with a server, from files sent at the speed of a camera."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape

from vllm_mm_ext.tools.cli.common import media_errors, printable
from vllm_mm_ext.tools.cli.live_captions import Captions, summary
from vllm_mm_ext.tools.cli.live_client import (
    RATE,
    LiveError,
    LiveRefusedError,
    LiveSession,
    live_session,
)
from vllm_mm_ext.tools.cli.live_media import pictures_of, sound_of
from vllm_mm_ext.tools.cli.own_server import ApiKey, Configs, LiveUrl, own_server

_INTERRUPTED = 130
# What a microphone delivers at a time; no less can be committed.
_CHUNK_S = 0.1
# After the file a microphone would go on: so much silence at most, until a turn's end is noticed.
_SILENCE_S = 10.0
_SILENT_CHUNKS_LEAST = 10
# A response that the server begins by itself, from the end of a turn.
_ANSWER_S = 600.0


class Turns(StrEnum):
    """Who decides when the user's turn has ended."""

    server = "server"
    semantic = "semantic"
    manual = "manual"


_DETECTION: dict[Turns, dict[str, Any] | None] = {
    Turns.server: {"type": "server_vad"},
    Turns.semantic: {"type": "semantic_vad"},
    Turns.manual: None,
}


def live(
    mic: Annotated[
        Path | None,
        typer.Option(exists=True, dir_okay=False, help="File whose sound is what is heard."),
    ] = None,
    camera: Annotated[
        Path | None,
        typer.Option(exists=True, dir_okay=False, help="File whose pictures are what is seen."),
    ] = None,
    ask: Annotated[
        list[str] | None,
        typer.Option(help="Asked in writing when the files end; may be given several times."),
    ] = None,
    every: Annotated[
        float | None,
        typer.Option(min=0.5, help="Seconds: ask the first question that often meanwhile too."),
    ] = None,
    turns: Annotated[
        Turns | None,
        typer.Option(
            help="Who tells that a turn has ended: a detector of speech, the model, or this "
            "command when it asks; by default `server`, with questions `manual`."
        ),
    ] = None,
    instructions: Annotated[str | None, typer.Option(help="The session's system prompt.")] = None,
    fps: Annotated[float, typer.Option(min=0.05, max=30, help="Pictures sent a second.")] = 2.0,
    edge: Annotated[int, typer.Option(min=16, help="Pixels of a picture's longer edge.")] = 768,
    max_tokens: Annotated[int | None, typer.Option(min=1, help="Tokens of an answer.")] = None,
    url: LiveUrl = None,
    model: Annotated[
        str | None,
        typer.Option(
            help="With --url its name there; else the model to serve, by default the small one "
            "that ships with the package."
        ),
    ] = None,
    api_key: ApiKey = "none",
    configs: Configs = Path("configs"),
) -> None:
    """Show files to a server as a microphone and a camera would, and print what it answers.

    Each line has the time of the media. Exit status: 0, 1 where the server or a file fails, 2 for
    bad arguments, 130 for Ctrl-C.
    """
    if mic is None and camera is None:
        raise typer.BadParameter("name a file", param_hint="--mic or --camera")
    questions = ask or []
    if every is not None and not questions:
        raise typer.BadParameter("needs a question (--ask)", param_hint="--every")
    turns = turns or (Turns.manual if questions else Turns.server)
    if turns is not Turns.manual and mic is None:
        raise typer.BadParameter("needs --mic, or questions (--ask)", param_hint="--turns")
    options: dict[str, Any] = {
        "output_modalities": ["text"],
        "audio": {
            "input": {
                "format": {"type": "audio/pcm", "rate": RATE},
                "turn_detection": _DETECTION[turns],
            }
        },
    }
    if instructions is not None:
        options["instructions"] = instructions
    if max_tokens is not None:
        options["max_output_tokens"] = max_tokens
    errors = Console(stderr=True)
    try:
        with media_errors(), _server(url, model, configs) as (address, name):
            sound = sound_of(mic) if mic is not None else b""
            show = _Show(Captions(Console()), sound, camera, fps, edge, questions, every, turns)
            answered = asyncio.run(show.run(address, name, api_key, options))
        if not answered:
            raise typer.Exit(1)
    except LiveError as error:
        errors.print(f"[red]error:[/] {escape(printable(str(error)))}", highlight=False)
        raise typer.Exit(1) from None
    except KeyboardInterrupt:
        errors.print("[yellow]cancelled[/]")
        raise typer.Exit(_INTERRUPTED) from None


@contextmanager
def _server(url: str | None, model: str | None, configs: Path) -> Iterator[tuple[str, str | None]]:
    """Address of the server to talk to, and the model's name there.

    Raises:
        LiveError: A server that is to be started here does not start.
    """
    if url is not None:
        yield url, model
        return
    from vllm_mm_ext.testing.server import ServerError

    try:
        with own_server(model, configs) as server:
            yield server.url, server.model
    except ServerError as error:
        raise LiveError(str(error)) from error


class _Show:
    """One session: sends the files at their own speed, asks, and prints what comes."""

    def __init__(
        self,
        captions: Captions,
        sound: bytes,
        camera: Path | None,
        fps: float,
        edge: int,
        questions: list[str],
        every: float | None,
        turns: Turns,
    ) -> None:
        self._captions = captions
        self._sound = sound
        self._camera = camera
        self._fps = fps
        self._edge = edge
        self._questions = questions
        self._every = every
        self._turns = turns
        self._began = 0.0
        # Whether something was sent that no question was asked about yet.
        self._unasked = False

    async def run(self, url: str, model: str | None, key: str, options: dict[str, Any]) -> bool:
        """Hold the session; whether the server brought all its answers to an end."""
        captions = self._captions
        async with live_session(url, model, key, captions.event) as session:
            await session.update(**options)
            self._began = time.perf_counter()
            captions.start()
            playing = [self._play(session), self._film(session)]
            over = asyncio.Event()
            caption = asyncio.create_task(self._caption(session, over))
            try:
                await asyncio.gather(*playing)
                over.set()
                # What is asked already is heard out, as is what the server says by itself.
                await caption
            finally:
                caption.cancel()
                await asyncio.gather(caption, return_exceptions=True)
            await session.until(lambda: _idle(session), _ANSWER_S)
            if self._turns is not Turns.manual:
                await self._hear_out(session)
            for question in self._questions:
                await self._ask(session, question)
            typer.echo(summary(session.answers, captions.after_speech_s))
            if not _idle(session):
                raise LiveError(f"the last answer has not ended within {_ANSWER_S:g} s")
            # A failed answer has been printed with its reason.
            return all(answer.status != "failed" for answer in session.answers)

    async def _play(self, session: LiveSession) -> None:
        size = 2 * round(_CHUNK_S * RATE)
        for start in range(0, len(self._sound), size):
            await self._at((start + size) / 2 / RATE)
            self._unasked = True
            # The microphone goes on for the rest of the last piece.
            await session.sound(self._sound[start : start + size].ljust(size, b"\0"))

    async def _film(self, session: LiveSession) -> None:
        if self._camera is None:
            return
        pictures = pictures_of(self._camera, self._fps, self._edge)
        while (picture := await asyncio.to_thread(next, pictures, None)) is not None:
            second, image = picture
            await self._at(second)
            self._unasked = True
            await session.picture(image, second)

    async def _caption(self, session: LiveSession, over: asyncio.Event) -> None:
        """Ask the first question at each moment for it, until ``over``."""
        every = self._every
        if every is None:
            return
        second = every
        while not over.is_set():
            with suppress(TimeoutError):
                await asyncio.wait_for(over.wait(), self._left(second))
            if not over.is_set() and _idle(session):
                # The server may begin a reply of its own before it is asked for one. Its refusal is
                # printed, as all its errors are, and the next moment is another try.
                with suppress(LiveRefusedError):
                    await self._ask(session, self._questions[0])
            second += every

    async def _ask(self, session: LiveSession, question: str) -> None:
        if self._unasked and self._turns is Turns.manual:
            self._unasked = False
            await session.commit()
        await session.say(question)
        self._captions.asked(question)
        await session.respond()

    async def _hear_out(self, session: LiveSession) -> None:
        """Silence until the last turn has its answer."""
        silence = bytes(2 * round(_CHUNK_S * RATE))
        for number in range(round(_SILENCE_S / _CHUNK_S)):
            if number >= _SILENT_CHUNKS_LEAST and not self._captions.speaking:
                break
            await asyncio.sleep(_CHUNK_S)
            await session.sound(silence)
        await session.until(lambda: _idle(session), _ANSWER_S)

    async def _at(self, second: float) -> None:
        """Wait until a moment of the media."""
        await asyncio.sleep(self._left(second))

    def _left(self, second: float) -> float:
        """Seconds until a moment of the media, 0 if it has passed."""
        return max(0.0, self._began + second - time.perf_counter())


def _idle(session: LiveSession) -> bool:
    return not session.answers or session.answers[-1].ended is not None
