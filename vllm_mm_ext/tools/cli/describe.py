"""``vllm-mm describe``: notes about a long video, or the answer to a question about it."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any
from urllib.parse import urlsplit

import typer
from pydantic import ValidationError
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from vllm_mm_ext.config.long_video_settings import LongVideoOptions, Strategy
from vllm_mm_ext.tools.cli.common import output_file, printable, writing
from vllm_mm_ext.tools.cli.describe_formats import FORMATS, Format
from vllm_mm_ext.tools.cli.describe_request import (
    Conversation,
    DescribeError,
    Source,
    served_model,
)
from vllm_mm_ext.tools.cli.describe_request import Progress as Seen
from vllm_mm_ext.tools.cli.description import Description, hms
from vllm_mm_ext.tools.cli.own_server import ApiKey, Configs, ServerUrl, own_server

if TYPE_CHECKING:
    import openai

_ANSWER_TOKENS = 512
# Between two pieces of an answer: a window may take long where the server has much to do.
_SILENCE_S = 1800.0
_BY_SUFFIX = {".md": Format.markdown, ".json": Format.json, ".vtt": Format.vtt}
_INTERRUPTED = 130
# Windows whose times are told where notes are missing.
_NAMED = 5


def describe(
    source: Annotated[
        str, typer.Argument(metavar="FILE|URL", help="Video: a file, or a URL that servers take.")
    ],
    question: Annotated[
        str | None,
        typer.Option("-q", "--question", help="What to answer; without it, all is described."),
    ] = None,
    url: ServerUrl = None,
    model: Annotated[
        str | None,
        typer.Option(
            help="With --url its name there, by default the first one; else the model to serve, by "
            "default the small one that ships with the package."
        ),
    ] = None,
    api_key: ApiKey = "none",
    configs: Configs = Path("configs"),
    strategy: Annotated[
        Strategy | None,
        typer.Option(help="How windows are read; by default auto, without a question map_reduce."),
    ] = None,
    window: Annotated[float | None, typer.Option(help="Seconds of a window.")] = None,
    overlap: Annotated[float | None, typer.Option(help="Seconds that windows share.")] = None,
    fps: Annotated[float | None, typer.Option(help="Frames per second within a window.")] = None,
    max_windows: Annotated[int | None, typer.Option(help="Windows at most.")] = None,
    format_: Annotated[
        Format | None,
        typer.Option(
            "--format",
            help="By default as the suffix of --output says, else the plain answer, without a "
            "question markdown. vtt: chapters.",
        ),
    ] = None,
    output: Annotated[
        Path | None, output_file("-o", "--output", help="File to write instead of stdout.")
    ] = None,
    page: Annotated[
        Path | None,
        output_file(help="Write a page too: timeline, pictures, notes, and the evidence."),
    ] = None,
) -> None:
    """Describe a video of any length, or answer a question about it, from notes about its windows.

    Exit status: 0, 1 where the server or the video fails, 2 for bad arguments, 130 for Ctrl-C.
    """
    if format_ is None and output is not None:
        format_ = _BY_SUFFIX.get(output.suffix.lower(), Format.markdown)
    if format_ is None and question is None:
        format_ = Format.markdown
    options = _options(
        strategy=strategy or (None if question else "map_reduce"),
        window_s=window,
        overlap_s=overlap,
        fps=fps,
        max_windows=max_windows,
    )
    console = Console(stderr=True)
    try:
        video = Source.of(source)
        with _client(video, url, model, api_key, configs) as (client, served):
            asking = Conversation(client, served, video, question, options, _ANSWER_TOKENS)
            description = _followed(asking, console, echo=format_ is None)
        _warn(console, description)
        try:
            if format_ is not None:
                if output is not None and question is not None:
                    typer.echo(printable(description.answer))
                _write(description, format_, output)
        finally:
            # Also where the other file could not be written.
            if page is not None:
                _write_page(console, video, description, page)
    except DescribeError as error:
        console.print(f"[red]error:[/] {escape(printable(str(error)))}", highlight=False)
        raise typer.Exit(1) from None
    except KeyboardInterrupt:
        console.print("[yellow]cancelled[/]")
        raise typer.Exit(_INTERRUPTED) from None


def _options(**values: Any) -> dict[str, Any]:
    """The request's block of what was said on the command line."""
    try:
        asked = LongVideoOptions(**values)
    except ValidationError as error:
        (first, *_) = error.errors()
        name = str(first["loc"][0]).removesuffix("_s").replace("_", "-")
        raise typer.BadParameter(first["msg"], param_hint=f"--{name}") from None
    return asked.model_dump(exclude_none=True)


