"""``vllm-mm calibrate`` on a real server: what the file holds, and estimates from it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from vllm_mm_ext.planner.calibration_file import VERSION, read
from vllm_mm_ext.testing.checkpoints import checkpoint
from vllm_mm_ext.tools.cli.main import app

pytestmark = [pytest.mark.engine, pytest.mark.slow]


def test_a_calibration_says_what_everything_costs_that_the_model_does(tmp_path: Path) -> None:
    from vllm_mm_ext.adapters.planning.estimates import Serving, estimate_load
    from vllm_mm_ext.adapters.planning.simulated_engine import EngineShape
    from vllm_mm_ext.planner.workload import Video, Workload
    from vllm_mm_ext.tools.calibration.calibrating import Model, Setting

    model, file = str(checkpoint("qwen2_5_omni")), tmp_path / "new" / "calibration.json"
    done = CliRunner().invoke(
        app, ["calibrate", model, "--out", str(file), "--work-dir", str(tmp_path)]
    )
    assert done.exit_code == 0, done.output
    assert str(file) in done.output.replace("\n", "")
    found = read(file)
    assert (found.version, found.model, found.tp) == (VERSION, model, 1)
    assert found.steps > 100
    rates = found.rates
    for one in (rates.low, rates.middle, rates.high):
        assert one.step.step > 0
        assert one.host.request > 0
        assert one.host.cached_medium is not None
        assert one.host.megapixel.keys() == {"h264", "hevc", "vp9", "av1", "picture"}
    assert rates.low.step.step < rates.middle.step.step < rates.high.step.step

    counted = Model(model, Setting.usual(is_cpu=True))
    workload = Workload((Video(8.0, 1.0, 640, 360),), text=100, output=8, concurrency=3)
    serving = Serving(8, 2048, 8192, EngineShape(32, 1000, 2048), decode_workers=2, cores=2)
    config = counted.planner.loaded.config
    estimate = estimate_load(config, serving, workload, counted.tokens_of(workload), rates)
    assert 0 < estimate.low.ttft_p50_s < estimate.middle.ttft_p50_s < estimate.high.ttft_p50_s
    assert estimate.low.requests_per_s < estimate.high.requests_per_s

    # A file of another version is no file to guess by.
    content = json.loads(file.read_text())
    file.write_text(json.dumps({**content, "version": VERSION + 1}))
    with pytest.raises(ValueError, match=f"version {VERSION + 1}"):
        read(file)
