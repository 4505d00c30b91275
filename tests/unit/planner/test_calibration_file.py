"""The calibration file: what is written is read again, and nothing else is."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from vllm_mm_ext.planner.calibration_file import VERSION, Calibration, read, write
from vllm_mm_ext.planner.gpu_facts import GpuFacts
from vllm_mm_ext.planner.host_work import MediumWork
from vllm_mm_ext.planner.model_facts import EncoderFacts, ModelFacts, TextFacts
from vllm_mm_ext.planner.roofline import HOST, roofline
from vllm_mm_ext.planner.step_contents import StepContents

GPU = GpuFacts("h100", "H100", 80 << 30, 989e12, 3350e9)
TEXT = TextFacts(28, 3584, 18944, 28, 4, 128, 152064, 0, 0, 7_600_000_000, 7_070_000_000)
VISION = EncoderFacts("vision", 32, 1280, 3420, 16, 670_000_000, 1176, 4, 3584, 64)
FACTS = ModelFacts("m", "A", "qwen2.5-vl", 2, 16 << 30, TEXT, VISION, None, 32768, 2)


def calibration() -> Calibration:
    rates = roofline(FACTS, GPU, 1)
    assert rates is not None
    return Calibration(
        VERSION, "m", "x86_64", "GPU", 1, "0.32.0", "2026-11-30", 200, 0.0, 0.05, rates
    )


def changed(file: Path, change: dict[str, Any]) -> Path:
    file.write_text(json.dumps({**json.loads(file.read_text()), **change}))
    return file


def test_what_is_written_is_read_again(tmp_path: Path) -> None:
    file = tmp_path / "a" / "calibration.json"
    write(calibration(), file)
    assert read(file) == calibration()


def test_a_file_from_before_media_in_caches_were_measured_is_read(tmp_path: Path) -> None:
    file = tmp_path / "calibration.json"
    write(calibration(), file)
    rates = json.loads(file.read_text())["rates"]
    for one in rates.values():
        del one["host"]["cached_medium"], one["host"]["cached_input"], one["step"]["inputs"]
    found = read(changed(file, {"rates": rates})).rates
    medium = MediumWork("h264", 20.0, 2.0, 0.0, 1000, 1000)
    for one in (found.low, found.middle, found.high):
        assert one.step.inputs == 0
        # What is known: it is a medium.
        assert medium.cached_s(one.host) == one.host.medium


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"version": 99}, "version 99"),
        ({"extra": 1}, "unknown field `extra`"),
        ({"rates": {}}, "missing required field `low`"),
        ({"steps": "many"}, "Expected `int`"),
    ],
)
def test_another_file_is_refused_with_what_is_wrong(
    tmp_path: Path, change: dict[str, Any], problem: str
) -> None:
    file = tmp_path / "calibration.json"
    write(calibration(), file)
    with pytest.raises(ValueError, match=problem):
        read(changed(file, change))


def test_a_negative_cost_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "calibration.json"
    write(calibration(), file)
    rates = json.loads(file.read_text())["rates"]
    rates["middle"]["step"]["prefill"] = -1.0
    with pytest.raises(ValueError, match=r"rates\.middle\.step\.prefill"):
        read(changed(file, {"rates": rates}))


def test_a_roofline_reads_all_weights_in_a_step_and_multiplies_them_with_each_token() -> None:
    rates = roofline(FACTS, GPU, 1)
    assert rates is not None
    step = rates.middle.step
    reading = 2 * 7.6e9 / 3350e9
    assert reading < step.seconds(StepContents(decodes=1, decode_context=1000)) < 2.5 * reading
    # 4,096 tokens: 54 TFLOP of weights, at 989 TFLOP/s at most.
    prefill = step.seconds(StepContents(prompts=1, prefill=4096, pairs=4096**2 / 2)) - step.step
    assert 0.053 < prefill < 0.2
    assert rates.middle.host == HOST


def test_a_roofline_of_a_mixture_reads_the_experts_that_the_tokens_of_a_step_choose() -> None:
    # Qwen3-30B-A3B: 8 of 128 experts of 4.7 million parameters in each of 48 layers.
    experts = 48 * 128 * 3 * 2048 * 768
    text = TextFacts(48, 2048, 768, 32, 4, 128, 152064, 128, 8, 30_500_000_000, 3_000_000_000)
    facts = replace(FACTS, text=text, weight_bytes=2 * text.parameters, expert_bytes=2 * experts)

    def seconds(decodes: int, dp: int = 1) -> float:
        rates = roofline(facts, GPU, 1, dp, decodes=decodes)
        assert rates is not None
        return rates.middle.step.seconds(StepContents(decodes=decodes))

    # What is read beside the active parameters: the table of embeddings.
    active = 2 * (text.active_parameters + 152064 * 2048) / (0.75 * 3350e9)
    assert active < seconds(1) < active + 3e-3
    all_of_them = 2 * text.parameters / (0.75 * 3350e9)
    assert seconds(1) < seconds(8) < seconds(64) < all_of_them + 7e-3
    # Each of four replicas reads its own quarter of them, for the tokens of all.
    assert all_of_them / 4 < seconds(64, dp=4) < seconds(64) / 2
    one, many = (roofline(facts, GPU, 1, decodes=count) for count in (1, 64))
    assert one is not None
    assert many is not None
    prompt = StepContents(prompts=1, prefill=4096, pairs=4096**2 / 2)
    assert one.middle.step.seconds(prompt) == pytest.approx(many.middle.step.seconds(prompt))
    assert one.middle.step.seconds(prompt) > all_of_them


def test_more_gpus_make_each_step_shorter() -> None:
    one, four = roofline(FACTS, GPU, 1), roofline(FACTS, GPU, 4)
    assert one is not None
    assert four is not None
    for contents in (
        StepContents(decodes=8, decode_context=80_000),
        StepContents(prompts=1, prefill=4096, pairs=4096**2 / 2),
        StepContents(encodes=1, items=4, vision=16_384, vision_pairs=1e7),
    ):
        assert four.middle.step.seconds(contents) < one.middle.step.seconds(contents)


def test_there_is_no_roofline_of_quantised_weights() -> None:
    assert roofline(replace(FACTS, quantization="awq"), GPU, 1) is None


def test_there_is_no_roofline_of_a_machine_whose_figures_are_not_known() -> None:
    assert roofline(FACTS, GpuFacts("24gb", "a GPU with 24 GiB", 24 << 30), 1) is None
