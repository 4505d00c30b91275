"""``vllm-mm simulate-fleet``: what a fleet would do with several routers in front of it."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NoReturn

import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn
from rich.table import Table

from vllm_mm_ext.planner.workload import VIDEO_FORM, Video, Workload, WorkloadError, read_videos
from vllm_mm_ext.tools.cli.common import output_file
from vllm_mm_ext.tools.cli.plan_start import machine_memory, register_quietly, usual_cores

if TYPE_CHECKING:
    from vllm_mm_ext.fleet.figures import Figure
    from vllm_mm_ext.fleet.side_by_side import Study, TraceFile
    from vllm_mm_ext.fleet.simulation import Fleet
    from vllm_mm_ext.fleet.tally import Tally
    from vllm_mm_ext.fleet.traffic import Traffic

_ROUTINGS = "random,round-robin,session,media-key"
_VIDEO = "60s@1fps:720p"
# What a live session sends at a time.
_LIVE_UNIT = Video(2.0, 1.0, 854, 480)
# Share of the requests that find caches emptier than later ones, and do not count.
_UNMEASURED = 0.1
# Seconds until a replica that died serves again: a large model is loaded meanwhile.
_DOWN_S = 120.0
# Load of a fleet whose caches never help, where no rate is given.
_LOAD = 0.5
_GIB = 1 << 30
# Options of generated requests: a trace says all that they do.
_ASKS = ("requests", "rate", "videos", "zipf", "turns", "think_s", "live_sessions", "write_trace")


def simulate_fleet(
    context: typer.Context,
    model: Annotated[
        str,
        typer.Argument(metavar="MODEL", help="As for `vllm-mm plan`: no weights are needed."),
    ],
    gpu: Annotated[str, typer.Option(help="GPU by name (`h100-80gb`), memory (`24gb`), or `cpu`.")],
    tp: Annotated[int, typer.Option(min=1, help="GPUs that share a replica.")] = 1,
    replicas: Annotated[int, typer.Option(min=1, max=10_000, help="Replicas.")] = 8,
    encoders: Annotated[
        int,
        typer.Option(min=0, max=10_000, help="Encoder instances in front; 0: replicas encode."),
    ] = 0,
    routing: Annotated[
        str,
        typer.Option(
            help="Routers to compare: random, round-robin, session, media-key (requests in flight "
            "bounded as by Envoy), media-key-unbounded."
        ),
    ] = _ROUTINGS,
    video: Annotated[
        list[str] | None,
        typer.Option(
            metavar=VIDEO_FORM,
            help="A kind of video that is asked about, as for `vllm-mm plan`; else `60s@1fps:720p`."
            " Give it again for more, `3x60s` for one that is three times as frequent.",
        ),
    ] = None,
    text: Annotated[int, typer.Option(min=1, help="Tokens of a question, on average.")] = 64,
    out: Annotated[int, typer.Option(min=1, help="Tokens of an answer, on average.")] = 200,
    concurrency: Annotated[
        int, typer.Option(min=1, max=4096, help="Requests at a time on a replica.")
    ] = 16,
    host_tier_gib: Annotated[
        float | None,
        typer.Option(
            min=0, max=4096, help="Host memory for encoder outputs of a replica; else as planned."
        ),
    ] = None,
    requests: Annotated[int, typer.Option(min=10, help="Requests in all.")] = 20_000,
    rate: Annotated[
        float | None,
        typer.Option(
            min=0.001,
            help="Requests a second of all conversations; else half of what replicas could serve "
            "if each was the first one about its video.",
        ),
    ] = None,
    videos: Annotated[
        int | None,
        typer.Option(min=1, max=10_000_000, help="Different videos; else 50 for each replica."),
    ] = None,
    zipf: Annotated[
        float, typer.Option(min=0, max=4, help="How unevenly they are popular; 0: evenly.")
    ] = 0.9,
    turns: Annotated[
        float, typer.Option(min=1, max=1000, help="Turns of a conversation, on average.")
    ] = 4.0,
    think_s: Annotated[
        float, typer.Option(min=0, max=86_400, help="Seconds between turns, on average.")
    ] = 30.0,
    live_sessions: Annotated[
        int, typer.Option(min=0, help="Live sessions at a time: 2 s of video every 2 s.")
    ] = 0,
    failures: Annotated[
        int,
        typer.Option(min=0, max=1000, help="Replicas that die, at random; empty after 2 minutes."),
    ] = 0,
    trace: Annotated[
        Path | None,
        typer.Option(exists=True, dir_okay=False, help="Requests, JSON lines, instead of those."),
    ] = None,
    write_trace: Annotated[
        Path | None, output_file(help="Write the requests here as well.")
    ] = None,
    calibration: Annotated[
        Path | None,
        typer.Option(exists=True, dir_okay=False, help="What `vllm-mm calibrate` wrote there."),
    ] = None,
    price_per_hour: Annotated[
        float | None, typer.Option(min=0, help="Price of a GPU for an hour, in any currency.")
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Of all that is random.")] = 0,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Simulate replicas of MODEL behind several routers: hits, first tokens, load and cost.

    Each replica has the plan that `vllm-mm plan` makes for the longest video, and the policies that
    serve. The first tenth of the requests does not count, but all of a trace does.
    """
    from vllm_mm_ext.fleet.side_by_side import Study, TraceFile, side_by_side
    from vllm_mm_ext.fleet.simulation import random_failures
    from vllm_mm_ext.fleet.traffic import UNIT_S, Traffic
    from vllm_mm_ext.fleet.traffic_file import TraceError

    routings = _routings(routing)
    kinds = _kinds(video)
    recorded = None
    if trace is not None:
        for name in _ASKS:
            if (given := context.get_parameter_source(name)) and given.name != "DEFAULT":
                _fail(f"--trace: --{name.replace('_', '-')} is for generated requests")
        # The last kind is that of units of live sessions.
        recorded = TraceFile(trace, len(kinds) + 1)
    try:
        if recorded is not None:
            requests, seconds = _measure(recorded)
        fleet, source = _fleet(
            model, gpu, tp, replicas, encoders, kinds, text, out, concurrency, calibration
        )
        if host_tier_gib is not None:
            shape = replace(fleet.shape, host_bytes=round(host_tier_gib * _GIB))
            fleet = replace(fleet, shape=shape)
        traffic = Traffic(
            requests=requests,
            rate=rate or _LOAD * replicas / _cold_s(fleet, text),
            videos=videos or 50 * replicas,
            zipf=zipf,
            turns=turns,
            think_s=think_s,
            kinds=len(kinds),
            text=text,
            output=out,
            live=live_sessions,
            seed=seed,
        )
        if recorded is None:
            seconds = requests / (traffic.rate + live_sessions / UNIT_S)
            if write_trace is not None:
                _write(traffic, write_trace)
        study = Study(
            fleet,
            recorded or traffic,
            random_failures(failures, replicas, seconds, _DOWN_S, seed),
            0 if recorded is not None else int(_UNMEASURED * requests),
            seed,
        )
        with _progress(routings, requests) as show:
            tallies = side_by_side(study, routings, show)
    except (OSError, TraceError) as error:
        _fail(str(error))
    _show(study, tallies, source, tp, price_per_hour, requests / seconds, as_json=as_json)


