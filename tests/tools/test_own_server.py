"""What commands give to the servers that they start for themselves."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml
from server_environment import environment, flags
from typer.testing import CliRunner

from vllm_mm_ext.testing import media, named_model, server
from vllm_mm_ext.testing.media import make_clip
from vllm_mm_ext.tools.cli.demo import shipped_model
from vllm_mm_ext.tools.cli.main import app

OFFLINE = ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE")
# What fits a small model in tests, and not a model that a user names.
SMALL = {"--kv-cache-memory-bytes", "--gpu-memory-utilization", "--enforce-eager"}


@pytest.fixture
def clip(tmp_path: Path) -> str:
    path = tmp_path / "clip.mp4"
    make_clip(path, width=64, height=48, fps=4, duration=1.0)
    return str(path)


@pytest.mark.parametrize("command", ["demo --clip", "describe", "live --ask x --camera"])
def test_a_server_of_ones_own_wants_no_key_and_is_offline(
    command: str, clip: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VLLM_API_KEY", "of another server")
    found = environment([*command.split(), clip], tmp_path, monkeypatch)
    assert {"VLLM_API_KEY=", *(f"{name}=1" for name in OFFLINE)} <= found


@pytest.mark.parametrize("given", [None, "1"])
def test_a_model_that_is_named_may_be_downloaded_unless_the_user_forbids_it(
    given: str | None, clip: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in OFFLINE:
        if given is None:
            monkeypatch.delenv(name, raising=False)
        else:
            monkeypatch.setenv(name, given)
    arguments = ["demo", "--clip", clip, "--model", "org/model"]
    found = environment(arguments, tmp_path, monkeypatch)
    assert {f"{name}={given or 0}" for name in OFFLINE} <= found


@pytest.mark.parametrize("on_cpu", [False, True])
@pytest.mark.parametrize("command", ["demo --clip", "describe", "live --ask x --camera"])
def test_vllm_sizes_and_compiles_a_model_that_is_named_unless_it_runs_on_a_cpu(
    command: str, on_cpu: bool, clip: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(named_model, "on_cpu", lambda: on_cpu)
    arguments = [*command.split(), clip, "--model", "org/model"]
    given = flags(arguments, tmp_path, monkeypatch)
    assert "org/model" in given
    assert SMALL & set(given) == (SMALL if on_cpu else set())


@pytest.mark.parametrize("command", ["demo --clip", "describe", "live --ask x --camera"])
def test_the_shipped_model_has_its_settings_outside_a_checkout_too(
    command: str, clip: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    given = flags([*command.split(), clip], tmp_path, monkeypatch)
    config = Path(given[given.index("--config") + 1])
    model = shipped_model()
    assert model is not None
    assert config == model / "serve.yaml"
    prompts = yaml.safe_load(config.read_text())["additional-config"]["mm_ext"]["long_video"]
    assert prompts["prompts"]["note"] == "Note what happens."


@pytest.mark.parametrize("command", ["demo", "fleet"])
def test_without_the_real_clips_a_generated_one_is_shown(
    command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(media, "real_clips", list)
    assert "--allowed-local-media-path" in flags([command], tmp_path, monkeypatch)


@pytest.mark.parametrize("command", ["demo --clip", "fleet", "describe", "live --ask x --camera"])
def test_a_server_that_does_not_start_is_told_with_the_end_of_its_log(
    command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program, clip = tmp_path / "python", tmp_path / "clip.mp4"
    program.write_text("#!/bin/sh\necho '[bold] no weights'\nexit 3\n")
    program.chmod(0o755)
    make_clip(clip, width=64, height=48, fps=4, duration=1.0)
    monkeypatch.setattr(server, "sys", SimpleNamespace(executable=str(program)))
    arguments = command.split() if command == "fleet" else [*command.split(), str(clip)]
    done = CliRunner(env={"COLUMNS": "200"}).invoke(app, arguments)
    assert done.exit_code == 1
    assert isinstance(done.exception, SystemExit)
    assert "exited with code 3 before it was healthy" in done.stderr
    assert "[bold] no weights" in done.stderr
