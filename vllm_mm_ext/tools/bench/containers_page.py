"""The table of containers and codecs, on a terminal and as the page ``docs/media.md``."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.progress import track
from rich.table import Table

from vllm_mm_ext.tools.bench.containers import (
    COMBINATIONS,
    LATE_S,
    Finding,
    examine_found,
    examine_made,
    found_files,
)

_COLUMNS = ("file", "length", "frames", "times", "pictures", "sound", "late")
_HEADS = ("file", "length", "frames", "times", "pictures", "sound", "late sound")
# Where the generated tables of a page begin, and where they end.
_BEGIN, _END = "<!-- generated: containers -->", "<!-- end -->"


def run(markdown: Path | None) -> bool:
    """Examine all files, print the table, and write it into a page.

    Args:
        markdown: The page, which has the two marks between which the tables stand; None: no page.

    Returns:
        Whether everything is right.

    Raises:
        ValueError: The page lacks a mark.
    """
    with tempfile.TemporaryDirectory() as scratch:
        made = [
            examine_made(combination, Path(scratch))
            for combination in track(COMBINATIONS, "generated files", transient=True)
        ]
    found = [examine_found(path) for path in track(found_files(), "other files", transient=True)]
    console = Console()
    for title, findings in (("generated files", made), ("files of others", found)):
        table = Table(*_HEADS, title=title, title_justify="left")
        for finding in findings:
            table.add_row(*_cells(finding))
        console.print(table)
    if not found:
        console.print("files of others: install iscc-samples==0.6.0 to examine its files")
    if markdown is not None:
        markdown.write_text(_filled(markdown.read_text(), made, found))
    return all(finding.is_right for finding in (*made, *found))


def _cells(finding: Finding) -> list[str]:
    return [getattr(finding, column) for column in _COLUMNS]


def _filled(page: str, made: Sequence[Finding], found: Sequence[Finding]) -> str:
    before, begin, rest = page.partition(_BEGIN)
    _, end, after = rest.partition(_END)
    if not begin or not end:
        raise ValueError(f"the page has no place for the tables: {_BEGIN} ... {_END}")
    text = [
        f"Generated files ({len(made)}): 4 s at 25 fps, a tone from 1 s on; `late sound` is a copy "
        f"in which the sound begins {LATE_S:g} s later.",
        _markdown(made),
        f"Files of others ({len(found)}), from the package `iscc-samples` 0.6.0, held against "
        "FFmpeg's decoding of the whole file.",
        _markdown(found),
    ]
    return before + begin + "\n" + "\n\n".join(text) + "\n" + end + after


def _markdown(findings: Sequence[Finding]) -> str:
    rows = [_HEADS, ["---"] * len(_HEADS), *(_cells(finding) for finding in findings)]
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)
