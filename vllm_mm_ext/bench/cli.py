"""``vllm-mm bench``: one subcommand per registered benchmark, and ``list``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from vllm_mm_ext.bench.harness import BenchContext
from vllm_mm_ext.bench.registry import BENCHMARKS, Benchmark
from vllm_mm_ext.testing.checkpoints import cache_root

app = typer.Typer(
    help="Benchmarks of the plugin against stock vLLM, on the same inputs in the same run.",
    no_args_is_help=True,
    pretty_exceptions_show_locals=False,
)


@app.command("list")
def list_benchmarks() -> None:
    """Name every benchmark with what it shows."""
    table = Table(box=None, show_header=False)
    for benchmark in BENCHMARKS.values():
        table.add_row(f"[bold]{benchmark.name}[/]", benchmark.shows)
    Console().print(table)


def _add(benchmark: Benchmark) -> None:
    def command(
        json: Annotated[
            Path | None, typer.Option("--json", help="Write the rows to this file.")
        ] = None,
        repeats: Annotated[
            int, typer.Option(min=1, help="Repeats of each measurement.")
        ] = benchmark.repeats,
        work_dir: Annotated[
            Path | None,
            typer.Option(help="Where generated media is kept between runs."),
        ] = None,
    ) -> None:
        context = BenchContext(repeats, work_dir or cache_root() / "bench")
        result = benchmark.load()(context)
        result.print(Console())
        if json is not None:
            result.write_json(json)

    app.command(benchmark.name, help=benchmark.shows)(command)


for _benchmark in BENCHMARKS.values():
    _add(_benchmark)
