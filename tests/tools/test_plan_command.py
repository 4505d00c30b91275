"""``vllm-mm plan``: what it prints and writes, and what it refuses."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import yaml
from aiohttp import ClientPayloadError
from msgspec import structs
from planner_facts import LLAMA_70B
from server_environment import environment
from typer.testing import CliRunner

import vllm_mm_ext
from vllm_mm_ext.planner.calibration_file import VERSION, Calibration, write
from vllm_mm_ext.planner.gpu_facts import gpu_of
from vllm_mm_ext.planner.roofline import roofline
from vllm_mm_ext.testing.checkpoints import checkpoint
from vllm_mm_ext.tools.calibration import calibrating
from vllm_mm_ext.tools.cli.main import app
from vllm_mm_ext.tools.cli.plan_command import _command

COMPOSER = Path(vllm_mm_ext.__file__).parent / "assets" / "composer-tiny"


@pytest.fixture(autouse=True)
def quiet(monkeypatch: pytest.MonkeyPatch) -> None:
    # The command sets them, unless they are set.
    monkeypatch.setenv("VLLM_LOGGING_LEVEL", "ERROR")
    monkeypatch.setenv("TRANSFORMERS_VERBOSITY", "error")


def run(*arguments: object) -> tuple[int, str, str]:
    done = CliRunner().invoke(app, ["plan", *map(str, arguments)])
    return done.exit_code, done.stdout, done.stderr


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--gpu", "h99"], ["--gpu h99", "h100-80gb", "24gb, or cpu"]),
        (["--gpu", "cpu", "--video", "20z"], ["--video 20z", "30s, 5m, 2h", "[@FPSfps]"]),
        (["--gpu", "cpu", "--tp", 2], ["--tp 2", "must be 1"]),
        (["--gpu", "cpu", "--reduction", "pools=2"], ["pools=2", "pool, temporal, static, keep"]),
        (["--gpu", "cpu", "--reduction", "pool=9"], ["pool", "less than or equal to 8"]),
        (["--gpu", "cpu", "--mm-processor-kwargs", "[1]"], ["[1]", "a JSON object"]),
        (["--gpu", "cpu", "--yaml", "no/such/a.yaml"], ["--yaml", "no folder no/such"]),
    ],
)
def test_bad_options_are_refused_with_option_value_and_what_is_valid(arguments, words):
    code, _, error = run(COMPOSER, *arguments)
    assert code == 2
    assert all(word in error for word in words), error


@pytest.mark.parametrize(
    ("family", "given", "medium"),
    [
        ("qwen2_5_vl", '{"max_pixels": "x"}', ("--image", 1)),
        ("qwen2_5_vl", '{"max_pixels": "x"}', ("--video", "2s:240p")),
        ("qwen2_5_vl", '{"max_pixels": 1}', ("--image", 1)),
        # vLLM warms the processor up with pictures as well.
        ("qwen2_5_omni", '{"max_pixels": 1}', ("--audio", "2s")),
    ],
)
def test_processor_options_that_the_processor_fails_with_are_named(family, given, medium):
    code, _, error = run(
        *(checkpoint(family), "--gpu", "cpu", "--host-gib", 8, *medium),
        *("--mm-processor-kwargs", given),
    )
    assert code == 2, error
    assert f"--mm-processor-kwargs {given}" in error


@pytest.mark.parametrize(
    ("model", "device", "code", "words"),
    [
        (str(COMPOSER), "NVIDIA H100 80GB HBM3", 2, "on NVIDIA H100 80GB HBM3 with tp 1"),
        ("another/model", "cpu", 0, "it is of another/model on cpu"),
    ],
)
def test_rates_of_other_hardware_are_refused_and_those_of_another_model_are_told(
    model, device, code, words, tmp_path
):
    gpu = gpu_of("h100-80gb", 0)
    rates = roofline(LLAMA_70B, gpu, 1)
    assert rates is not None
    file = tmp_path / "calibration.json"
    day = "2026-11-30"
    write(Calibration(VERSION, model, "x86_64", device, 1, "0.32", day, 9, 0.0, 0.1, rates), file)
    ended, _, error = run(
        *(COMPOSER, "--gpu", "cpu", "--video", "2s:240p", "--out", 2, "--calibration", file),
        *("--host-gib", 8),
    )
    assert ended == code, error
    assert words in error


def test_files_of_the_model_that_are_missing_are_named(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    code, _, error = run(tmp_path / "config.json", "--gpu", "cpu")
    assert code == 2
    assert "no preprocessor_config.json or processor_config.json" in error
    assert "tokenizer.json" in error


def test_what_fits_is_told_as_json_and_written(tmp_path):
    file = tmp_path / "plan.yaml"
    code, out, error = run(
        *(COMPOSER, "--gpu", "cpu", "--video", "20s@2fps:480p", "--concurrency", 4),
        *("--host-gib", 8, "--json", "--yaml", file),
    )
    assert code == 0, error
    told = json.loads(out)
    assert told["fits"]
    assert told["concurrency_that_fits"] == 4
    # 40 frames of 16 tokens, one token a 0.4 s of sound.
    (video,) = told["request"]["media"]
    assert (video["sampled_frames"], video["encoded_tokens"], video["sound_tokens"]) == (
        40,
        640,
        50,
    )
    assert "max-num-seqs: 4" in file.read_text()


def estimated(*arguments: object) -> dict[str, object]:
    """The estimate of a plan of the composer on H100s."""
    code, out, error = run(
        *(COMPOSER, "--gpu", "h100-80gb", "--video", "20s@2fps:480p", "--price-per-hour", 3),
        *("--estimate", "--json", *arguments),
    )
    assert code == 0, error
    return json.loads(out)["estimate"]


def test_replicas_beyond_the_clients_serve_nobody():
    alone = estimated("--concurrency", 1, "--dp", 1, "--cores", 8)
    four = estimated("--concurrency", 1, "--dp", 4, "--cores", 32)
    for name in ("requests a second", "seconds to the first token, median"):
        assert four["figures"][name] == pytest.approx(alone["figures"][name])
    price = "price of 1,000 requests"
    assert four["figures"][price] == pytest.approx([4 * one for one in alone["figures"][price]])
    five = estimated("--concurrency", 5, "--dp", 4, "--cores", 32)
    rate = "requests a second"
    assert alone["figures"][rate][1] < five["figures"][rate][1]
    assert five["figures"][rate][1] < 5.01 * alone["figures"][rate][1]
    assert max(alone["busy"].values()) <= 1


def test_decoding_is_counted_in_seconds_of_cores(tmp_path):
    def planned(threads):
        rates = roofline(LLAMA_70B, gpu_of("h100-80gb", 0), 1)
        each = [
            structs.replace(one, host=structs.replace(one.host, decode_threads=threads))
            for one in (rates.low, rates.middle, rates.high)
        ]
        file = tmp_path / f"{threads}.json"
        by = (VERSION, str(COMPOSER), "x86_64", "NVIDIA H100 80GB HBM3", 1, "0.32", "2026-11-30")
        write(Calibration(*by, 9, 0.0, 0.1, type(rates)(*each)), file)
        return estimated("--concurrency", 2, "--calibration", file)["figures"]

    one, two = planned(1.0), planned(2.0)
    name = "CPU seconds of decoding, a request"
    # What is probed takes one thread.
    assert all(1.5 * a < b < 2.0 * a for a, b in zip(one[name], two[name], strict=True))


def test_a_calibration_of_other_weights_is_told_of(tmp_path):
    rates = roofline(LLAMA_70B, gpu_of("h100-80gb", 0), 1)
    file = tmp_path / "calibration.json"
    by = (VERSION, str(COMPOSER), "x86_64", "cpu", 1, "0.32", "2026-11-30", 9, 0.0, 0.1)
    for dtype, told in (("", False), ("float64", True)):
        write(Calibration(*by, rates, dtype), file)
        _, _, error = run(
            *(COMPOSER, "--gpu", "cpu", "--video", "2s:240p", "--out", 2, "--calibration", file),
            *("--host-gib", 8),
        )
        assert ("weights in float64" in error) == told


def test_a_plan_by_the_configuration_file_of_a_model_serves_the_folder(tmp_path):
    file = tmp_path / "plan.yaml"
    code, _, error = run(
        *(COMPOSER / "config.json", "--gpu", "cpu", "--text", 20, "--host-gib", 8),
        *("--no-estimate", "--yaml", file),
    )
    assert code == 0, error
    assert yaml.safe_load(file.read_text())["model"] == str(COMPOSER)
    assert f"vllm serve {COMPOSER} --config" in error


def test_what_does_not_fit_ends_with_1_and_says_what_would(tmp_path):
    file = tmp_path / "plan.yaml"
    code, out, _ = run(
        *(COMPOSER, "--gpu", "cpu", "--video", "600s@2fps", "--context", 8192),
        *("--host-gib", 8, "--json", "--yaml", file),
    )
    assert code == 1
    assert not file.exists()
    told = json.loads(out)
    assert "8,192" in told["problems"][0]
    assert {lever["name"] for lever in told["levers"]} >= {"context", "frames", "reduction"}


def test_the_written_command_has_what_makes_the_file_and_nothing_else(monkeypatch):
    given = ["plan", "/copy", "--gpu", "cpu", "--calibration", "a.json", "--json", "--name=org/m"]
    monkeypatch.setattr(sys, "argv", ["vllm-mm", *given, "--price-per-hour", "2", "--out", "9"])
    assert _command("/copy", "org/m") == "vllm-mm plan org/m --gpu cpu --out 9"


def test_a_model_that_is_calibrated_may_be_downloaded(monkeypatch, tmp_path):
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    assert "HF_HUB_OFFLINE=0" in environment(["calibrate", str(COMPOSER)], tmp_path, monkeypatch)


@pytest.mark.parametrize(
    "error", [RuntimeError("429: full"), ClientPayloadError("cut"), TimeoutError()]
)
def test_a_calibration_that_fails_says_why_without_a_traceback(error, monkeypatch, tmp_path):
    def fail(*_: object) -> None:
        raise error

    monkeypatch.setattr(calibrating, "calibrate", fail)
    done = CliRunner().invoke(app, ["calibrate", "m", "--work-dir", str(tmp_path)])
    assert done.exit_code == 1
    assert "cannot calibrate" in done.stderr
    assert (str(error) or "TimeoutError") in done.stderr
