"""``vllm-mm``: the command line. Commands load what they need only when they are called."""

from __future__ import annotations

import typer

from vllm_mm_ext.cli.inspect import inspect
from vllm_mm_ext.cli.sample import sample

app = typer.Typer(
    help="Tools for video and audio serving with vLLM.",
    no_args_is_help=True,
    pretty_exceptions_show_locals=False,
)
app.command()(sample)
app.command()(inspect)


@app.command()
def doctor() -> None:
    """Report what is installed, which hooks are active and what was degraded."""
    from vllm_mm_ext.cli.doctor import doctor as run

    run()


@app.command(
    add_help_option=False,
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True},
)
def bench(ctx: typer.Context) -> None:
    """Benchmarks of the plugin against stock vLLM; `bench list` names them."""
    from vllm_mm_ext.bench.cli import app as bench_app

    bench_app(args=ctx.args, prog_name="vllm-mm bench")
