"""``vllm-mm``: the command line. Commands load what they need only when they are called."""

from __future__ import annotations

from typing import Annotated

import typer

from vllm_mm_ext.tools.cli.calibrate import calibrate
from vllm_mm_ext.tools.cli.demo import demo
from vllm_mm_ext.tools.cli.describe import describe
from vllm_mm_ext.tools.cli.fleet_command import fleet
from vllm_mm_ext.tools.cli.inspect import inspect
from vllm_mm_ext.tools.cli.live_session import live
from vllm_mm_ext.tools.cli.plan_command import plan
from vllm_mm_ext.tools.cli.route_key_command import route_key
from vllm_mm_ext.tools.cli.sample import sample
from vllm_mm_ext.tools.cli.simulate_fleet import simulate_fleet
from vllm_mm_ext.tools.cli.top import top

app = typer.Typer(
    help="Tools for video and audio serving with vLLM.",
    no_args_is_help=True,
    pretty_exceptions_show_locals=False,
)
app.command()(sample)
app.command()(inspect)
app.command()(demo)
app.command()(fleet)
app.command()(describe)
app.command()(live)
app.command()(top)
app.command()(plan)
app.command()(calibrate)
app.command()(simulate_fleet)
app.command()(route_key)


@app.command()
def doctor(
    patches: Annotated[
        bool, typer.Option("--patches", help="Print what the plugin changes in vLLM instead.")
    ] = False,
) -> None:
    """Report what is installed, which hooks are active and what was degraded."""
    from vllm_mm_ext.tools.cli.doctor import doctor as run

    run(patches)


@app.command()
def config(
    markdown: Annotated[
        bool, typer.Option("--markdown", help="Print docs/configuration.md instead of a table.")
    ] = False,
) -> None:
    """Print every setting of the plugin with what it accepts, its default and its meaning."""
    from vllm_mm_ext.config.root import KEY, MMExtConfig, to_markdown

    if markdown:
        typer.echo(to_markdown(), nl=False)
        return
    from rich.console import Console
    from rich.table import Column, Table

    from vllm_mm_ext.config.schema import describe_type, iter_fields, shown_default

    table = Table(Column("key", overflow="fold"), "accepts", "default", "meaning")
    for path, _, leaves in iter_fields(MMExtConfig, KEY):
        for name, field in leaves:
            key = f"{path}.{name}"
            table.add_row(key, describe_type(field), shown_default(field), field.description)
    Console().print(table)


@app.command(
    add_help_option=False,
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True},
)
def bench(ctx: typer.Context) -> None:
    """Benchmarks of the plugin against stock vLLM; `bench list` names them."""
    from vllm_mm_ext.tools.bench.bench_cli import app as bench_app

    bench_app(args=ctx.args, prog_name="vllm-mm bench")