def _routings(names: str) -> list[str]:
    from vllm_mm_ext.fleet.simulated_routers import ROUTERS

    chosen = [name.strip() for name in names.split(",")]
    for name in chosen:
        if name not in ROUTERS:
            _fail(f"--routing {names}: {name!r} is none of {', '.join(ROUTERS)}")
    if len(set(chosen)) < len(chosen):
        _fail(f"--routing {names}: a router is named twice")
    return chosen


def _kinds(specs: Sequence[str] | None) -> tuple[Video, ...]:
    try:
        return tuple(video for spec in specs or [_VIDEO] for video in read_videos([spec]))
    except WorkloadError as error:
        _fail(str(error))


def _fleet(
    model: str,
    gpu: str,
    tp: int,
    replicas: int,
    encoders: int,
    kinds: Sequence[Video],
    text: int,
    out: int,
    concurrency: int,
    calibration: Path | None,
) -> tuple[Fleet, str]:
    """The fleet, and where its costs are from."""
    from vllm_mm_ext.errors import MediaError
    from vllm_mm_ext.fleet.shapes import MediumCosts, ReplicaShape
    from vllm_mm_ext.fleet.simulation import Fleet
    from vllm_mm_ext.planner.gpu_facts import Site, UnknownGpuError, gpu_of
    from vllm_mm_ext.tools.cli.plan_rates import RatesError, chosen_rates

    memory = machine_memory()
    try:
        chosen = gpu_of(gpu, memory)
    except UnknownGpuError as error:
        _fail(str(error))
    if chosen.is_cpu and tp > 1:
        _fail(f"--tp {tp}: on a CPU it must be 1")
    register_quietly()
    from vllm_mm_ext.adapters.planning.loading import CannotPlanError
    from vllm_mm_ext.adapters.planning.planner import Planner, Wishes
    from vllm_mm_ext.planner.model_folder import ModelFilesError

    try:
        planner = Planner(model)
        workloads = [
            Workload(videos=(each,), text=text, output=out, concurrency=concurrency)
            for each in (*kinds, _LIVE_UNIT)
        ]
        site = Site(
            gpu=chosen,
            tp=tp,
            dp=1,
            host_memory=None,
            cores=usual_cores(chosen),
            process_bytes=planner.process_bytes_on(chosen),
        )
        plans = [planner.plan(each, site, Wishes()) for each in workloads[: len(kinds)]]
        plan = max(plans, key=lambda each: each.request.prompt)
        if not plan.fits:
            _fail(f"a replica cannot be planned: {'; '.join(plan.problems())}")
        rates = chosen_rates(plan, model, calibration)
        if rates is None:
            _fail(f"--gpu {gpu}: nothing tells what work costs there; give --calibration")
        counted = [planner.counter.request(each, plan.delivery) for each in workloads]
    except (CannotPlanError, ModelFilesError, MediaError, RatesError) as error:
        _fail(str(error))
    costs, source = rates
    media = tuple(
        MediumCosts.of(planner.facts, each, request, costs.middle)
        for each, request in zip(workloads, counted, strict=True)
    )
    return Fleet(ReplicaShape.of(plan, costs.middle), media, replicas, encoders), source


