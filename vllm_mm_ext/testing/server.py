"""A real ``vllm serve`` as a subprocess, stock or with the plugin, always cleaned up."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Collection, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

from vllm_mm_ext.testing.memory import MemoryWatch, ProcessMemory, snapshot
from vllm_mm_ext.testing.scraped import Scraped

if TYPE_CHECKING:
    import openai

MODEL_NAME = "model"
_POLL_S = 0.25
_TERM_GRACE_S = 15.0
_GROUP_GRACE_S = 5.0
_TAIL_LINES = 40
_EXCEPTION = re.compile(r"(?m)(?:^|\] )((?:\w+\.)*\w*(?:Error|Exception): .+)$")

# A KV cache that fits next to others. Where its size is said in bytes, vLLM's share of memory has
# one meaning left: a GPU worker refuses to start where so much is not free, 92 % by default. With a
# small share, several servers start on one GPU.
KV_CACHE_BYTES = 1 << 30
_GPU_SHARE = "0.05"
_OFFLINE = ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE")
# Offline, no telemetry. A key that the user has exported is for other servers: this one is on
# loopback, and clients of it send none.
_ENV = {
    **dict.fromkeys(_OFFLINE, "1"),
    "VLLM_API_KEY": "",
    "VLLM_NO_USAGE_STATS": "1",
    "DO_NOT_TRACK": "1",
}


class ServerError(RuntimeError):
    """The server did not come up, or died; the message ends with the tail of its log."""


@dataclass
class Server:
    """A running server.

    Attributes:
        url: Base URL, without ``/v1``.
        pid: Process id of the API server.
        log: File with its stdout and stderr.
        startup_s: Seconds from the start of the process to the first healthy answer.
        plugin: Whether the plugin is loaded.
    """

    url: str
    pid: int
    log: Path
    startup_s: float
    plugin: bool = True
    model: str = MODEL_NAME
    _process: subprocess.Popen[bytes] | None = field(default=None, repr=False)

    def client(self, **options: Any) -> openai.OpenAI:
        """An OpenAI client for this server; ``options`` go to ``openai.OpenAI``."""
        import openai

        return openai.OpenAI(
            base_url=f"{self.url}/v1", api_key="none", **{"max_retries": 0, **options}
        )

    def alive(self) -> bool:
        """Whether the API server process still runs."""
        return self._process is not None and self._process.poll() is None

    def get(self, path: str, timeout: float = 30.0) -> str:
        """Body of a GET (``/metrics``...).

        Raises:
            urllib.error.URLError: no answer, or an HTTP error.
        """
        with urllib.request.urlopen(self.url + path, timeout=timeout) as response:
            body: bytes = response.read()
        return body.decode()

    def metric(self, name: str, **labels: str) -> float:
        """Sum of all series of ``/metrics`` of that name that have these labels."""
        return Scraped(self.get("/metrics")).sum(name, **labels)

    def memory(self) -> list[ProcessMemory]:
        """Memory of the API server and its descendants now."""
        return snapshot(self.pid)

    def peak_memory(self, interval_s: float = 0.1) -> MemoryWatch:
        """Context manager that records the peak of each role while the block runs."""
        return MemoryWatch(self.pid, interval_s)

    def tail(self, lines: int = _TAIL_LINES) -> str:
        """The last lines of the log."""
        return _tail(self.log, lines)


@contextlib.contextmanager
def serve(
    checkpoint: str | os.PathLike[str],
    *,
    plugin: bool,
    args: Sequence[str] = (),
    env: Mapping[str, str] | None = None,
    additional_config: Mapping[str, Any] | None = None,
    port: int | None = None,
    log: Path | None = None,
    enforce_eager: bool = True,
    kv_cache_bytes: int | None = KV_CACHE_BYTES,
    timeout_s: float = 300.0,
    cores: Collection[int] = (),
) -> Iterator[Server]:
    """Run ``vllm serve`` on loopback until the block ends, then kill its whole process group.

    Args:
        checkpoint: Model directory (or a cached model's name).
        plugin: Load the ``mm_ext`` plugin, and no other; False loads no plugin at all.
        args: More command-line flags.
        env: More environment variables; they win over the defaults here.
        additional_config: Contents of ``--additional-config``, e.g. ``{"mm_ext": {...}}``.
        port: TCP port; default: a free one.
        log: Log file; default: a file in a temporary directory that goes when the block ends.
        enforce_eager: Skip compilation and graph capture.
        kv_cache_bytes: Size of the KV cache; None: as ``args`` say, else as vLLM finds it.
        timeout_s: Seconds to wait for health.
        cores: Numbers of the cores that it may use; none: all.

    Raises:
        ServerError: It died or was not healthy in time; says why with the tail of the log.
    """
    with contextlib.ExitStack() as stack:
        if log is None:
            directory = stack.enter_context(tempfile.TemporaryDirectory(prefix="vllm-serve-"))
            log = Path(directory) / "server.log"
        log.parent.mkdir(parents=True, exist_ok=True)
        port = port or free_port()
        command = [
            # The console script of this very environment, without relying on PATH.
            *(sys.executable, "-m", "vllm.entrypoints.cli.main", "serve", os.fspath(checkpoint)),
            *("--host", "127.0.0.1", "--port", str(port), "--served-model-name", MODEL_NAME),
            *([] if kv_cache_bytes is None else _kv_cache(kv_cache_bytes)),
            *(["--enforce-eager"] if enforce_eager else []),
            *(
                ["--additional-config", json.dumps(additional_config)]
                if additional_config is not None
                else []
            ),
            *args,
        ]
        variables = {
            **os.environ,
            **_ENV,
            "VLLM_PLUGINS": "mm_ext" if plugin else "",
            **(env or {}),
        }
        name = "plugin" if plugin else "stock"
        with running(
            command, variables, port, log, timeout_s=timeout_s, name=name, cores=cores
        ) as server:
            server.plugin = plugin
            yield server


@contextlib.contextmanager
def running(
    command: Sequence[str],
    variables: Mapping[str, str],
    port: int,
    log: Path,
    *,
    timeout_s: float = 300.0,
    name: str = "",
    cwd: Path | None = None,
    cores: Collection[int] = (),
) -> Iterator[Server]:
    """Run a command that serves on loopback until the block ends, then kill its process group.

    Args:
        command: Program and arguments.
        variables: All of its environment.
        port: TCP port on which it will serve.
        log: File for its stdout and stderr.
        timeout_s: Seconds to wait for health.
        name: Which server it is, for messages.
        cwd: Directory in which it runs; by default this process's.
        cores: Numbers of the cores that it may use; none: all.

    Raises:
        ServerError: It died or was not healthy in time; says why with the tail of the log.
    """
    with contextlib.ExitStack() as stack:
        started = time.monotonic()
        output = stack.enter_context(open(log, "wb"))
        process = subprocess.Popen(
            command,
            stdout=output,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            env=variables,
            cwd=cwd,
            start_new_session=True,
        )
        if cores:
            # Its threads and processes, which it does not have yet, inherit them.
            os.sched_setaffinity(process.pid, cores)
        stack.callback(_kill_group, process)
        stack.enter_context(_ended_with_us(process.pid))
        url = f"http://127.0.0.1:{port}"
        _wait_healthy(process, url, log, timeout_s, name)
        yield Server(url, process.pid, log, time.monotonic() - started, _process=process)


@contextlib.contextmanager
def serve_both(
    checkpoint: str | os.PathLike[str],
    *,
    args: Sequence[str] = (),
    env: Mapping[str, str] | None = None,
    additional_config: Mapping[str, Any] | None = None,
    log_dir: Path | None = None,
    timeout_s: float = 300.0,
) -> Iterator[tuple[Server, Server]]:
    """Run a stock server and one with the plugin side by side; they start at the same time.

    Args:
        checkpoint, args, env, timeout_s: As for ``serve``, for both.
        additional_config: For the plugin's server only.
        log_dir: Directory for ``stock.log`` and ``plugin.log``; default: temporary.

    Yields:
        The stock server and the plugin's.

    Raises:
        ServerError: One of them did not come up; the other is stopped.
    """

    def side(name: str, plugin: bool) -> contextlib.AbstractContextManager[Server]:
        return serve(
            checkpoint,
            plugin=plugin,
            args=args,
            env=env,
            additional_config=additional_config if plugin else None,
            log=log_dir / f"{name}.log" if log_dir is not None else None,
            timeout_s=timeout_s,
        )

    with together([side("stock", False), side("plugin", True)]) as (stock, plugin):
        yield stock, plugin


@contextlib.contextmanager
def together(
    servers: Sequence[contextlib.AbstractContextManager[Server]],
) -> Iterator[list[Server]]:
    """Run several servers that start at the same time.

    Args:
        servers: Of ``serve``.

    Raises:
        ServerError: One of them did not come up; the others are stopped.
    """
    with ThreadPoolExecutor(len(servers)) as pool, contextlib.ExitStack() as stack:
        starts = [pool.submit(manager.__enter__) for manager in servers]
        wait(starts)
        # Register every server that came up before the error of another one is raised.
        for manager, start in zip(servers, starts, strict=True):
            if start.exception() is None:
                stack.push(manager)
        yield [start.result() for start in starts]


def _kv_cache(num_bytes: int) -> list[str]:
    return ["--kv-cache-memory-bytes", str(num_bytes), "--gpu-memory-utilization", _GPU_SHARE]


def may_download() -> dict[str, str]:
    """Variables for the ``env`` of ``serve`` that let the server download its model.

    Where the user's own environment says whether to be offline, that holds.
    """
    return {name: os.environ.get(name, "0") for name in _OFFLINE}


def free_port() -> int:
    """A TCP port on loopback that nothing listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        number: int = probe.getsockname()[1]
    return number


def _wait_healthy(
    process: subprocess.Popen[bytes], url: str, log: Path, timeout_s: float, name: str
) -> None:
    deadline = time.monotonic() + timeout_s
    begun = time.monotonic()
    # On a terminal a live line; nothing otherwise.
    with Console(stderr=True).status(f"starting vLLM ({name})") as status:
        while True:
            if (code := process.poll()) is not None:
                raise ServerError(
                    f"vllm serve ({name}) exited with code {code} before it was healthy"
                    f"{_cause(log)}"
                )
            if _healthy(url):
                return
            if time.monotonic() > deadline:
                raise ServerError(
                    f"vllm serve ({name}) was not healthy after {timeout_s:.0f} s{_cause(log)}"
                )
            last = _tail(log, 1)[-100:]
            status.update(f"starting vLLM ({name}), {time.monotonic() - begun:.0f} s: {last}")
            time.sleep(_POLL_S)


def _healthy(url: str) -> bool:
    try:
        with urllib.request.urlopen(f"{url}/health", timeout=2.0) as response:
            return bool(response.status == 200)
    except (urllib.error.URLError, OSError):
        return False


def _cause(log: Path) -> str:
    """The exceptions in the log, first one first (the root cause), and its tail."""
    errors = dict.fromkeys(_EXCEPTION.findall(_tail(log, 1000)))
    lines = "".join(f"\n  {error[:400]}" for error in errors)
    return f":{lines}\nend of its log:\n{_tail(log, _TAIL_LINES)}"


def _tail(log: Path, lines: int) -> str:
    try:
        text = log.read_text(errors="replace")
    except OSError:
        return ""
    return "\n".join(text.splitlines()[-lines:])


@contextlib.contextmanager
def _ended_with_us(group: int) -> Iterator[None]:
    """Have a watchdog end the process group if this process is killed inside the block."""
    script = 'read _; kill -TERM "-$0"; sleep 5; kill -KILL "-$0"'
    # Its standard input ends when this process does, however that happens.
    watchdog = subprocess.Popen(
        ["sh", "-c", script, str(group)], stdin=subprocess.PIPE, start_new_session=True
    )
    try:
        yield
    finally:
        watchdog.kill()
        watchdog.wait()
        if watchdog.stdin is not None:
            watchdog.stdin.close()


def _kill_group(process: subprocess.Popen[bytes]) -> None:
    """End every process of the group: ask the API server first, then kill what is left."""
    if process.poll() is None:
        process.send_signal(signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(_TERM_GRACE_S)
    # The group outlives its leader as long as a child does; multiprocessing's resource tracker
    # needs a moment to unlink shared memory.
    deadline = time.monotonic() + _GROUP_GRACE_S
    with contextlib.suppress(ProcessLookupError):
        while time.monotonic() < deadline:
            os.killpg(process.pid, 0)
            time.sleep(0.05)
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
