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
  "-m venv .venv") mkdir -p .venv/bin && cp "$0" .venv/bin/python
    [ ! -e breaks-early ] || { touch .venv/no-pip; exit 1; } ;;
  "-m pip --version") [ ! -e .venv/no-pip ] ;;
  *version_info*) echo 3.12 ;;
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
    for version in ("3.10", "3.11"):
        text = _PYTHON.replace("echo 3.12", f"echo {version}")
        program(tmp_path / "commands" / f"fake-python{version}", text)
    return tmp_path


def program(path: Path, text: str) -> None:
    path.write_text(text)
    path.chmod(0o755)


def run(
    tree: Path, variant: str = "", python: str = "fake-python"
) -> subprocess.CompletedProcess[str]:
    path = f"{tree / 'commands'}{os.pathsep}{os.environ['PATH']}"
    env = {**os.environ, "PATH": path, "PYTHON": python, "MM_EXT_VARIANT": variant}
    command = ["bash", "scripts/setup"]
    return subprocess.run(command, cwd=tree, env=env, capture_output=True, text=True)


def set_up(tree: Path, variant: str = "", python: str = "fake-python") -> tuple[int, list[str]]:
    """The script's exit status, and what it had pip install."""
    (tree / "installed").unlink(missing_ok=True)
    status = run(tree, variant, python).returncode
    found = tree / "installed"
    return status, found.read_text().splitlines() if found.exists() else []


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


def test_another_version_of_python_goes_into_a_fresh_environment(tree: Path) -> None:
    assert set_up(tree, "cpu")[0] == 0
    (tree / ".venv" / "of-3.12").touch()
    status, installed = set_up(tree, "cpu", "fake-python3.11")
    assert status == 0
    assert installed
    assert not (tree / ".venv" / "of-3.12").exists()
    (tree / ".venv" / "of-3.11").touch()
    assert set_up(tree, "cpu", "fake-python3.11") == (0, [])
    # Who names none keeps what is there.
    program(tree / "commands" / "python3.12", _PYTHON)
    assert set_up(tree, "cpu", "") == (0, [])
    assert (tree / ".venv" / "of-3.11").exists()


def test_a_python_that_vllm_does_not_run_on_is_refused_and_removes_nothing(tree: Path) -> None:
    assert set_up(tree, "cpu")[0] == 0
    for python in ("fake-python3.10", "no-such-python"):
        done = run(tree, "cpu", python)
        assert done.returncode == 1
        assert "3.11, 3.12 or 3.13 is needed" in done.stderr
        assert python in done.stderr
    assert set_up(tree, "cpu") == (0, [])


@pytest.mark.parametrize("left", ["no Python", "a broken Python", "no pip"])
def test_an_environment_that_was_left_half_made_is_made_anew(tree: Path, left: str) -> None:
    if left == "no pip":
        (tree / "breaks-early").touch()
        assert set_up(tree, "cpu") == (1, [])
        (tree / "breaks-early").unlink()
    else:
        (tree / ".venv" / "bin").mkdir(parents=True)
    if left == "a broken Python":
        program(tree / ".venv" / "bin" / "python", "#!/bin/sh\nexit 1\n")
    (tree / ".venv" / "left").touch()
    assert set_up(tree, "cpu")[0] == 0
    assert not (tree / ".venv" / "left").exists()
    assert set_up(tree, "cpu") == (0, [])


def test_an_environment_of_another_tool_is_left_as_it_is(tree: Path) -> None:
    (tree / ".venv" / "bin").mkdir(parents=True)
    program(tree / ".venv" / "bin" / "python", _PYTHON)
    (tree / ".venv" / "no-pip").touch()
    done = run(tree)
    assert done.returncode == 1
    assert "not made by this script and has no pip" in done.stderr
    assert (tree / ".venv" / "bin" / "python").exists()
    # With pip it is used, if it has the Python that is asked for.
    (tree / ".venv" / "no-pip").unlink()
    (tree / ".venv" / "kept").touch()
    done = run(tree, python="fake-python3.11")
    assert done.returncode == 1
    assert "has Python 3.12, PYTHON is fake-python3.11" in done.stderr
    assert set_up(tree)[1]
    assert (tree / ".venv" / "kept").exists()


@pytest.mark.parametrize(("before", "now"), [("cpu", "echo GPU 0"), ("cuda", "exit 9")])
def test_without_a_word_about_the_build_the_one_that_is_there_stays(
    tree: Path, before: str, now: str
) -> None:
    assert set_up(tree, before)[0] == 0
    program(tree / "commands" / "nvidia-smi", f"#!/bin/sh\n{now}\n")
    assert set_up(tree) == (0, [])
    assert ("MM_EXT_VARIANT=cuda" in run(tree).stdout) is (before == "cpu")


def test_a_build_that_does_not_exist_is_refused_and_removes_nothing(tree: Path) -> None:
    assert set_up(tree, "cpu")[0] == 0
    done = run(tree, "gpu")
    assert done.returncode == 1
    assert "can be cpu or cuda" in done.stderr
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
