"""The environment of the servers that commands start for themselves."""

from __future__ import annotations

from pathlib import Path

import pytest
from server_environment import environment

from vllm_mm_ext.testing.media import make_clip

OFFLINE = ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE")


@pytest.mark.parametrize("command", ["demo --clip", "describe", "live --ask x --camera"])
def test_a_server_of_ones_own_wants_no_key_and_is_offline(
    command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clip = tmp_path / "clip.mp4"
    make_clip(clip, width=64, height=48, fps=4, duration=1.0)
    monkeypatch.setenv("VLLM_API_KEY", "of another server")
    found = environment([*command.split(), str(clip)], tmp_path, monkeypatch)
    assert {"VLLM_API_KEY=", *(f"{name}=1" for name in OFFLINE)} <= found


@pytest.mark.parametrize("given", [None, "1"])
def test_a_model_that_is_named_may_be_downloaded_unless_the_user_forbids_it(
    given: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in OFFLINE:
        if given is None:
            monkeypatch.delenv(name, raising=False)
        else:
            monkeypatch.setenv(name, given)
    found = environment(["demo", "--model", "org/model"], tmp_path, monkeypatch)
    assert {f"{name}={given or 0}" for name in OFFLINE} <= found
