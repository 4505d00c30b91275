"""The shipped settings for H100s are what ``vllm-mm plan`` writes."""

from __future__ import annotations

from pathlib import Path

import pytest
from planned_configs import COMMANDS, CONFIGS, written


@pytest.mark.parametrize("file", COMMANDS)
def test_a_shipped_config_is_the_output_of_the_command_in_it(
    file: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The command sets them, unless they are set.
    monkeypatch.setenv("VLLM_LOGGING_LEVEL", "ERROR")
    monkeypatch.setenv("TRANSFORMERS_VERBOSITY", "error")
    made = written(COMMANDS[file], f"configs/{file}", tmp_path)
    assert made == (CONFIGS / file).read_text(), (
        "write the files anew: python tests/support/planned_configs.py"
    )


def test_every_shipped_config_for_h100s_has_a_command() -> None:
    assert {path.name for path in CONFIGS.glob("*.h100.yaml")} == set(COMMANDS)
