"""Options and error output shared by the commands."""

from __future__ import annotations

import os
import unicodedata
from collections.abc import Iterator
from contextlib import contextmanager
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape

from vllm_mm_ext.errors import MediaError


class Policy(StrEnum):
    """Sampling policies that choose frames by themselves."""

    uniform = "uniform"
    keyframe = "keyframe"
    adaptive = "adaptive"


MediaFile = Annotated[
    Path, typer.Argument(metavar="FILE", exists=True, dir_okay=False, help="Video or audio file.")
]
MaxFrames = Annotated[int, typer.Option(min=1, help="Most frames to choose.")]
MinFrames = Annotated[int, typer.Option(min=1, help="Fewest frames, where the clip has them.")]
Fps = Annotated[
    float, typer.Option(min=0.001, help="Frames a second asked of `uniform`; mean of `adaptive`.")
]
MinFps = Annotated[float, typer.Option(min=0.0, help="`adaptive`: fewest frames in any second.")]
MaxFps = Annotated[float, typer.Option(min=0.001, help="`adaptive`: most frames in any second.")]


def output_file(*names: str, help: str, folder_is_made: bool = False) -> Any:
    """An option that names a file to write; what cannot be one is refused before any work.

    Args:
        names: Of the option; by default that of its parameter.
        help: What is written there.
        folder_is_made: The command makes the file's folder where it is missing.
    """
    check = _file_in_a_folder_to_make if folder_is_made else _file_in_a_folder
    return typer.Option(*names, dir_okay=False, writable=True, callback=check, help=help)


def folder_to_make(path: Path | None) -> Path | None:
    """Callback of an option that names a folder to write into, which is made where it is missing.

    Raises:
        typer.BadParameter: It cannot be made.
    """
    if path is not None:
        whole = path.absolute()
        there = next(one for one in (whole, *whole.parents) if _exists(one))
        if not there.is_dir():
            raise typer.BadParameter(f"{there} is not a folder")
        if not os.access(there, os.W_OK):
            raise typer.BadParameter(f"nothing may be written into {there}")
    return path


def _file_in_a_folder(path: Path | None) -> Path | None:
    if path is not None and not (_exists(path.parent) and path.parent.is_dir()):
        raise typer.BadParameter(f"there is no folder {path.parent}")
    return _file_in_a_folder_to_make(path)


def _file_in_a_folder_to_make(path: Path | None) -> Path | None:
    if path is not None and not _exists(path):
        folder_to_make(path.absolute().parent)
    return path


def _exists(path: Path) -> bool:
    try:
        return path.exists()
    except OSError as error:
        # A name that is too long, or a folder that may not be looked into.
        raise typer.BadParameter(f"{path}: {error.strerror or error}") from None


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Print an ``OSError`` of writing ``path`` in one line on stderr and exit with status 1."""
    try:
        yield
    except OSError as error:
        raise _exit(
            f"[red]cannot write[/] {escape(str(path))}: {error.strerror or error}"
        ) from None


@contextmanager
def server_errors() -> Iterator[None]:
    """Print why a server of a command's own did not start on stderr, and exit with status 1."""
    from vllm_mm_ext.testing.server import ServerError

    try:
        yield
    except ServerError as error:
        raise _exit(f"[red]error:[/] {escape(printable(str(error)))}") from None


@contextmanager
def media_errors() -> Iterator[None]:
    """Print a ``MediaError`` in one line on stderr and exit with status 1."""
    try:
        yield
    except MediaError as error:
        raise _exit(f"[red]{error.code}:[/] {escape(error.message)}") from None


def _exit(why: str) -> typer.Exit:
    Console(stderr=True).print(why, highlight=False, soft_wrap=True)
    return typer.Exit(1)


def clock(seconds: float, digits: int = 1) -> str:
    """``m:ss.s`` with that many ``digits``, hours in front where there are any."""
    ticks = round(float(seconds) * 10**digits)
    whole, fraction = divmod(ticks, 10**digits)
    minutes, whole = divmod(whole, 60)
    hours, minutes = divmod(minutes, 60)
    text = f"{hours}:{minutes:02d}:{whole:02d}" if hours else f"{minutes}:{whole:02d}"
    return f"{text}.{fraction:0{digits}d}" if digits else text


def byte_text(number: float) -> str:
    """A number of bytes for people, in the unit that fits."""
    for unit in ("B", "KiB", "MiB"):
        if number < 1024:
            digits = 0 if number >= 100 or unit == "B" else 1
            return f"{number:.{digits}f} {unit}"
        number /= 1024
    return f"{number:.2f} GiB"


def printable(text: str) -> str:
    """Without control characters: a model may have read them in what it was shown."""
    return "".join(c for c in text if c in "\n\t" or unicodedata.category(c) != "Cc")
