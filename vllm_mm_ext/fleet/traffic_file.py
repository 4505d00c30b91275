"""Traces of fleets: a request a line, as JSON, in order of time."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Annotated

import msgspec

from vllm_mm_ext.fleet.traffic import Ask

_Seconds = Annotated[float, msgspec.Meta(ge=0)]
_Count = Annotated[int, msgspec.Meta(ge=0, le=1 << 30)]
_Output = Annotated[int, msgspec.Meta(ge=1, le=1 << 30)]


class _Line(msgspec.Struct, forbid_unknown_fields=True, omit_defaults=True):
    at: _Seconds
    session: str | int
    media: str | int | None = None
    kind: _Count = 0
    text: _Count = 0
    output: _Output = 1
    live: bool = False
    last: bool = False
    kept: bool = True


class TraceError(ValueError):
    """A line of a trace cannot be read; the message names file, line and cause."""


def read_trace(file: Path, kinds: int) -> Iterator[Ask]:
    """Read a trace line by line.

    Args:
        file: The file; each line is an object with the fields of ``Ask``. Sessions and media may
            have names instead of numbers.
        kinds: How many kinds of media the simulation knows.

    Raises:
        OSError: The file cannot be read.
        TraceError: A line is none of a trace, comes before the one above it, or its kind is
            unknown.
    """
    decoder = msgspec.json.Decoder(_Line)
    before = 0.0
    with file.open("rb") as lines:
        for number, text in enumerate(lines, 1):
            if not text.strip():
                continue
            try:
                line = decoder.decode(text)
            except (msgspec.MsgspecError, UnicodeDecodeError) as error:
                raise TraceError(f"{file}:{number}: {error}") from error
            if line.at < before:
                raise TraceError(f"{file}:{number}: at {line.at:g} is before {before:g} above it")
            if line.kind >= kinds:
                raise TraceError(
                    f"{file}:{number}: kind {line.kind}, there are {kinds} kinds from 0 on"
                )
            before = line.at
            yield Ask(
                line.at,
                _number(line.session),
                -1 if line.media is None else _number(line.media),
                line.kind,
                line.text,
                line.output,
                line.live,
                line.last,
                line.kept,
            )


def write_trace(asks: Iterable[Ask], file: Path) -> Iterator[Ask]:
    """Write requests to a file as they pass through.

    Args:
        asks: The requests.
        file: The file; it is complete once all of them have passed.

    Raises:
        OSError: The file cannot be written.
    """
    encoder = msgspec.json.Encoder()
    with file.open("wb") as lines:
        for ask in asks:
            line = _Line(
                ask.at,
                ask.session,
                None if ask.media < 0 else ask.media,
                ask.kind,
                ask.text,
                ask.output,
                ask.live,
                ask.last,
                ask.kept,
            )
            lines.write(encoder.encode(line) + b"\n")
            yield ask


def _number(name: str | int) -> int:
    """A number for a name, without keeping the names."""
    if isinstance(name, int) and name >= 0:
        return name
    digest = hashlib.blake2b(str(name).encode("utf-8", "surrogatepass"), digest_size=7).digest()
    # Beyond the numbers of generated media.
    return int.from_bytes(digest, "big") | 1 << 56
