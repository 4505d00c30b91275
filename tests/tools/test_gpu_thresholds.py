"""The measured rule for NVDEC: from how much work on a GPU is the faster one."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllm_mm_ext.config.root import MMExtConfig
from vllm_mm_ext.testing.media import make_clip
from vllm_mm_ext.tools.bench.gpu_thresholds import (
    Point,
    break_even,
    findings,
    measure,
    why_no_gpu,
)


def points(codec: str, cpu: tuple[float, float], gpu: tuple[float, float]) -> list[Point]:
    """Times that lie on lines (start, slope)."""
    return [
        Point(codec, work, [cpu[0] + cpu[1] * work], [gpu[0] + gpu[1] * work], True)
        for work in (50.0, 200.0, 400.0)
    ]


def test_the_gpu_pays_from_where_the_lines_cross() -> None:
    assert break_even(points("h264", (0.0, 0.01), (1.0, 0.0))) == pytest.approx(100)
    assert break_even(points("h264", (0.0, 0.01), (0.1, 0.001))) == 50.0  # The least measured.
    assert break_even(points("h264", (0.0, 0.001), (1.0, 0.0))) is None  # Beyond what was measured.
    assert break_even(points("h264", (0.0, 0.001), (1.0, 0.002))) is None
    assert break_even(points("h264", (0.0, 0.01), (1.0, 0.0))[:1]) is None


@given(*[st.floats(0, 1) for _ in range(4)])
def test_a_threshold_is_never_outside_of_what_was_measured(
    a: float, b: float, c: float, d: float
) -> None:
    least = break_even(points("hevc", (a, b), (c, d)))
    assert least is None or 50 <= least <= 400


def test_the_findings_are_settings_that_the_configuration_takes() -> None:
    measured = [*points("h264", (0.0, 0.01), (1.0, 0.0)), *points("vp9", (0.0, 0.001), (1.0, 0.0))]
    same, settings, slower = findings(measured)
    assert "differ from PyAV's in 0 of 6" in same
    assert settings == "Settings: media.decode.nvdec.from_megapixels: {h264: 100}"
    assert slower.endswith(": vp9.")
    MMExtConfig.model_validate({"media": {"decode": {"nvdec": {"from_megapixels": {"h264": 100}}}}})
    wrong = [point._replace(same=point.megapixels < 400) for point in measured]
    assert findings(wrong)[-1] == "So it must not be used on this machine: no settings."
    assert findings([]) == ["The GPU takes none of the clips."]


def test_where_there_is_no_gpu_the_reason_is_told_and_nothing_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    reason = why_no_gpu()
    if not reason:
        pytest.skip("there is a GPU that decodes video")
    assert "driver" in reason or "GPU" in reason
    assert list(measure(make_clip(tmp_path / "a.mp4", gop=10, duration=1).path, 1)) == []
