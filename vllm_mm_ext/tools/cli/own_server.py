"""The server that a command starts for itself where no ``--url`` names one."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any
from urllib.parse import urlsplit

import typer

from vllm_mm_ext.tools.cli.demo import config_for, shipped_model

if TYPE_CHECKING:
    from vllm_mm_ext.testing.server import Server


def _address(*schemes: str) -> Any:
    """An option that names a server by a URL of one of these schemes."""

    def checked(url: str | None) -> str | None:
        if url is not None:
            try:
                parts = urlsplit(url)
                known = parts.scheme in schemes and parts.hostname and parts.port != 0
            except ValueError:
                known = False
            if not known:
                raise typer.BadParameter(f"{url!r} is no address such as http://127.0.0.1:8000")
        return url

    return typer.Option(
        metavar="URL",
        callback=checked,
        help="Server to ask (http://host:8000/v1); else one is started.",
    )


ServerUrl = Annotated[str | None, _address("http", "https")]
LiveUrl = Annotated[str | None, _address("http", "https", "ws", "wss")]
ApiKey = Annotated[
    str,
    typer.Option(envvar="VLLM_API_KEY", help="Key of the server at --url.", show_default=False),
]
Configs = Annotated[
    Path, typer.Option(help="Directory of --config files, for --model of a server started here.")
]


@contextmanager
def own_server(model: str | None, configs: Path, args: Sequence[str] = ()) -> Iterator[Server]:
    """Start a server with the plugin; it ends with the block.

    Args:
        model: Model to serve; None for the one that ships with the package.
        configs: Directory of ``--config`` files.
        args: More arguments of ``vllm serve``.

    Raises:
        ServerError: It does not start, or there is no model to serve.
    """
    from vllm_mm_ext.testing.named_model import as_named
    from vllm_mm_ext.testing.server import ServerError, serve

    served = model or shipped_model()
    if served is None:
        raise ServerError("the package has no model of its own; name one with --model")
    config = config_for(model, configs)
    given = ["--config", str(config)] if config is not None else []
    named = as_named() if model else {}
    with serve(served, plugin=True, args=[*given, *args], **named) as server:
        yield server
