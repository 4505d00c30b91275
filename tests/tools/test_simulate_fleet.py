"""``vllm-mm simulate-fleet``: what it prints, and what it refuses."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

import vllm_mm_ext
from vllm_mm_ext.tools.cli.main import app

COMPOSER = Path(vllm_mm_ext.__file__).parent / "assets" / "composer-tiny"


@pytest.fixture(autouse=True)
def quiet(monkeypatch: pytest.MonkeyPatch) -> None:
    # The command sets them, unless they are set.
    monkeypatch.setenv("VLLM_LOGGING_LEVEL", "ERROR")
    monkeypatch.setenv("TRANSFORMERS_VERBOSITY", "error")


def run(*arguments: object) -> tuple[int, str, str]:
    command = ["simulate-fleet", str(COMPOSER), "--gpu", "h100-80gb", *map(str, arguments)]
    done = CliRunner().invoke(app, command)
    return done.exit_code, done.stdout, done.stderr


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--gpu", "h99"], ["--gpu h99", "h100-80gb"]),
        (["--routing", "media-key,sticky"], ["sticky", "random, round-robin, session, media-key"]),
        (["--routing", "random,random"], ["named twice"]),
        (["--video", "20z"], ["--video 20z", "30s, 5m, 2h"]),
        (["--write-trace", "no/such/a.jsonl"], ["--write-trace", "no folder no/such"]),
        (["--gpu", "cpu", "--tp", 2], ["--tp 2", "must be 1"]),
        (["--replicas", 0], ["--replicas", "greater than or equal to 1"]),
    ],
)
def test_bad_options_are_refused_with_option_value_and_what_is_valid(arguments, words):
    code, _, error = run(*arguments)
    assert code == 2
    assert all(word in error for word in words), error


@pytest.mark.parametrize(
    ("lines", "more", "words"),
    [
        ("", [], "it has no requests"),
        ('{"at": 0, "session": 1, "kind": 2}\n', [], ":1: kind 2, there are 2 kinds"),
        ('{"at": 0}\n', [], ":1: Object missing required field `session`"),
        ('{"at": 0, "session": 1}\n', ["--rate", 2], "--rate is for generated requests"),
        ('{"at": 0, "session": 1}\n', ["--zipf", 0.9], "--zipf is for generated"),
    ],
)
def test_a_trace_is_checked_before_anything_is_simulated(lines, more, words, tmp_path):
    file = tmp_path / "trace.jsonl"
    file.write_text(lines)
    code, _, error = run("--trace", file, *more)
    assert code == 2
    assert words in error


def test_routers_are_compared_on_the_same_requests_which_can_be_written_and_read(tmp_path):
    file = tmp_path / "trace.jsonl"
    small = ("--replicas", 2, "--video", "4s:240p", "--routing", "round-robin,media-key", "--json")
    code, shown, error = run(*small, "--requests", 300, "--write-trace", file)
    assert code == 0, error
    report = json.loads(shown)
    in_turn, by_key = (report["routings"][name] for name in ("round-robin", "media-key"))
    assert in_turn["answered"] == by_key["answered"] == 300
    assert by_key["tokens encoded"] < in_turn["tokens encoded"]
    assert 0 < by_key["KV hits"] < 1
    assert by_key["first token p50"] <= by_key["first token p99"]
    code, shown, error = run(
        *("--trace", file, "--replicas", 2, "--video", "4s:240p", "--routing", "media-key"),
        *("--encoders", 1, "--failures", 1, "--host-tier-gib", 1, "--price-per-hour", 2),
    )
    assert code == 0, error
    for words in ("media-key", "busy, encoders", "price of 1,000", "data sheet"):
        assert words in shown, shown
    (answered,) = (line for line in shown.splitlines() if "answered" in line)
    assert "300" in answered
