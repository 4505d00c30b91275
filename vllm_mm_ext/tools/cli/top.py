"""``vllm-mm top``: the operator's page of a running server, in a terminal."""

from __future__ import annotations

import http.client
import json
import time
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from typing import Annotated, Any

import typer
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.table import Column, Table
from rich.text import Text

from vllm_mm_ext.tools.cli.common import byte_text, printable
from vllm_mm_ext.tools.cli.own_server import ApiKey

_COLORS = {"video": "blue", "audio": "yellow", "image": "green", "text": "white"}
_BAR = 32
_TIMEOUT_S = 15.0
_ROWS = 10
# What the page of a server has at least.
_PARTS = frozenset(("time", "model", "tier", "engines", "servers", "requests"))


class ServerRefusedError(Exception):
    """The server does not tell; the message says why."""


def top(
    url: Annotated[str, typer.Argument(help="Address of the server.")] = "http://127.0.0.1:8000",
    api_key: ApiKey = "none",
    every: Annotated[float, typer.Option(min=0.2, help="Seconds between two looks.")] = 2.0,
    once: Annotated[bool, typer.Option("--once", help="Look once and end.")] = False,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print what the server tells as JSON; ends then.")
    ] = False,
) -> None:
    """Show a running server's caches, sessions and latest requests with media.

    The server must have been started with `mm_ext.sight.page`.
    """
    console = Console()
    try:
        told = ask(url, api_key)
        if as_json:
            typer.echo(json.dumps(told, indent=2))
            return
        if once:
            console.print(shown(told))
            return
        with Live(shown(told), console=console, screen=console.is_terminal) as live:
            while True:
                time.sleep(every)
                try:
                    told, problem = ask(url, api_key), ""
                except ServerRefusedError as error:
                    # It may be restarting. What it told last is shown meanwhile.
                    problem = str(error)
                live.update(shown(told, problem), refresh=True)
    except ServerRefusedError as error:
        Console(stderr=True).print(Text(printable(str(error)), "red"))
        raise typer.Exit(1) from None
    except KeyboardInterrupt:
        return


def ask(url: str, api_key: str) -> dict[str, Any]:
    """What a server tells of itself.

    Args:
        url: Address of the server, with or without ``/v1``.
        api_key: Its key.

    Raises:
        ServerRefusedError: It tells nothing.
    """
    address = f"{url.rstrip('/').removesuffix('/v1')}/mm_ext/sight"
    try:
        request = urllib.request.Request(address, headers={"Authorization": f"Bearer {api_key}"})
        with urllib.request.urlopen(request, timeout=_TIMEOUT_S) as answer:
            body = answer.read()
    except urllib.error.HTTPError as error:
        raise ServerRefusedError(_reason(error)) from None
    # An address that is none, nobody there, or one who does not speak HTTP.
    except (OSError, ValueError, http.client.HTTPException) as error:
        raise ServerRefusedError(f"{address} does not answer: {str(error).strip()}") from None
    try:
        told = json.loads(body)
    except ValueError:
        told = None
    if not isinstance(told, dict) or not told.keys() >= _PARTS:
        raise ServerRefusedError(f"{address} is not the page of a server with this plugin.")
    return told


def _reason(error: urllib.error.HTTPError) -> str:
    if error.code == 401:
        return "The server wants its API key: --api-key, or VLLM_API_KEY."
    try:
        return str(json.load(error)["error"]["message"])
    except (ValueError, KeyError, TypeError):
        return f"The server answers HTTP {error.code}; it may be a vLLM without the plugin."


def shown(told: Mapping[str, Any], problem: str = "") -> RenderableType:
    """The whole view.

    Args:
        told: From ``ask``.
        problem: Why the server tells nothing newer; empty if it does.
    """
    clock = time.strftime("%H:%M:%S", time.localtime(told["time"]))
    tier = told["tier"]
    title = Text.assemble(
        (told["model"], "bold"), f"  {clock}  load tier ", (str(tier), "red" if tier else "green")
    )
    if problem:
        title.append(f"  {printable(problem)}", "red")
    parts: list[RenderableType] = [title]
    for engine in told["engines"]:
        parts.append(_engine(engine))
    for server in told["servers"]:
        parts.append(_server(server))
    parts += [_media(told["engines"]), _sessions(told), _requests(told)]
    return Group(*parts)


def _engine(engine: Mapping[str, Any]) -> RenderableType:
    load, kv, encoder = engine["load"], engine["kv"], engine["encoder"]
    table = Table.grid(padding=(0, 2))
    line = f"engine {engine['number']}"
    if load is not None:
        line += f"  {load['running']:.0f} running, {load['waiting']:.0f} waiting"
        if load["itl_s"]:
            line += f", {1e3 * load['itl_s']:.0f} ms a token"
        if load["backlog_s"]:
            line += f", {load['backlog_s']:.1f} s to encode"
    table.add_row(Text(line, "bold"))
    if kv is not None:
        whole = sum(kv["tokens"].values()) or 1
        kept = [(n * kv["kept"] / whole, kind) for kind, n in sorted(kv["tokens"].items())]
        bar = _bar([(kv["used"], "in use"), *kept], kv["blocks"])
        size = byte_text(kv["blocks"] * kv["block_bytes"])
        table.add_row(Text.assemble("  KV       ", bar, f" {size}, {kv['all_items']} items"))
    if encoder is not None:
        bar = _bar([(n, kind) for kind, n in sorted(encoder["bytes"].items())], encoder["capacity"])
        host = encoder["host"]
        about = f" {byte_text(encoder['capacity'])}, {encoder['all_items']} items"
        if host is not None:
            about += f"; host {byte_text(host['held'])}, {host['items']} items"
        table.add_row(Text.assemble("  encoder  ", bar, about))
    return table


