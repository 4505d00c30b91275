"""``vllm-mm route-key``."""

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from vllm_mm_ext.fleet.route_key import url_route_key
from vllm_mm_ext.tools.cli.main import app

URL = "https://media.example.com/a.mp4"
BODY = {"messages": [{"role": "user", "content": [{"video_url": {"url": URL}}]}]}


def test_it_prints_the_key_of_a_body_from_a_file_or_standard_input_and_of_a_url(
    tmp_path: Path,
) -> None:
    file = tmp_path / "body.json"
    file.write_text(json.dumps(BODY))
    for arguments in (["-"], [str(file)], ["--url", URL]):
        done = CliRunner().invoke(app, ["route-key", *arguments], input=json.dumps(BODY))
        assert (done.exit_code, done.stdout.strip()) == (0, url_route_key(URL))
    versioned = CliRunner().invoke(app, ["route-key", "--url", URL, "--validator", "v1"])
    assert versioned.stdout.strip() == url_route_key(URL, "v1")


@pytest.mark.parametrize(
    ("arguments", "body", "code"),
    [
        ([], "", 2),
        (["-", "--url", URL], "{}", 2),
        (["-", "--validator", "v1"], "{}", 2),
        (["-"], "{", 2),
        (["-"], "[]", 2),
        (["nowhere.json"], "", 2),
        (["-"], '{"prompt": "Hi"}', 1),
    ],
)
def test_what_has_no_key_ends_with_a_message(arguments: list[str], body: str, code: int) -> None:
    done = CliRunner().invoke(app, ["route-key", *arguments], input=body)
    assert done.exit_code == code
    assert done.stderr
