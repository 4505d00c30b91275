"""Runs a script with engines in a process of its own, where vLLM's state is its own as well."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest


def run_script(
    name: str, *arguments: object, timeout_s: float, env: Mapping[str, str] | None = None
) -> Any:
    """What a script beside this file printed as JSON on its last line.

    Args:
        name: File of the script.
        arguments: Its arguments.
        timeout_s: Seconds it may take.
        env: More environment variables.

    Raises:
        AssertionError: It failed; the message is the end of what it wrote to stderr.
    """
    done = subprocess.run(
        [sys.executable, str(Path(__file__).with_name(name)), *map(str, arguments)],
        env={**os.environ, "VLLM_NO_USAGE_STATS": "1", "HF_HUB_OFFLINE": "1", **(env or {})},
        capture_output=True,
        text=True,
        timeout=timeout_s,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout.splitlines()[-1])


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