def _bar(parts: Sequence[tuple[float, str]], whole: float) -> Text:
    bar = Text()
    for size, kind in parts:
        cells = round(_BAR * size / whole) if whole else 0
        if size and not cells and len(bar) < _BAR:
            cells = 1
        cells = min(cells, _BAR - len(bar))
        style = "bright_black" if kind == "in use" else _COLORS.get(kind, "magenta")
        bar.append("█" * cells, style)
    bar.append("·" * (_BAR - len(bar)), "dim")
    filled = sum(size for size, _ in parts)
    return bar.append(f" {100 * filled / whole if whole else 0:3.0f}%", "default")


def _server(server: Mapping[str, Any]) -> RenderableType:
    stats, decode, live = server["stats"], server["stats"]["decode"], server["live"]
    decoded, budget = stats["decoded_cache"], stats["media_budget"]
    return Text(
        f"API server {server['server']}  {decode['busy']} jobs, {decode['waiting']} waiting; "
        f"frames {byte_text(decoded['num_bytes'])} of {byte_text(decoded['max_bytes'])}; "
        f"in flight {byte_text(budget['used_bytes'])} of {byte_text(budget['max_bytes'])}; "
        f"{live.get('sessions', 0)} live sessions; {len(server['running'])} requests under way"
    )


def _media(engines: Sequence[Mapping[str, Any]]) -> RenderableType:
    files: dict[str, dict[str, Any]] = {}
    for engine in engines:
        for part in ("kv", "encoder"):
            for item in (engine[part] or {}).get("items", ()):
                key = item.get("digest") or item["hash"]
                file = files.setdefault(key, {"kv": 0, "encoder": 0, "tokens": 0, **item})
                file[part] += item["bytes"]
    table = Table(
        "file",
        "kind",
        Column("KV", justify="right"),
        Column("encoder", justify="right"),
        Column("digest", overflow="ellipsis", no_wrap=True, max_width=18),
        box=None,
        header_style="dim",
    )
    most = sorted(files.items(), key=lambda one: -one[1]["kv"] - one[1]["encoder"])
    for key, file in most[:_ROWS]:
        name = Text(_name(file.get("url") or "(in the request)"), overflow="ellipsis", no_wrap=True)
        kind = file["modality"]
        table.add_row(
            name,
            Text(kind, _COLORS.get(kind, "default")),
            byte_text(file["kv"]),
            byte_text(file["encoder"]),
            Text(key),
        )
    return table if files else Text("no media is cached", "dim")


def _sessions(told: Mapping[str, Any]) -> RenderableType:
    live = [one for server in told["servers"] for one in server["sessions"]]
    # A session may be in several engines, as pinned ones are.
    kept: dict[str, bool] = {}
    for engine in told["engines"]:
        for one in (engine["kv"] or {}).get("sessions", ()):
            kept[one["id"]] = kept.get(one["id"], False) or one["pinned"]
    lines = [f"{len(kept)} sessions in KV, {sum(kept.values())} pinned"]
    lines += [f"live {one['id']}  {one['seconds']:.0f} s, {one['files']} files" for one in live]
    return Text("\n".join(lines[: _ROWS + 1]))


def _requests(told: Mapping[str, Any]) -> RenderableType:
    table = Table(
        "time",
        "media",
        Column("tokens", justify="right"),
        Column("took", justify="right"),
        "longest stages",
        "",
        box=None,
        header_style="dim",
    )
    for row in told["requests"][:_ROWS]:
        media = Text(overflow="ellipsis", no_wrap=True)
        for number, medium in enumerate(row["media"]):
            media.append(", " if number else "")
            name = _name(medium["name"]) or medium["modality"]
            media.append(name, _COLORS.get(medium["modality"], "default"))
        if row["more_media"]:
            media.append(f" and {row['more_media']} more")
        took = {stage: end - begin for stage, (begin, end) in row["stages"].items()}
        longest = sorted(took.items(), key=lambda one: -one[1])[:3]
        ended = row["refused"] or (str(row["status"]) if row["status"] else "cut off")
        table.add_row(
            time.strftime("%H:%M:%S", time.localtime(row["began"])),
            media,
            str(sum(row["tokens"].values()) or "-"),
            f"{row['seconds']:.2f} s",
            Text(", ".join(f"{stage} {1e3 * seconds:.0f} ms" for stage, seconds in longest)),
            Text(ended, "green" if row["status"] == 200 else "red")
            + Text(" lowered" if row["lowered"] else "", "yellow"),
        )
    return table if told["requests"] else Text("no request with media has ended yet", "dim")


def _name(url: str) -> str:
    """What is shown of a URL, which comes from a client."""
    return printable(url if url.startswith("data:") else url.rpartition("/")[2] or url)
