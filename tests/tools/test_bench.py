"""Bench harness: rows, JSON, registry, command line."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import av
import pytest
from click import unstyle
from rich.console import Console
from typer.testing import CliRunner

from vllm_mm_ext.testing.checkpoints import checkpoint
from vllm_mm_ext.tools.bench import commands as registry
from vllm_mm_ext.tools.bench.bench_cli import app
from vllm_mm_ext.tools.bench.bench_clips import cached_clip, other_pictures, variant
from vllm_mm_ext.tools.bench.harness import BenchContext, BenchResult, Row
from vllm_mm_ext.tools.bench.inprocess import Measurer
from vllm_mm_ext.tools.bench.load_ramp import PHASES, timetable
from vllm_mm_ext.tools.bench.mixed_engine import (
    QUEUED_VIDEOS,
    STEPS_PER_VIDEO,
    TEXT_EVERY_TOKENS,
    VIDEO_FRAMES,
    VIDEO_FRAMES_LEAST,
    VIDEO_FRAMES_MOST,
    VIDEO_S,
    Load,
)


def test_row_holds_medians_ratio_and_every_run() -> None:
    row = Row.of("x", "ms", stock=[10, 30, 20], plugin=[2, 4])
    assert row.as_dict() == {
        "name": "x",
        "unit": "ms",
        "stock": 20,
        "plugin": 3,
        "ratio": 0.15,
        "runs": {"stock": [10, 30, 20], "plugin": [2, 4]},
    }
    assert row.spread("stock") == 1.0
    assert Row.of("x", "ms", stock=[1], plugin=[]).spread("stock") is None


@pytest.mark.parametrize(("stock", "plugin"), [([], [1.0]), ([0.0], [1.0]), ([1.0], []), ([], [])])
def test_ratio_is_none_where_it_means_nothing(stock: list[float], plugin: list[float]) -> None:
    assert Row.of("x", "ms", stock=stock, plugin=plugin).ratio is None


def test_sides_that_did_different_work_have_no_ratio() -> None:
    row = Row.of("x", "count", stock=[2.0], plugin=[3.0]).without_ratio()
    assert (row.stock, row.plugin, row.ratio) == (2.0, 3.0, None)


def test_json_is_a_list_of_rows(tmp_path: Path) -> None:
    result = BenchResult("b", [Row.of("x", "ms", stock=[1], plugin=[2])])
    result.write_json(tmp_path / "deep" / "rows.json")
    (row,) = json.loads((tmp_path / "deep" / "rows.json").read_text())
    assert set(row) == {"name", "unit", "stock", "plugin", "ratio", "runs"}


def test_table_shows_both_sides_ratio_and_spread() -> None:
    console = Console(width=160, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    BenchResult("b", [Row.of("x", "ms", stock=[1000, 2000], plugin=[100, 200])], ["note"]).print(
        console
    )
    text = console.export_text()
    for shown in ("1,500", "150", "0.100x", "67%, 67%", "note"):
        assert shown in text


def test_list_names_every_benchmark_with_what_it_shows() -> None:
    output = CliRunner(env={"COLUMNS": "200"}).invoke(app, ["list"]).output
    for benchmark in registry.BENCHMARKS.values():
        assert benchmark.name in output
        assert benchmark.shows in output


def test_every_benchmark_names_an_existing_function() -> None:
    for benchmark in registry.BENCHMARKS.values():
        assert callable(benchmark.load())


@pytest.mark.parametrize(
    "arguments",
    [
        ["fit"],
        ["conversations"],
        ["window-decode"],
        ["media-robustness"],
        ["sampling", "--footage"],
    ],
    ids=" ".join,
)
def test_repeats_are_refused_where_nothing_is_repeated(
    arguments: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def run(*_: object) -> BenchResult:
        return BenchResult("measured", [])

    monkeypatch.setattr(registry.Benchmark, "load", lambda _: run)
    monkeypatch.setattr("vllm_mm_ext.tools.bench.footage.run", run)
    assert CliRunner().invoke(app, arguments).exit_code == 0
    refused = CliRunner().invoke(app, [*arguments, "--repeats", "2"])
    assert refused.exit_code == 2
    assert "--repeats" in unstyle(refused.output)


@pytest.mark.parametrize(
    ("arguments", "repeats"),
    [(["followup"], 3), (["followup", "--repeats", "2"], 2), (["sampling", "--repeats", "4"], 4)],
)
def test_other_benchmarks_repeat_as_they_are_told(
    arguments: list[str], repeats: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[int] = []

    def run(context: BenchContext) -> BenchResult:
        told.append(context.repeats)
        return BenchResult("measured", [])

    monkeypatch.setattr(registry.Benchmark, "load", lambda _: run)
    assert CliRunner().invoke(app, arguments).exit_code == 0
    assert told == [repeats]


def test_context_refuses_no_repeats(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="at least 1"):
        BenchContext(0, tmp_path)


def test_a_variant_has_other_bytes_and_the_same_frames(tmp_path: Path) -> None:
    clip = cached_clip(tmp_path, width=64, height=48, duration=0.5, gop=30)
    assert cached_clip(tmp_path, width=64, height=48, duration=0.5, gop=30) == clip
    copies = [variant(clip, tmp_path / f"{number}.mp4", number) for number in range(2)]
    assert len({file.read_bytes() for file in (clip, *copies)}) == 3
    frames = [_frames(file) for file in (clip, *copies)]
    assert frames[0] == frames[1] == frames[2]


def test_clips_of_other_numbers_have_no_picture_in_common(tmp_path: Path) -> None:
    size = {"width": 64, "height": 48, "duration": 3.0}
    found = [_frames(other_pictures(tmp_path, number, **size)) for number in range(3)]
    assert len({frame for frames in found for frame in frames}) == 3 * 12


def _frames(file: Path) -> list[bytes]:
    with av.open(str(file)) as container:
        return [frame.to_ndarray().tobytes() for frame in container.decode(video=0)]


def test_arrivals_of_a_ramp_follow_its_phases() -> None:
    times = timetable(5.0)
    assert times == sorted(times)
    begin = 0.0
    for share, seconds in PHASES:
        inside = [t for t in times if begin <= t < begin + seconds]
        assert len(inside) == round(5.0 * share * seconds)
        begin += seconds


def test_load_follows_how_fast_the_engine_is_within_what_stock_has_room_for() -> None:
    load = Load.of(token_s=0.02, video_s=2 * VIDEO_S, video_tokens=1800.0)
    step_tokens = 32 * round(900 / STEPS_PER_VIDEO / 32)
    assert load == Load(TEXT_EVERY_TOKENS * 0.02, VIDEO_FRAMES // 2, step_tokens)
    assert Load.of(0.02, 1e-3, 1800.0).video_frames == VIDEO_FRAMES_MOST
    assert Load.of(0.02, 1e3, 1800.0).video_frames == VIDEO_FRAMES_LEAST


@pytest.mark.engine
@pytest.mark.slow
def test_a_measuring_engine_answers_until_it_fails_and_says_why() -> None:
    model = str(checkpoint("qwen2_5_vl"))
    with Measurer("mixed_engine", "plugin", [model, "50", "4", "1024"]) as engine:
        alone = engine.ask(["alone"])
        assert 0 < alone["token_s"] < alone["text_s"] < alone["video_s"]
        assert alone["video_tokens"] > VIDEO_FRAMES
        load = asdict(Load(text_every_s=1.0, video_frames=16, step_tokens=1024))
        queued = engine.ask(["queued", load])
        assert len(queued["videos_s"]) == QUEUED_VIDEOS
        with pytest.raises(RuntimeError, match=r"mixed_engine \(plugin\) failed[\s\S]*forgotten"):
            engine.ask(["forgotten", load])
