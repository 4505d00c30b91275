"""``vllm-mm calibrate``: measures what work costs on this machine, for ``vllm-mm plan``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from vllm_mm_ext.tools.cli.common import output_file, writing

if TYPE_CHECKING:
    from vllm_mm_ext.planner.calibration_file import Calibration

# What the table shows of the rates: unit, and how many of the rate's own units make one.
_STEP_ROWS = {
    "step": ("a step", 1.0),
    "decodes": ("a request that decodes", 1.0),
    "decode_context": ("1,000 tokens that it attends to", 1e3),
    "prefill": ("1,000 tokens of a prompt", 1e3),
    "vision": ("1,000 patches encoded", 1e3),
    "audio": ("1,000 positions of sound encoded", 1e3),
    "inputs": ("1,000 patches or positions handed to workers", 1e3),
}
# Share of steps held up from which on the machine was too busy to be measured.
_BUSY = 0.2
_HOST_ROWS = {
    "request": ("a request, API server", 1.0),
    "cached_medium": ("a video or sound in caches, API server", 1.0),
    "token": ("1,000 tokens of answers, API server", 1e3),
    "preprocess_input": ("1,000 patches preprocessed", 1e3),
}


def calibrate(
    model: Annotated[
        str, typer.Argument(metavar="MODEL", help="Folder of a model, or a name on the hub.")
    ],
    out: Annotated[Path, output_file(help="The file to write.", folder_is_made=True)] = Path(
        "calibration.json"
    ),
    config: Annotated[
        Path | None,
        typer.Option(
            exists=True,
            dir_okay=False,
            help="`--config` file that the model will be served with, as `vllm-mm plan` writes it.",
        ),
    ] = None,
    work_dir: Annotated[
        Path | None, typer.Option(help="Where generated media is kept between runs.")
    ] = None,
) -> None:
    """Serve MODEL on this machine for a minute or two and measure encoder, prefill and decode.

    The machine should have nothing else to do. `vllm-mm plan --calibration FILE` reads the file.
    """
    import aiohttp

    from vllm_mm_ext.planner.calibration_file import write
    from vllm_mm_ext.planner.model_folder import ModelFilesError
    from vllm_mm_ext.testing.checkpoints import cache_root
    from vllm_mm_ext.testing.named_model import on_cpu
    from vllm_mm_ext.testing.server import may_download
    from vllm_mm_ext.tools.calibration import calibrating

    folder = work_dir or cache_root() / "bench"
    try:
        setting = (
            calibrating.Setting.usual(is_cpu=on_cpu())
            if config is None
            else calibrating.Setting.of(config)
        )
        found = calibrating.calibrate(model, folder, setting, may_download())
    except (ModelFilesError, ValueError, RuntimeError, OSError, aiohttp.ClientError) as error:
        # The server did not come up, refused a request, broke off, or was too slow.
        told = escape(str(error) or type(error).__name__)
        Console(stderr=True).print(f"[red]cannot calibrate:[/] {told}", highlight=False)
        raise typer.Exit(1) from None
    console = Console()
    console.print(_table(found))
    with writing(out):
        write(found, out)
    console.print(
        f"{found.steps} steps measured, {found.held_up:.0%} of them held up by something else; "
        f"half of the others are within {found.step_error:.0%} of what these add up to. Written "
        f"to {out}",
        highlight=False,
    )
    if found.held_up > _BUSY:
        console.print("[yellow]The machine had other things to do: repeat when it has not.[/]")


def _table(found: Calibration) -> Table:
    table = Table(title=f"{found.model} on {found.device}, {found.machine}", title_justify="left")
    table.add_column("what")
    for column in ("ms", "range"):
        table.add_column(column, justify="right")
    low, middle, high = found.rates.low, found.rates.middle, found.rates.high
    for rows, part in ((_STEP_ROWS, "step"), (_HOST_ROWS, "host")):
        for name, (what, count) in rows.items():
            least, value, most = (
                1e3 * count * (getattr(getattr(one, part), name) or 0.0)
                for one in (low, middle, high)
            )
            if value:
                table.add_row(what, f"{value:.3g}", f"{least:.3g} to {most:.3g}")
    for codec, value in middle.host.megapixel.items():
        least, most = low.host.megapixel[codec], high.host.megapixel[codec]
        what = f"100 megapixels of {codec} decoded"
        table.add_row(what, f"{1e5 * value:.3g}", f"{1e5 * least:.3g} to {1e5 * most:.3g}")
    return table
