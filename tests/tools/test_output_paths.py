"""Files and folders that commands write are looked at before the work."""

from __future__ import annotations

from pathlib import Path

import pytest
from typer.testing import CliRunner

from vllm_mm_ext.testing.media import make_clip
from vllm_mm_ext.tools.cli.main import app

runner = CliRunner(env={"COLUMNS": "300"})


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("outputs") / "clip.mp4"
    make_clip(path, width=64, height=48, fps=4, duration=1.0)
    return path


# What would run is refused or fails otherwise: no server, no model.
COMMANDS = [
    ("describe CLIP --url http://127.0.0.1:9", "--output"),
    ("describe CLIP --url http://127.0.0.1:9", "--page"),
    ("calibrate no-model", "--out"),
    ("inspect CLIP", "--output"),
    ("sample CLIP", "--wav"),
    ("plan no-model --gpu cpu", "--yaml"),
    ("simulate-fleet no-model --gpu cpu", "--write-trace"),
    ("bench live", "--json"),
    ("bench kv-pool", "--json"),
    ("bench soak", "--series"),
    ("bench scheduler", "--measure"),
]


@pytest.mark.parametrize(("command", "option"), COMMANDS)
def test_a_folder_in_place_of_a_file_is_refused_before_the_work(
    command: str, option: str, clip: Path, tmp_path: Path
) -> None:
    arguments = command.replace("CLIP", str(clip)).split()
    done = runner.invoke(app, [*arguments, option, str(tmp_path)])
    assert done.exit_code == 2, done.output
    assert option in done.output
    assert "is a directory" in done.output


@pytest.mark.parametrize(
    ("command", "option"), [*COMMANDS, ("sample CLIP", "--frames"), ("demo", "--out")]
)
def test_a_path_below_a_file_is_refused_before_the_work(
    command: str, option: str, clip: Path
) -> None:
    arguments = command.replace("CLIP", str(clip)).split()
    done = runner.invoke(app, [*arguments, option, str(clip / "below")])
    assert done.exit_code == 2, done.output
    assert option in done.output
    assert str(clip) in done.output


@pytest.mark.parametrize(
    ("command", "option"),
    [COMMANDS[0], ("calibrate no-model", "--out"), ("sample CLIP", "--frames")],
)
@pytest.mark.parametrize("name", ["{}", "{}/below"])
def test_a_name_that_no_file_can_have_is_refused_before_the_work(
    command: str, option: str, name: str, clip: Path, tmp_path: Path
) -> None:
    arguments = command.replace("CLIP", str(clip)).split()
    path = tmp_path / name.format("x" * 300)
    done = runner.invoke(app, [*arguments, option, str(path)])
    assert done.exit_code == 2, done.output
    assert "File name too long" in " ".join(done.output.replace("│", " ").split())


def test_what_cannot_be_written_in_the_end_is_one_line_of_error(clip: Path, tmp_path: Path) -> None:
    frames = tmp_path / "frames"
    frames.mkdir()
    # In place of the first frame's file.
    (frames / "000000_0.000000s.png").mkdir()
    for arguments in (
        ["inspect", str(clip), "-o", "/dev/full"],
        ["sample", str(clip), "--policy", "uniform", "--frames", str(frames)],
    ):
        done = runner.invoke(app, arguments)
        assert done.exit_code == 1, done.output
        assert done.stderr.startswith(f"cannot write {arguments[-1]}: ")
        assert done.stderr.count("\n") == 1