@contextmanager
def _client(
    video: Source, url: str | None, model: str | None, api_key: str, configs: Path
) -> Iterator[tuple[openai.OpenAI, str]]:
    """A client of the server to ask, and the model's name there.

    Raises:
        DescribeError: The server does not start, or does not answer.
    """
    import openai

    if url is not None:
        if not urlsplit(url).path.strip("/"):
            url = f"{url.rstrip('/')}/v1"
        client = openai.OpenAI(base_url=url, api_key=api_key, max_retries=0, timeout=_SILENCE_S)
        with client:
            yield client, model or served_model(client)
        return
    from vllm_mm_ext.testing.server import ServerError

    local = [] if video.path is None else ["--allowed-local-media-path", str(video.path.parent)]
    try:
        with own_server(model, configs, local) as server:
            try:
                yield server.client(timeout=_SILENCE_S), server.model
            except DescribeError as error:
                if error.at_server:
                    # The log goes with the server.
                    raise DescribeError(f"{error}\nend of its log:\n{server.tail()}") from error
                raise
    except ServerError as error:
        raise DescribeError(str(error)) from error


def _followed(asking: Conversation, console: Console, *, echo: bool) -> Description:
    """Show a bar while windows are read; with ``echo`` print the answer as it comes."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task("waiting for the server", total=None)
        for event in asking:
            if isinstance(event, Seen):
                span = f"{hms(event.start)} - {hms(event.end)}"
                bar.update(task, completed=event.done, total=event.total, description=span)
            else:
                bar.stop()
                if echo:
                    sys.stdout.write(printable(event))
                    sys.stdout.flush()
    if echo:
        typer.echo()
    return asking.result()


def _warn(console: Console, description: Description) -> None:
    """Say what is missing."""
    lost = [window for window in description.windows if window.problem is not None]
    if lost:
        times = ", ".join(hms(window.start) for window in lost[:_NAMED])
        more = f" and {len(lost) - _NAMED} more" if len(lost) > _NAMED else ""
        reason = printable(lost[0].problem or "")
        console.print(
            f"[yellow]{len(lost)} windows have no note:[/] {times}{more}: {escape(reason)}",
            highlight=False,
        )
    if not description.windows:
        reason = "it may run without the plugin"
        if description.strategy is not None:
            reason = "it answered in one pass"
        console.print(f"[yellow]the server did not report any windows:[/] {reason}")


def _write(description: Description, format_: Format, output: Path | None) -> None:
    text = FORMATS[format_](description)
    if output is not None:
        try:
            with writing(output):
                output.write_text(text, encoding="utf-8")
            return
        except typer.Exit:
            # It may have taken an hour.
            typer.echo(printable(text), nl=False)
            raise
    typer.echo(printable(text), nl=False)


def _write_page(console: Console, video: Source, description: Description, page: Path) -> None:
    from vllm_mm_ext.tools.cli.describe_page import render
    from vllm_mm_ext.tools.cli.describe_pictures import window_pictures

    pictures: Mapping[int, str] = {}
    if description.windows:
        try:
            with console.status("pictures of the windows"):
                pictures = window_pictures(video, description.windows)
        except DescribeError as error:
            # The page is worth having without.
            console.print(f"[yellow]{escape(printable(str(error)))}[/]", highlight=False)
    with writing(page):
        page.write_text(render(description, pictures), encoding="utf-8")
    console.print(f"{page}: {page.stat().st_size / 1024:.0f} KiB", highlight=False)
