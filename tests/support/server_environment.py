"""What a command gives to a server that it starts for itself, without such a server."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
from typer.testing import CliRunner

from vllm_mm_ext.testing import server
from vllm_mm_ext.tools.cli.main import app


def environment(arguments: list[str], folder: Path, monkeypatch: pytest.MonkeyPatch) -> set[str]:
    """The variables, as ``NAME=value``; the server ends at once, and the command fails.

    Args:
        arguments: Of ``vllm-mm``.
        folder: For files of this function.
        monkeypatch: Puts another program in place of Python.
    """
    program, told = folder / "python", folder / "environment"
    program.write_text(f"#!/bin/sh\nenv > {told}\nexit 1\n")
    program.chmod(0o755)
    monkeypatch.setattr(server, "sys", SimpleNamespace(executable=str(program)))
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 1, done.output
    return set(told.read_text().splitlines())
