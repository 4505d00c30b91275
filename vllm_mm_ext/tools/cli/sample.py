"""``vllm-mm sample``: which frames a policy chooses from a file."""

from __future__ import annotations

import json
import math
from typing import Annotated, Any

import numpy as np
import typer
from rich.console import Console
from rich.table import Table

from vllm_mm_ext.media.types import DecodeRequest, DecodeResult, SamplingSpec, SizeRule
from vllm_mm_ext.tools.cli.common import (
    Fps,
    MaxFps,
    MaxFrames,
    MediaFile,
    MinFps,
    MinFrames,
    Policy,
    clock,
    media_errors,
)

# The pixels are not shown; decoding small is enough to know which frames can be decoded.
_SMALL = SizeRule(kind="max_edge", max_edge=64)


def sample(
    file: MediaFile,
    policy: Annotated[Policy, typer.Option(help="Sampling policy.")] = Policy.adaptive,
    max_frames: MaxFrames = 32,
    min_frames: MinFrames = 4,
    fps: Fps = 1.0,
    min_fps: MinFps = 0.1,
    max_fps: MaxFps = 8.0,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Show which frames of FILE a sampling policy chooses, and when they are shown."""
    from vllm_mm_ext.media.decode.job import run_job

    spec = SamplingSpec(
        policy=policy.value,
        fps=fps,
        max_frames=max_frames,
        min_frames=min(min_frames, max_frames),
        min_fps=min_fps,
        max_fps=max_fps,
    )
    with media_errors():
        result = run_job(str(file), DecodeRequest(sampling=spec, size=_SMALL))
    if as_json:
        typer.echo(json.dumps(as_dict(result)))
    else:
        _print_table(result, file.name)


def as_dict(result: DecodeResult) -> dict[str, Any]:
    """The ``--json`` form: ``duration`` (s), ``frames`` (index, time in s) and ``profile``.

    ``profile`` is null for policies that make none; in it, ``confirmed`` is null where no
    thumbnail was decoded.
    """
    assert result.selection is not None
    selection, profile = result.selection, result.selection.profile
    return {
        "duration": _number(_duration(result)),
        "policy": selection.policy,
        "frames": [
            {"index": int(index), "time": _number(time)}
            for index, time in zip(selection.indices, selection.times, strict=True)
        ],
        "profile": None
        if profile is None
        else {
            "time": [_number(value) for value in profile.time],
            "container": [_number(value) for value in profile.container],
            "confirmed": [_number(value) for value in profile.confirmed],
        },
    }


def _duration(result: DecodeResult) -> float:
    return result.info.video.duration if result.info.video else result.info.duration


def _number(value: float) -> float | None:
    return round(float(value), 6) if math.isfinite(value) else None


def _print_table(result: DecodeResult, title: str) -> None:
    assert result.selection is not None
    selection, profile = result.selection, result.selection.profile
    table = Table(title=f"{title}: {len(selection.indices)} frames, {selection.policy}")
    table.add_column("#", justify="right")
    table.add_column("frame", justify="right")
    table.add_column("time", justify="right")
    table.add_column("gap s", justify="right")
    if profile is not None:
        table.add_column("activity")
    previous = 0.0
    for number, (index, time) in enumerate(
        zip(selection.indices, selection.times, strict=True), start=1
    ):
        row = [str(number), str(index), clock(time), f"{time - previous:.2f}"]
        if profile is not None:
            bin_ = int(np.searchsorted(profile.time, time, side="right")) - 1
            level = float(profile.container[max(bin_, 0)])
            row.append("█" * max(1, round(level * 20)))
        table.add_row(*row)
        previous = float(time)
    console = Console()
    console.print(table)
    stages = ", ".join(f"{name} {seconds * 1e3:.0f} ms" for name, seconds in result.timings.items())
    console.print(f"{_duration(result):.2f} s of video; {stages}; decoder {result.decoder}")
