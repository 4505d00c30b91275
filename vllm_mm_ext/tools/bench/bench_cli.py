"""``vllm-mm bench``: one subcommand per registered benchmark, and ``list``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer
from rich.console import Console
from rich.table import Table

from vllm_mm_ext.testing.checkpoints import cache_root
from vllm_mm_ext.tools.bench.commands import (
    BENCHMARKS,
    AccessKind,
    Benchmark,
    FleetPart,
    LivePart,
    LongVideoPart,
    TrafficKind,
)
from vllm_mm_ext.tools.bench.harness import BenchContext, BenchResult
from vllm_mm_ext.tools.cli.common import output_file, writing

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


_Json = Annotated[
    Path | None, output_file("--json", help="Write the rows to this file.", folder_is_made=True)
]
_WorkDir = Annotated[Path | None, typer.Option(help="Where generated media is kept between runs.")]


def _add(benchmark: Benchmark) -> None:
    def once(json: _Json = None, work_dir: _WorkDir = None) -> None:
        _show(benchmark.load()(_context(1, work_dir)), json)

    def repeated(
        json: _Json = None,
        repeats: Annotated[
            int, typer.Option(min=1, help="Repeats of each measurement.")
        ] = benchmark.repeats,
        work_dir: _WorkDir = None,
    ) -> None:
        _show(benchmark.load()(_context(repeats, work_dir)), json)

    command = repeated if benchmark.repeatable else once
    app.command(benchmark.name, help=benchmark.shows)(command)


def _context(repeats: int, work_dir: Path | None) -> BenchContext:
    return BenchContext(repeats, work_dir or cache_root() / "bench")


def _show(result: BenchResult, json: Path | None) -> None:
    result.print(Console())
    if json is not None:
        with writing(json):
            result.write_json(json)


@app.command("soak", help=BENCHMARKS["soak"].shows)
def soak(
    minutes: Annotated[float, typer.Option(min=0.1, help="Minutes of work for each server.")] = 5.0,
    caches: Annotated[
        Literal["tiny", "default"], typer.Option(help="How large the caches are.")
    ] = "tiny",
    clients: Annotated[int, typer.Option(min=1, help="Conversations at a time.")] = 6,
    seed: Annotated[int, typer.Option(help="Of the work.")] = 0,
    stock: Annotated[bool, typer.Option(help="Give stock vLLM the same work first.")] = True,
    series: Annotated[
        Path | None, output_file(help="Write every sample to this file, a JSON object a line.")
    ] = None,
    json: _Json = None,
    work_dir: _WorkDir = None,
) -> None:
    """Of the benchmarks with options of their own."""
    from vllm_mm_ext.tools.bench.soak import run

    result = run(
        _context(1, work_dir),
        minutes=minutes,
        caches=caches,
        clients=clients,
        seed=seed,
        stock=stock,
        series=series,
    )
    _show(result, json)


@app.command("waiting", help=BENCHMARKS["waiting"].shows)
def waiting(
    requests: Annotated[int, typer.Option(min=1, help="Requests at once.")] = 200,
    mb: Annotated[int, typer.Option(min=2, max=2048, help="MiB of each video's file.")] = 50,
    budget_mb: Annotated[int, typer.Option(min=16, help="The plugin's media budget, MiB.")] = 1024,
    stock: Annotated[bool, typer.Option(help="Give stock vLLM the same requests first.")] = True,
    json: _Json = None,
    work_dir: _WorkDir = None,
) -> None:
    """Of the benchmarks with options of their own."""
    from vllm_mm_ext.tools.bench.waiting import run

    context = _context(1, work_dir)
    _show(run(context, requests=requests, mb=mb, budget_mb=budget_mb, stock=stock), json)


@app.command("containers")
def containers(
    markdown: Annotated[
        Path | None,
        typer.Option(exists=True, dir_okay=False, help="Page to write the tables into."),
    ] = None,
) -> None:
    """Containers and codecs, generated and of others: what of each file comes out right."""
    from vllm_mm_ext.tools.bench.containers_page import run

    if not run(markdown):
        raise typer.Exit(1)


@app.command("sampling", help=BENCHMARKS["sampling"].shows)
def sampling(
    files: Annotated[
        list[Path] | None,
        typer.Argument(help="With --footage: videos instead of those of the installed packages."),
    ] = None,
    footage: Annotated[
        bool,
        typer.Option("--footage", help="How well the chosen frames stand for real footage."),
    ] = False,
    json: _Json = None,
    repeats: Annotated[
        int | None, typer.Option(min=1, help="Repeats, else 1; not with --footage.")
    ] = None,
    work_dir: _WorkDir = None,
) -> None:
    """Of the benchmarks with options of their own."""
    from vllm_mm_ext.tools.bench import footage as on_footage

    if footage and repeats is not None:
        raise typer.BadParameter("--footage measures once: --repeats is not for it")
    context = _context(repeats or 1, work_dir)
    if footage:
        _show(on_footage.run(context, files or ()), json)
    elif files:
        raise typer.BadParameter("files are for --footage")
    else:
        _show(BENCHMARKS["sampling"].load()(context), json)


@app.command("long-video", help=BENCHMARKS["long-video"].shows)
def long_video(
    minutes: Annotated[
        list[int] | None,
        typer.Option(min=1, max=240, help="Length of the recordings; may be given several times."),
    ] = None,
    part: Annotated[
        list[LongVideoPart] | None,
        typer.Option(help="What to measure, all by default; may be given several times."),
    ] = None,
    questions: Annotated[int, typer.Option(min=1, help="About each recording, at most.")] = 16,
    rolling: Annotated[
        bool, typer.Option("--rolling", help="Right answers of the strategy `rolling` too.")
    ] = False,
    json: _Json = None,
    repeats: Annotated[int, typer.Option(min=1, help="Recordings of each measurement.")] = 1,
    work_dir: _WorkDir = None,
) -> None:
    """Of the benchmarks with options of their own."""
    from vllm_mm_ext.tools.bench.long_video_bench import PARTS, run

    result = run(
        _context(repeats, work_dir),
        minutes=minutes or [10],
        parts=part or list(PARTS),
        questions=questions,
        rolling=rolling,
    )
    _show(result, json)


@app.command("live", help=BENCHMARKS["live"].shows)
def live(
    part: Annotated[
        list[LivePart] | None,
        typer.Option(
            help="What to measure, by default all but `hour`; may be given several times."
        ),
    ] = None,
    json: _Json = None,
    repeats: Annotated[int, typer.Option(min=1, help="Repeats of each measurement.")] = 1,
    work_dir: _WorkDir = None,
) -> None:
    """Of the benchmarks with options of their own."""
    from vllm_mm_ext.tools.bench.live_bench import run

    parts = part or [one for one in LivePart if one is not LivePart.hour]
    _show(run(_context(repeats, work_dir), parts=parts), json)


@app.command("fleet", help=BENCHMARKS["fleet"].shows)
def fleet(
    part: Annotated[
        list[FleetPart] | None,
        typer.Option(help="What to measure, all by default; may be given several times."),
    ] = None,
    json: _Json = None,
    repeats: Annotated[int, typer.Option(min=1, help="Repeats of each measurement.")] = 1,
    work_dir: _WorkDir = None,
) -> None:
    """Of the benchmarks with options of their own."""
    from vllm_mm_ext.tools.bench.fleet_bench import run

    _show(run(_context(repeats, work_dir), parts=part or list(FleetPart)), json)


@app.command("kv-replay", help=BENCHMARKS["kv-replay"].shows)
def kv_replay(
    kind: Annotated[
        list[AccessKind] | None,
        typer.Option(help="Traces of the repository, by default all; may be given several times."),
    ] = None,
    trace: Annotated[
        list[Path] | None,
        typer.Option(exists=True, dir_okay=False, help="Traces in files, instead of those."),
    ] = None,
    room: Annotated[
        list[float] | None,
        typer.Option(min=0.01, help="Sizes of the pools, as shares of the working set."),
    ] = None,
    encoded: Annotated[
        bool, typer.Option("--encoded", help="Encoder outputs are held: KV saves prefill only.")
    ] = False,
    record: Annotated[
        Path | None,
        typer.Option(file_okay=False, help="Record traces of an engine into this folder, and end."),
    ] = None,
    seeds: Annotated[
        int, typer.Option(min=0, help="Generated traces of each kind besides, without an engine.")
    ] = 0,
    seed: Annotated[int, typer.Option(help="Of the first one; with --record, of all.")] = 0,
    ablate: Annotated[
        bool, typer.Option("--ablate", help="Change each rule and constant: what it gains.")
    ] = False,
    side: Annotated[
        Literal["stock", "plugin"], typer.Option(help="With --record: the engine.")
    ] = "plugin",
    json: _Json = None,
    work_dir: _WorkDir = None,
) -> None:
    """Of the benchmarks with options of their own."""
    from vllm_mm_ext.tools.bench import kv_replay as on_traces

    context, kinds = _context(1, work_dir), kind or list(AccessKind)
    if record is not None:
        on_traces.record(context, record, kinds=kinds, seed=seed, side=side)
        return
    result = on_traces.run(
        context,
        kinds=kinds,
        traces=trace or (),
        rooms=room or on_traces.ROOMS,
        encoded=encoded,
        seeds=range(seed, seed + seeds),
        ablate=ablate,
    )
    _show(result, json)


@app.command("scheduler", help=BENCHMARKS["scheduler"].shows)
def scheduler(
    seeds: Annotated[int, typer.Option(min=1, help="Traces of each kind of traffic.")] = 20,
    kind: Annotated[
        list[TrafficKind] | None,
        typer.Option(help="Traffic, all kinds by default; may be given several times."),
    ] = None,
    trace: Annotated[
        Path | None,
        typer.Option(exists=True, dir_okay=False, help="Serve this trace instead."),
    ] = None,
    item_tokens: Annotated[
        int, typer.Option(min=1, help="Tokens of the items that the plugin makes of videos.")
    ] = 64,
    ablate: Annotated[
        bool, typer.Option("--ablate", help="Switch each rule off: what it gains.")
    ] = False,
    costs: Annotated[
        Path | None,
        typer.Option(exists=True, dir_okay=False, help="What steps cost, from --measure."),
    ] = None,
    measure: Annotated[
        Path | None,
        output_file(
            help="Measure what steps cost on a real engine, write it here, and end.",
            folder_is_made=True,
        ),
    ] = None,
    json: _Json = None,
    work_dir: _WorkDir = None,
) -> None:
    """Of the benchmarks with options of their own."""
    from vllm_mm_ext.tools.bench import scheduler_bench, scheduler_costs

    context = _context(1, work_dir)
    if measure is not None:
        scheduler_costs.measure(context.work_dir, measure)
        return
    try:
        result = scheduler_bench.run(
            context,
            seeds=seeds,
            kinds=kind or list(TrafficKind),
            trace=trace,
            costs=costs or scheduler_costs.MEASURED,
            item_tokens=item_tokens,
            ablate=ablate,
        )
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error
    _show(result, json)


@app.command("plan-memory", help=BENCHMARKS["plan-memory"].shows)
def plan_memory(
    seed: Annotated[int, typer.Option(help="Of the first workload.")] = 0,
    workloads: Annotated[int, typer.Option(min=1, help="How many.")] = 20,
    json: _Json = None,
    work_dir: _WorkDir = None,
) -> None:
    """Of the benchmarks with options of their own."""
    from vllm_mm_ext.tools.bench.plan_memory import run

    _show(run(_context(1, work_dir), seed=seed, count=workloads), json)


@app.command("plan-estimates", help=BENCHMARKS["plan-estimates"].shows)
def plan_estimates(
    seed: Annotated[int, typer.Option(help="Of the workloads.")] = 0,
    workloads: Annotated[int, typer.Option(min=2, help="How many.")] = 20,
    family: Annotated[
        str, typer.Option(help="Family of the tiny model that is served.")
    ] = "qwen2_5_omni",
    json: _Json = None,
    work_dir: _WorkDir = None,
) -> None:
    """Of the benchmarks with options of their own."""
    from vllm_mm_ext.tools.bench.plan_estimates import run

    _show(run(_context(1, work_dir), seed=seed, count=workloads, family=family), json)


_WITH_OPTIONS = frozenset(
    (
        "fleet",
        "kv-replay",
        "live",
        "long-video",
        "plan-estimates",
        "plan-memory",
        "sampling",
        "scheduler",
        "soak",
        "waiting",
    )
)
for _benchmark in BENCHMARKS.values():
    if _benchmark.name not in _WITH_OPTIONS:
        _add(_benchmark)
