"""Schedulers on a simulated clock: costs, traces, figures."""

from __future__ import annotations

from dataclasses import astuple
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from typer.testing import CliRunner

from vllm_mm_ext.tools.bench.bench_cli import app
from vllm_mm_ext.tools.bench.commands import TrafficKind
from vllm_mm_ext.tools.bench.harness import BenchContext
from vllm_mm_ext.tools.bench.scheduler_bench import Outcome, percentile, play, run, target_ms
from vllm_mm_ext.tools.bench.scheduler_clock import Timing
from vllm_mm_ext.tools.bench.scheduler_costs import MEASURED, StepContents, StepCosts
from vllm_mm_ext.tools.bench.scheduler_traffic import TRACES, Arrival, Trace, trace_of

COSTS = StepCosts.read(MEASURED)


def test_contents_of_a_step_are_told_from_what_vllm_scheduled() -> None:
    requests = {
        "decodes": SimpleNamespace(num_computed_tokens=101, num_prompt_tokens=100),
        "video": SimpleNamespace(
            num_computed_tokens=300, num_prompt_tokens=400, get_num_encoder_embeds=lambda _: 64
        ),
    }
    output = SimpleNamespace(
        num_scheduled_tokens={"decodes": 1, "video": 100},
        scheduled_encoder_inputs={"video": [3, 4]},
    )
    assert StepContents.of(requests, output) == StepContents(
        decodes=1,
        decode_context=100,
        prompts=1,
        prefill=100,
        pairs=100 * 250.0,
        calls=1,
        items=2,
        encoded=128,
    )


def test_costs_are_found_though_some_steps_were_held_up() -> None:
    rng = np.random.default_rng(0)
    costs = StepCosts(0.01, 1e-4, 1e-6, 2e-3, 4e-4, 2e-7, 1e-3, 5e-4, 2e-4)
    steps = []
    for number in range(300):
        most = (16, 4000, 1, 900, 1e6, 1, 8, 900)
        parts = [float(rng.integers(0, int(n) + 1)) for n in most]
        contents = StepContents(*parts)  # type: ignore[arg-type]
        steps.append((contents, costs.seconds(contents) * (5 if number % 29 == 0 else 1)))
    found, error = StepCosts.fitted(steps)
    assert astuple(found) == pytest.approx(astuple(costs), rel=0.05)
    assert error < 0.01


def test_costs_are_read_as_they_were_written(tmp_path: Path) -> None:
    COSTS.write(tmp_path / "costs.txt", source="here", steps=3, off=0.1)
    assert StepCosts.read(tmp_path / "costs.txt") == COSTS


@pytest.mark.parametrize(
    ("text", "said"),
    [("step x\n", "1: 'x' is no number"), ("step 1\n", "decode_context"), ("", "got nothing")],
)
def test_a_file_that_is_not_one_of_costs_is_refused(tmp_path: Path, text: str, said: str) -> None:
    (tmp_path / "costs.txt").write_text(text)
    with pytest.raises(ValueError, match=said):
        StepCosts.read(tmp_path / "costs.txt")


@pytest.mark.parametrize("kind", TrafficKind)
def test_the_trace_in_the_repository_is_that_of_seed_0(kind: TrafficKind) -> None:
    made = trace_of(kind, 0, COSTS)
    assert Trace.read(TRACES / f"{kind}.txt") == made
    assert trace_of(kind, 1, COSTS) != made


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("0 10 0 4", ":4: wanted .* got '0 10 0 4'"),
        ("0 0 64 4 0", ":4: less than there can be"),
        ("slots 0", "above 0"),
        ("", "and requests"),
    ],
)
def test_a_file_that_is_no_trace_is_refused(tmp_path: Path, line: str, said: str) -> None:
    file = tmp_path / "trace.txt"
    file.write_text(f"slots 4\nstep_tokens 512\naging_s 9\n{line}\n")
    with pytest.raises(ValueError, match=said):
        Trace.read(file)


def test_figures_are_those_of_the_timings() -> None:
    requests = (Arrival(0.0, 9, 0, 3), Arrival(1.0, 9, 64, 2))
    found = Outcome(requests, (Timing(0.0, [0.5, 1.0, 2.0]), Timing(1.0, [3.0, 5.0])))
    assert found.itl() == [0.5, 1.0]
    assert found.ttft(video=True) == [2.0]
    assert found.ttft(video=False) == [0.5]
    assert found.per_minute() == 60 / 4
    assert (found.answered(), found.longest_wait()) == (5.0, 2.0)
    assert percentile(range(100), 99) == 99


@pytest.mark.parametrize("plugin", [False, True])
def test_every_request_is_answered_and_every_run_is_the_same(plugin: bool) -> None:
    trace = trace_of(TrafficKind.six_on_four, 1, COSTS)
    found = [play(trace, COSTS, plugin=plugin, target=target_ms(COSTS)) for _ in range(2)]
    assert found[0] == found[1]
    for request, timing in zip(found[0].requests, found[0].timings, strict=True):
        assert len(timing.tokens) == request.answer


def test_what_a_rule_gains_is_told_for_any_trace(tmp_path: Path) -> None:
    file = tmp_path / "trace.txt"
    Trace(4, 512, 9.0, (Arrival(0.0, 50, 300, 4), Arrival(0.1, 40, 0, 9))).write(file, "a test")
    result = run(BenchContext(1, tmp_path), trace=file, ablate=True)
    assert {row.name.partition(":")[0] for row in result.rows} == {"mixed"}
    assert all(row.ratio for row in result.rows)
    assert any(note.startswith("without ") for note in result.notes)


def test_the_command_says_what_is_wrong_with_a_trace(tmp_path: Path) -> None:
    (tmp_path / "trace.txt").write_text("nonsense\n")
    found = CliRunner().invoke(app, ["scheduler", "--trace", str(tmp_path / "trace.txt")])
    assert found.exit_code == 2
    assert "nonsense" in found.output
