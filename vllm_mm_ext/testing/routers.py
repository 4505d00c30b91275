"""Real routers before real servers: started with the repository's own configurations."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import yaml  # type: ignore[import-untyped]

from vllm_mm_ext.testing.server import Server, free_port, running

CONFIGS = Path(__file__).parents[2] / "configs" / "routers"
_START_S = 60.0
_NGINX_FOLDERS = ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")


def missing(name: str) -> str | None:
    """What a router cannot be started without and is not there; None if all is there."""
    if shutil.which(name) is None:
        return f"no `{name}` on the PATH (the extra `fleet` has `envoy`, `vllm-router` and `smg`)"
    if not CONFIGS.is_dir():
        return "no configurations of routers, which are in the repository and not in the package"
    return None


@contextlib.contextmanager
def router(
    name: str, replicas: Sequence[str], *, changed: Mapping[str, Any] | None = None
) -> Iterator[Server]:
    """Run a router on loopback until the block ends.

    Args:
        name: Of ``ROUTERS``.
        replicas: Base URLs of the servers behind it.
        changed: Of Envoy: fields of the cluster in place of the configuration's.

    Yields:
        The router, as a server that clients may ask.

    Raises:
        ServerError: It died or was not ready in time.
    """
    program = shutil.which(name)
    if program is None:
        raise FileNotFoundError(f"no program {name!r} on the PATH")
    with tempfile.TemporaryDirectory(prefix=f"{name}-") as made:
        folder, port = Path(made), free_port()
        command = ROUTERS[name](program, folder, port, replicas)
        if changed:
            (folder / "envoy.yaml").write_text(envoy_config(replicas, port, changed))
        log = folder / "router.log"
        with running(command, os.environ, port, log, timeout_s=_START_S, name=name) as server:
            yield server


def envoy_config(
    replicas: Sequence[str], port: int, changed: Mapping[str, Any] | None = None
) -> str:
    """`configs/routers/envoy.yaml` for other servers and another port.

    Args:
        replicas: Base URLs of the servers.
        port: On which Envoy listens, on loopback.
        changed: Fields of the cluster in place of the configuration's.
    """
    config = yaml.safe_load((CONFIGS / "envoy.yaml").read_text())
    resources = config["static_resources"]
    listener, cluster = resources["listeners"][0], resources["clusters"][0]
    listener["address"]["socket_address"] = {"address": "127.0.0.1", "port_value": port}
    cluster.update(changed or {})
    cluster["load_assignment"]["endpoints"] = [
        {
            "lb_endpoints": [
                {"endpoint": {"address": {"socket_address": _address(url)}}} for url in replicas
            ]
        }
    ]
    return str(yaml.safe_dump(config, sort_keys=False))


def _address(url: str) -> dict[str, Any]:
    parts = urlsplit(url)
    return {"address": parts.hostname, "port_value": parts.port}


def _envoy(program: str, folder: Path, port: int, replicas: Sequence[str]) -> list[str]:
    config = folder / "envoy.yaml"
    config.write_text(envoy_config(replicas, port))
    # Without a hot restart, which two Envoys on one machine would try with each other.
    flags = ("--concurrency", "1", "--disable-hot-restart", "--log-level", "warning")
    return [program, "-c", str(config), *flags]


def _with_servers(text: str, server: str, replicas: Sequence[str]) -> str:
    """A configuration in which the lines that name its servers name others.

    Args:
        text: The configuration.
        server: Pattern of such a line, with the group ``place`` for host and port, and ``name`` for
            the server's name if it has one.
        replicas: Base URLs of the others.
    """
    lines = list(re.finditer(server, text, re.MULTILINE))
    made = []
    for number, url in enumerate(replicas):
        line = lines[0][0].replace(lines[0]["place"], urlsplit(url).netloc)
        made.append(re.sub(r"\breplica-\d+\b", f"replica-{number + 1}", line))
    return text[: lines[0].start()] + "\n".join(made) + text[lines[-1].end() :]


def _nginx(program: str, folder: Path, port: int, replicas: Sequence[str]) -> list[str]:
    text = (CONFIGS / "nginx.conf").read_text()
    text = _with_servers(text, r"^\s*server (?P<place>127\.0\.0\.1:\d+).*$", replicas)
    text = re.sub(r"listen \d+", f"listen 127.0.0.1:{port}", text)
    # Debian's nginx would use folders that only its package makes.
    own = "".join(f"{kind}_temp_path {kind};" for kind in _NGINX_FOLDERS)
    text = text.replace("http {", f"http {{ {own}", 1)
    config = folder / "nginx.conf"
    config.write_text(text)
    # Its workers run as another user.
    folder.chmod(0o755)
    directives = f"daemon off; pid {folder}/nginx.pid; error_log stderr;"
    return [program, "-c", str(config), "-p", str(folder), "-e", "stderr", "-g", directives]


def _haproxy(program: str, folder: Path, port: int, replicas: Sequence[str]) -> list[str]:
    text = (CONFIGS / "haproxy.cfg").read_text()
    text = _with_servers(text, r"^\s*server replica-\d+ (?P<place>127\.0\.0\.1:\d+).*$", replicas)
    text = re.sub(r"bind :\d+", f"bind 127.0.0.1:{port}", text)
    config = folder / "haproxy.cfg"
    config.write_text(text)
    return [program, "-f", str(config), "-db"]


def _script(name: str) -> Callable[[str, Path, int, Sequence[str]], list[str]]:
    def command(program: str, folder: Path, port: int, replicas: Sequence[str]) -> list[str]:
        del program, folder
        return [
            "sh",
            str(CONFIGS / f"{name}.sh"),
            "--host",
            "127.0.0.1",
            "--port",
            str(port),
            "--worker-urls",
            *replicas,
        ]

    return command


ROUTERS: Mapping[str, Callable[[str, Path, int, Sequence[str]], list[str]]] = {
    "envoy": _envoy,
    "nginx": _nginx,
    "haproxy": _haproxy,
    "vllm-router": _script("vllm-router"),
    "smg": _script("smg"),
}
"""What starts each router: of its program, a folder, a port and the servers."""
