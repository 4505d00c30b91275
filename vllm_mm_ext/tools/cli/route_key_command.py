"""``vllm-mm route-key``: the key by which routers send requests about one medium to one server."""

from __future__ import annotations

import json
from typing import Annotated

import typer


def route_key(
    file: Annotated[
        typer.FileText | None,
        typer.Argument(encoding="utf-8", help="A request's body as JSON; - for standard input."),
    ] = None,
    url: Annotated[str | None, typer.Option(help="URL of a medium, in place of a body.")] = None,
    validator: Annotated[
        str, typer.Option(help="With --url: an ETag, for a key of this version of the content.")
    ] = "",
) -> None:
    """Print the key of a request for routers: of its first medium, without fetching it."""
    from vllm_mm_ext.fleet import route_key as keys

    if (file is None) == (url is None):
        raise typer.BadParameter("give either a file with a request's body, or --url")
    if url is not None:
        typer.echo(keys.url_route_key(url, validator))
        return
    if validator:
        raise typer.BadParameter("--validator goes with --url")
    assert file is not None
    try:
        body = json.load(file)
    except ValueError as error:
        raise typer.BadParameter(f"{file.name} is not JSON: {error}") from None
    if not isinstance(body, dict):
        raise typer.BadParameter(f"{file.name} must hold an object, not a {type(body).__name__}")
    key = keys.route_key(body)
    if key is None:
        typer.echo("The request has neither media nor a session: any server can take it.", err=True)
        raise typer.Exit(1)
    typer.echo(key)
