"""Benchmark results: rows that hold stock and plugin side by side, with their spread."""

from __future__ import annotations

import json
import shutil
import statistics
import tempfile
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol, TypeVar

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table


@dataclass(frozen=True)
class Row:
    """One measured quantity.

    Attributes:
        name: What was measured, on what.
        unit: Unit of every number (``s``, ``ms``, ``MiB``, ``count``...).
        stock: Median over the stock runs; None where stock has no such thing.
        plugin: Median over the plugin runs; None where only stock was measured.
        ratio: ``plugin / stock``; None unless both were measured and stock is not 0, and where the
            sides did different work.
        runs: Every single measurement: ``{"stock": [...], "plugin": [...]}``, in run order.
    """

    name: str
    unit: str
    stock: float | None
    plugin: float | None
    ratio: float | None
    runs: dict[str, list[float]]

    @classmethod
    def of(
        cls, name: str, unit: str, *, stock: Sequence[float] = (), plugin: Sequence[float] = ()
    ) -> Row:
        """A row from single runs; a side that was not measured is left empty."""
        stock_median = statistics.median(stock) if stock else None
        plugin_median = statistics.median(plugin) if plugin else None
        ratio = None
        if plugin_median is not None and stock_median:
            ratio = plugin_median / stock_median
        runs = {"stock": [float(v) for v in stock], "plugin": [float(v) for v in plugin]}
        return cls(name, unit, stock_median, plugin_median, ratio, runs)

    def without_ratio(self) -> Row:
        """The row of sides that did different work: a ratio would say nothing."""
        return replace(self, ratio=None)

    def as_dict(self) -> dict[str, Any]:
        """The row as written to JSON: ``{name, unit, stock, plugin, ratio, runs}``."""
        return {
            "name": self.name,
            "unit": self.unit,
            "stock": self.stock,
            "plugin": self.plugin,
            "ratio": self.ratio,
            "runs": self.runs,
        }

    def spread(self, side: str) -> float | None:
        """``(largest - smallest) / median`` of the runs of ``stock`` or ``plugin``.

        None with fewer than two runs, or around a median of 0.
        """
        values = self.runs[side]
        if len(values) < 2 or not (median := statistics.median(values)):
            return None
        return (max(values) - min(values)) / median


@dataclass(frozen=True)
class BenchResult:
    """What a benchmark found.

    Attributes:
        name: Name of the benchmark.
        rows: Its rows, in reading order.
        notes: Sentences printed under the table: settings, sizes, what to look at.
    """

    name: str
    rows: list[Row]
    notes: list[str] = field(default_factory=list)

    def write_json(self, path: Path) -> None:
        """Write the rows as a JSON list; the file appears only when it is complete."""
        path.parent.mkdir(parents=True, exist_ok=True)
        text = json.dumps([row.as_dict() for row in self.rows], indent=1) + "\n"
        with tempfile.NamedTemporaryFile("w", dir=path.parent, delete=False) as scratch:
            scratch.write(text)
        Path(scratch.name).replace(path)

    def table(self) -> Table:
        """Stock, plugin, ratio, and the spread of stock's and the plugin's runs, of every row."""
        table = Table(title=self.name, title_justify="left", expand=True)
        table.add_column("what", ratio=1)
        table.add_column("unit")
        for column in ("stock", "plugin", "ratio"):
            table.add_column(column, justify="right", no_wrap=True)
        table.add_column("spread", justify="right", no_wrap=True, style="dim")
        for row in self.rows:
            table.add_row(
                row.name,
                row.unit,
                format_number(row.stock),
                format_number(row.plugin),
                "-" if row.ratio is None else f"{row.ratio:.3f}x",
                f"{_percent(row.spread('stock'))}, {_percent(row.spread('plugin'))}",
            )
        return table

    def print(self, console: Console) -> None:
        """Print the table and the notes."""
        console.print(self.table())
        for note in self.notes:
            console.print(f"- {note}", highlight=False)


class BenchContext:
    """What a benchmark runs with.

    Attributes:
        repeats: How often each measurement is repeated, at least 1.
        work_dir: Directory for media and logs that outlives the run.
        console: Where progress goes (stderr, so that stdout stays clean for the table).
    """

    def __init__(self, repeats: int, work_dir: Path, console: Console | None = None) -> None:
        if repeats < 1:
            raise ValueError(f"repeats must be at least 1, not {repeats}")
        self.repeats = repeats
        self.work_dir = work_dir
        self.console = console or Console(stderr=True)
        work_dir.mkdir(parents=True, exist_ok=True)

    @contextmanager
    def steps(self, what: str, total: int) -> Iterator[Callable[[str], None]]:
        """A progress bar; call the yielded function with the name of each step as it starts."""
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
        )
        with Progress(*columns, console=self.console) as progress:
            task = progress.add_task(what, total=total)
            started = False

            def begin(name: str) -> None:
                nonlocal started
                progress.update(task, description=f"{what}: {name}", advance=int(started))
                started = True

            yield begin
            progress.update(task, description=what, completed=total)

    @contextmanager
    def scratch(self) -> Iterator[Path]:
        """A directory under ``work_dir`` that goes when the block ends."""
        directory = Path(tempfile.mkdtemp(prefix="run-", dir=self.work_dir))
        try:
            yield directory
        finally:
            shutil.rmtree(directory, ignore_errors=True)


class PartsStudy(Protocol):
    """What the parts of a benchmark run with."""

    notes: list[str]


S = TypeVar("S", bound=PartsStudy)


def run_parts(
    context: BenchContext,
    name: str,
    parts: Mapping[str, Callable[[S], list[Row]]],
    chosen: Collection[str],
    study_of: Callable[[BenchContext, ExitStack], S],
) -> BenchResult:
    """Measure parts of a benchmark, in the order of its table.

    Args:
        context: What to run with.
        name: Of the benchmark.
        parts: All its parts.
        chosen: Names of those to measure.
        study_of: Makes what the parts run with; the stack ends the servers that they share.
    """
    rows: list[Row] = []
    with ExitStack() as servers, context.steps(name, len(set(chosen))) as begin:
        study = study_of(context, servers)
        for part in [part for part in parts if part in chosen]:
            begin(part)
            rows += parts[part](study)
    return BenchResult(name, rows, study.notes)


def percentile(values: Sequence[float], percent: float) -> float:
    """The value below which so many percent of them lie, interpolated."""
    return float(np.percentile(values, percent))


def format_number(value: float | None) -> str:
    """Three significant digits below 100, whole numbers from there on; ``-`` for None."""
    if value is None:
        return "-"
    if abs(value) >= 100 or value == int(value):
        return f"{value:,.0f}"
    return f"{value:.3g}"


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{share:.0%}"