def _cold_s(fleet: Fleet, text: int) -> float:
    """Seconds of a replica that a first turn takes, on average over the kinds of videos."""
    shape, total = fleet.shape, 0.0
    step = shape.rates.step
    videos = fleet.kinds[:-1]
    for kind in videos:
        tokens = kind.tokens + text
        engine = kind.encode_s + step.prefill * tokens + step.pairs * tokens**2 / 2
        engine += step.step + step.prompts + step.encodes
        total += max(engine, kind.decode_s / shape.decode_workers, kind.preprocess_s)
    return total / len(videos)


def _measure(trace: TraceFile) -> tuple[int, float]:
    """Number of requests of a trace, and its seconds."""
    count, seconds = 0, 0.0
    for ask in trace.asks():
        count, seconds = count + 1, ask.at
    if not count:
        _fail(f"--trace {trace.file}: it has no requests")
    return count, max(seconds, 1e-3)


def _write(traffic: Traffic, file: Path) -> None:
    from vllm_mm_ext.fleet.traffic_file import write_trace

    for _ in write_trace(traffic.asks(), file):
        pass


@contextmanager
def _progress(routings: Sequence[str], requests: int) -> Iterator[Callable[[Sequence[int]], None]]:
    """Bars on stderr, one for each router."""
    columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn())
    console = Console(stderr=True)
    with Progress(*columns, TimeRemainingColumn(), console=console, transient=True) as bars:
        tasks = [bars.add_task(name, total=requests) for name in routings]

        def show(sent: Sequence[int]) -> None:
            for task, count in zip(tasks, sent, strict=True):
                bars.update(task, completed=count)

        yield show


def _show(
    study: Study,
    tallies: Sequence[Tally],
    source: str,
    tp: int,
    price: float | None,
    rate: float,
    *,
    as_json: bool,
) -> None:
    from vllm_mm_ext.fleet.figures import figures, keeps_up

    found = {tally.routing: figures(tally, tp, price) for tally in tallies}
    fleet = study.fleet
    behind = [tally.routing for tally in tallies if not keeps_up(tally)]
    if as_json:
        routings = {
            name: {figure.name: figure.value for figure in of_routing}
            for name, of_routing in found.items()
        }
        report = {
            "replicas": fleet.replicas,
            "encoders": fleet.encoders,
            "requests_per_s": rate,
            "costs": source,
            "behind": behind,
            "routings": routings,
        }
        typer.echo(json.dumps(report, indent=1))
        return
    console = Console()
    console.print(_table(found))
    kinds = ", ".join(f"{kind.tokens:,}" for kind in fleet.kinds[:-1])
    console.print(
        f"{fleet.replicas:,} replicas, {fleet.encoders:,} encoder instances, {rate:,.3g} requests "
        f"a second; videos of {kinds} tokens; costs {source}.",
        highlight=False,
        style="dim",
    )
    if behind:
        console.print(
            f"[yellow]With {', '.join(behind)} the fleet does not keep up: waits grow as long as "
            "the load lasts.[/]"
        )


def _table(found: Mapping[str, Sequence[Figure]]) -> Table:
    table = Table(title="simulated fleet", title_justify="left")
    table.add_column("")
    for name in found:
        table.add_column(name, justify="right")
    # Not every figure is there for each router.
    rows = dict.fromkeys(figure.name for of_one in found.values() for figure in of_one)
    for name in rows:
        values = [
            next((_text(figure) for figure in of_one if figure.name == name), "-")
            for of_one in found.values()
        ]
        table.add_row(name, *values)
    return table


def _text(figure: Figure) -> str:
    value = figure.value
    if figure.unit == "share":
        return f"{value:.1%}"
    if figure.unit == "count":
        return f"{value:,.0f}"
    return f"{value:,.3g} {figure.unit}".rstrip()


def _fail(message: str) -> NoReturn:
    console = Console(stderr=True)
    console.print(f"[red]cannot simulate:[/] {escape(message)}", highlight=False, soft_wrap=True)
    raise typer.Exit(2)
