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
    _start(arguments, folder, monkeypatch)
    return set((folder / "environment").read_text().splitlines())


def flags(arguments: list[str], folder: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The arguments of the server, as ``environment`` has its variables.

    Args:
        arguments, folder, monkeypatch: As for ``environment``.
    """
    _start(arguments, folder, monkeypatch)
    return (folder / "arguments").read_text().splitlines()


def _start(arguments: list[str], folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = folder / "python"
    program.write_text(
        f"#!/bin/sh\ncd {folder}\nenv > environment\nprintf '%s\\n' \"$@\" > $$\n"
        # At once, as several servers may do so.
        "mv $$ arguments\nexit 1\n"
    )
    program.chmod(0o755)
    monkeypatch.setattr(server, "sys", SimpleNamespace(executable=str(program)))
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 1, done.output
