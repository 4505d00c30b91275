"""Runs a script with engines in a process of its own, where vLLM's state is its own as well."""

from __future__ import annotations

import json
import os
import runpy
import sys
import tempfile
from collections.abc import Mapping, Sequence
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import pytest

# To import vLLM takes some 15 s of a core: a server of processes does so once for all scripts, and
# each script runs in a fork of that server. The server imports nothing of the plugin: whether vLLM
# loads plugins is for the environment of a script to say.
_PROCESSES = get_context("forkserver")
_PROCESSES.set_forkserver_preload(
    [
        "vllm.entrypoints.llm",
        "vllm.v1.engine.async_llm",
        "vllm.v1.engine.core",
        "vllm.v1.worker.cpu_worker",
        "vllm.model_executor.models.qwen2_5_omni_thinker",
        "transformers.models.qwen2_5_omni.processing_qwen2_5_omni",
    ]
)


def run_script(
    name: str,
    *arguments: object,
    timeout_s: float,
    env: Mapping[str, str] | None = None,
    fresh: bool = False,
) -> Any:
    """What a script beside this file printed as JSON on its last line.

    Args:
        name: File of the script.
        arguments: Its arguments.
        timeout_s: Seconds it may take.
        env: More environment variables.
        fresh: Whether Python starts anew, for variables that say what is imported.

    Raises:
        AssertionError: It failed or took longer; the message is the end of what it wrote to stderr.
    """
    environment = {**os.environ, "VLLM_NO_USAGE_STATS": "1", "HF_HUB_OFFLINE": "1", **(env or {})}
    with tempfile.TemporaryDirectory() as folder:
        out, err = Path(folder, "out"), Path(folder, "err")
        command = [str(Path(__file__).with_name(name)), *map(str, arguments)]
        target = _start_anew if fresh else _run
        process = _PROCESSES.Process(target=target, args=(command, environment, out, err))
        process.start()
        process.join(timeout_s)
        process.kill()
        process.join()
        assert process.exitcode == 0, err.read_text()[-4000:]
        return json.loads(out.read_text().splitlines()[-1])


def _start_anew(command: list[str], environment: Mapping[str, str], out: Path, err: Path) -> None:
    _write_to(out, err)
    os.execve(sys.executable, [sys.executable, *command], environment)


def _run(command: list[str], environment: Mapping[str, str], out: Path, err: Path) -> None:
    _write_to(out, err)
    os.environ.clear()
    os.environ.update(environment)
    sys.argv[:] = command
    sys.path.insert(0, str(Path(__file__).parent))
    runpy.run_path(command[0], run_name="__main__")


def _write_to(out: Path, err: Path) -> None:
    for stream, path in ((sys.stdout, out), (sys.stderr, err)):
        with path.open("w") as file:
            os.dup2(file.fileno(), stream.fileno())


def asked_for(request: pytest.FixtureRequest, name: str, values: Sequence[str]) -> list[str]:
    """Those of a parameter's values for which a test of the module is going to run.

    Args:
        request: Of a fixture of the module.
        name: The parameter.
        values: Its values, in their order.
    """
    specs = [
        getattr(item, "callspec", None)
        for item in request.session.items
        if item.path == request.path
    ]
    chosen = {spec.params.get(name) for spec in specs if spec is not None}
    return [value for value in values if value in chosen]
