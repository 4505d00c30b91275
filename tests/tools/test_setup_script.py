"""``scripts/setup`` run again: what it keeps of ``.venv``, and when it makes it anew."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

_ROOT = Path(__file__).resolve().parents[2]
# Stands for Python and pip, and installs nothing.
_PYTHON = """#!/bin/sh
case "$*" in
  "-m venv .venv") mkdir -p .venv/bin && cp "$0" .venv/bin/python ;;
  "-m pip install"*) echo "$*" >>installed; [ ! -e breaks ] ;;
esac
"""


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A checkout with as much as the script reads, and commands that it finds on the PATH."""
    (tmp_path / "scripts").mkdir()
    for name in ("pyproject.toml", "scripts/setup"):
        shutil.copy(_ROOT / name, tmp_path / name)
    (tmp_path / "commands").mkdir()
    program(tmp_path / "commands" / "fake-python", _PYTHON)
    return tmp_path


def program(path: Path, text: str) -> None:
    path.write_text(text)
    path.chmod(0o755)


def set_up(tree: Path, variant: str = "") -> tuple[int, list[str]]:
    """The script's exit status, and what it had pip install."""
    (tree / "installed").unlink(missing_ok=True)
    path = f"{tree / 'commands'}{os.pathsep}{os.environ['PATH']}"
    env = {**os.environ, "PATH": path, "PYTHON": "fake-python", "MM_EXT_VARIANT": variant}
    done = subprocess.run(["bash", "scripts/setup"], cwd=tree, env=env, capture_output=True)
    found = tree / "installed"
    return done.returncode, found.read_text().splitlines() if found.exists() else []


def test_an_unchanged_tree_installs_nothing_and_a_changed_one_keeps_what_is_there(
    tree: Path,
) -> None:
    assert "-e .[cpu,live,test,dev]" in set_up(tree, "cpu")[1][-1]
    (tree / ".venv" / "kept").touch()
    assert set_up(tree, "cpu") == (0, [])
    (tree / "pyproject.toml").write_text("")
    assert set_up(tree, "cpu")[1]
    assert (tree / ".venv" / "kept").exists()


@pytest.mark.parametrize("breaks", [False, True])
def test_the_other_build_of_vllm_goes_into_a_fresh_environment(tree: Path, breaks: bool) -> None:
    if breaks:
        (tree / "breaks").touch()
    assert (set_up(tree, "cpu")[0] == 0) is not breaks
    (tree / "breaks").unlink(missing_ok=True)
    (tree / ".venv" / "of-the-cpu").touch()
    status, installed = set_up(tree, "cuda")
    assert status == 0
    assert ["-e .[cuda,live,test,dev]" in line for line in installed] == [True]
    assert not (tree / ".venv" / "of-the-cpu").exists()
    assert set_up(tree, "cuda") == (0, [])


@pytest.mark.parametrize("left", ["no Python", "no pip"])
def test_an_environment_that_was_left_half_made_is_made_anew(tree: Path, left: str) -> None:
    (tree / ".venv" / "bin").mkdir(parents=True)
    if left == "no pip":
        program(tree / ".venv" / "bin" / "python", "#!/bin/sh\nexit 1\n")
    assert set_up(tree, "cpu")[0] == 0
    assert set_up(tree, "cpu") == (0, [])


@pytest.mark.parametrize(
    ("listing", "variant"),
    [
        # More than a pipe holds.
        ("yes 'GPU 0: NVIDIA H100' | head -n 20000", "cuda"),
        ("echo 'No devices were found'", "cpu"),
        ("exit 9", "cpu"),
    ],
)
def test_the_build_is_that_of_the_machine(tree: Path, listing: str, variant: str) -> None:
    program(tree / "commands" / "nvidia-smi", f"#!/bin/sh\n{listing}\n")
    assert f".[{variant}," in set_up(tree)[1][-1]
