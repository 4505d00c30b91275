"""``vllm-mm plan``: what a model and a workload need on a GPU, and the ``--config`` file for it."""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer
from rich.console import Console
from rich.markup import escape

from vllm_mm_ext.config.options import Reduction
from vllm_mm_ext.errors import MediaError
from vllm_mm_ext.planner.workload import (
    AUDIO_FORM,
    IMAGE_FORM,
    VIDEO_FORM,
    Workload,
    read_audios,
    read_images,
    read_videos,
)
from vllm_mm_ext.tools.cli.common import output_file, writing
from vllm_mm_ext.tools.cli.plan_start import machine_memory, register_quietly, usual_cores

if TYPE_CHECKING:
    from vllm_mm_ext.adapters.planning.planner import Planner
    from vllm_mm_ext.planner.levers import Lever
    from vllm_mm_ext.planner.plan import Plan
    from vllm_mm_ext.planner.rates import Rates
    from vllm_mm_ext.tools.cli.plan_tables import Expected

# Options with a value that change nothing in the written file.
_NOT_OF_THE_FILE = ("--name", "--calibration", "--price-per-hour")
_SIZES = "240p ... 2160p or WIDTHxHEIGHT"


def plan(
    model: Annotated[
        str,
        typer.Argument(
            metavar="MODEL",
            help="Folder with a model's files (no weights needed), its config.json, or a name on "
            "the Hugging Face hub.",
        ),
    ],
    gpu: Annotated[
        str,
        typer.Option(help="GPU by name (`h100-80gb`), memory (`24gb`), or `cpu`."),
    ],
    tp: Annotated[int, typer.Option(min=1, help="GPUs that share a replica.")] = 1,
    dp: Annotated[int, typer.Option(min=1, help="Replicas.")] = 1,
    video: Annotated[
        list[str] | None,
        typer.Option(
            metavar=VIDEO_FORM,
            help=f"A video of each request, `60s@2fps:720p`: its length, the frames a second that "
            f"the model sees (else 1), its size ({_SIZES}; else 720p), frame rate (else 30fps), "
            "bit rate, codec, and `silent`. Give it again for more.",
        ),
    ] = None,
    audio: Annotated[
        list[str] | None,
        typer.Option(metavar=AUDIO_FORM, help="A sound of each request, `30s`."),
    ] = None,
    image: Annotated[
        list[str] | None,
        typer.Option(metavar=IMAGE_FORM, help=f"Images of each request, `2:720p` ({_SIZES})."),
    ] = None,
    text: Annotated[int, typer.Option(min=0, help="Tokens of the question.")] = 128,
    out: Annotated[int, typer.Option(min=1, help="Tokens of the answer.")] = 256,
    concurrency: Annotated[
        int, typer.Option(min=1, help="Requests at a time, on all replicas together.")
    ] = 1,
    reduction: Annotated[
        str | None,
        typer.Option(
            help="Token reduction of videos, `pool=2,temporal=2`, `static=merge,keep=0.5`, or "
            "`none`; else the checkpoint's own."
        ),
    ] = None,
    context: Annotated[
        int | None, typer.Option(min=1, help="`--max-model-len`; else what is needed.")
    ] = None,
    max_frames: Annotated[
        int | None, typer.Option(min=1, max=4096, help="Most frames of a video.")
    ] = None,
    resolution: Annotated[
        int | None,
        typer.Option(min=28, max=8192, help="A frame has at most this many pixels squared."),
    ] = None,
    mm_processor_kwargs: Annotated[
        str | None, typer.Option(help="vLLM's flag of that name, JSON.")
    ] = None,
    cores: Annotated[
        int | None,
        typer.Option(min=1, help="CPU cores of the server; else 16, with `cpu` this machine's."),
    ] = None,
    host_gib: Annotated[
        int | None,
        typer.Option(min=1, help="GiB of its memory; else not checked, with `cpu` this machine's."),
    ] = None,
    name: Annotated[
        str | None,
        typer.Option(help="Name under which the model is served, if MODEL is a copy of its files."),
    ] = None,
    calibration: Annotated[
        Path | None,
        typer.Option(exists=True, dir_okay=False, help="What `vllm-mm calibrate` wrote there."),
    ] = None,
    estimate: Annotated[
        bool,
        typer.Option(help="Estimate first tokens and throughput, which takes some seconds."),
    ] = True,
    price_per_hour: Annotated[
        float | None, typer.Option(min=0, help="Price of a GPU for an hour, in any currency.")
    ] = None,
    yaml: Annotated[
        Path | None, output_file(help="Write the `--config` file of `vllm serve` here.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Plan a server: tokens, KV blocks, memory and settings of MODEL under a workload.

    Exits with 1 if the workload does not fit, after saying which changes make it fit.
    """
    from vllm_mm_ext.planner.gpu_facts import GIB, Site, UnknownGpuError, gpu_of
    from vllm_mm_ext.planner.workload import WorkloadError

    host_memory = machine_memory()
    try:
        chosen = gpu_of(gpu, host_memory)
        workload = Workload(
            videos=read_videos(video or ()),
            audios=read_audios(audio or ()),
            images=read_images(image or ()),
            text=text,
            output=out,
            concurrency=concurrency,
        )
        reduce = None if reduction is None else _reduction(reduction)
        kwargs = _mapping(mm_processor_kwargs)
    except (WorkloadError, UnknownGpuError) as error:
        _fail(str(error))
    host = host_gib * GIB if host_gib else host_memory if chosen.is_cpu else None
    if chosen.is_cpu and (tp > 1 or dp > 1):
        _fail(f"--tp {tp} --dp {dp}: on a CPU both must be 1")
    register_quietly()
    from vllm_mm_ext.adapters.planning.loading import CannotPlanError
    from vllm_mm_ext.adapters.planning.planner import Planner, Wishes
    from vllm_mm_ext.planner.model_folder import ModelFilesError

    try:
        planner = Planner(model, name=name, mm_processor_kwargs=kwargs)
        site = Site(
            gpu=chosen,
            tp=tp,
            dp=dp,
            host_memory=host,
            cores=cores or usual_cores(chosen),
            process_bytes=planner.process_bytes_on(chosen),
        )
        made = planner.plan(workload, site, Wishes(context, max_frames, resolution, reduce))
        found = () if made.fits else planner.levers(made)
        expected = (
            _expected(planner, model, made, calibration, price_per_hour) if estimate else None
        )
    except (CannotPlanError, ModelFilesError, MediaError) as error:
        _fail(str(error))
    _show(planner, made, found, expected, _command(model, name), yaml, as_json=as_json)


def _expected(
    planner: Planner, model: str, made: Plan, calibration: Path | None, price: float | None
) -> Expected | None:
    """What clients see, and where that is from; None where nothing tells what work costs."""
    from vllm_mm_ext.adapters.planning.estimates import estimate_plan
    from vllm_mm_ext.planner.estimate import follow_up_s
    from vllm_mm_ext.planner.host_work import host_work
    from vllm_mm_ext.tools.cli.plan_rates import RatesError, chosen_rates
    from vllm_mm_ext.tools.cli.plan_tables import Expected

    try:
        chosen = chosen_rates(made, model, calibration)
    except RatesError as error:
        _fail(str(error))
    if chosen is None:
        return None
    rates, source = chosen
    if not made.fits:
        return None
    found = estimate_plan(planner.loaded.config, made, rates)
    per_hour = None if price is None else price * made.site.tp * made.site.dp
    work = host_work(made.workload, made.request)

    def at_each(seconds: Callable[[Rates], float]) -> tuple[float, float, float]:
        return seconds(rates.low), seconds(rates.middle), seconds(rates.high)

    return Expected(
        found,
        source,
        per_hour,
        decode_s=at_each(
            lambda each: sum(
                one.probe_s(each.host) + one.decode_s(each.host) * each.host.decode_threads
                for one in work
            )
        ),
        follow_up_s=at_each(lambda each: follow_up_s(work, made.request, each)),
    )


def _command(model: str, name: str | None) -> str:
    """The command line, as it is for who has the model under its name."""
    words, given = [], iter(sys.argv[1:])
    for word in given:
        option, equals, _ = word.partition("=")
        if option in _NOT_OF_THE_FILE:
            if not equals:
                next(given, None)
        elif word not in ("--estimate", "--no-estimate", "--json"):
            words.append(name if name is not None and word == model else word)
    return f"vllm-mm {shlex.join(words)}"


def _show(
    planner: Planner,
    made: Plan,
    found: Sequence[Lever],
    expected: Expected | None,
    command: str,
    yaml: Path | None,
    *,
    as_json: bool,
) -> None:
    from vllm_mm_ext.planner.plan_yaml import plan_yaml, serve_command
    from vllm_mm_ext.tools.cli.plan_tables import as_dict, show_plan

    if as_json:
        typer.echo(json.dumps(as_dict(made, found, expected), indent=1))
    else:
        show_plan(Console(), made, found, expected)
    if yaml is not None and made.fits:
        text = plan_yaml(
            made,
            command=command,
            file_name=str(yaml),
            mm_processor_kwargs=planner.mm_processor_kwargs,
        )
        with writing(yaml):
            yaml.write_text(text, encoding="utf-8")
        typer.echo(f"{yaml}: start it with", err=True)
        typer.echo(f"  {serve_command(made, str(yaml))}", err=True)
    if not made.fits:
        if yaml is not None:
            typer.echo(f"{yaml} was not written: the workload does not fit", err=True)
        raise typer.Exit(1)


def _reduction(text: str) -> Reduction:
    """The reduction that ``--reduction`` names."""
    from pydantic import ValidationError

    given: dict[str, Any] = {}
    for part in () if text in ("", "none") else text.split(","):
        key, equals, value = part.partition("=")
        if key not in Reduction.model_fields or not equals:
            names = ", ".join(Reduction.model_fields)
            _fail(f"--reduction {text}: {part!r} is not KEY=VALUE with one of the keys {names}")
        given[key] = value
    try:
        return Reduction(**given)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(map(str, first["loc"])) or "reduction"
        _fail(f"--reduction {text}: {key}: {first['msg']}")


def _mapping(text: str | None) -> dict[str, Any]:
    if text is None:
        return {}
    try:
        found = json.loads(text)
    except ValueError as error:
        _fail(f"--mm-processor-kwargs {text}: not JSON: {error}")
    if not isinstance(found, dict):
        _fail(f"--mm-processor-kwargs {text}: a JSON object such as '{{\"max_pixels\": 200704}}'")
    return found


def _fail(message: str) -> NoReturn:
    console = Console(stderr=True)
    console.print(f"[red]cannot plan:[/] {escape(message)}", highlight=False, soft_wrap=True)
    raise typer.Exit(2)
