"""``vllm-mm sample``: which frames of a file a policy chooses, and how frames and sound are."""

from __future__ import annotations

import json
import math
from pathlib import Path
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
    folder_to_make,
    media_errors,
    output_file,
    writing,
)
from vllm_mm_ext.tools.cli.pcm import pcm16, write_wav
from vllm_mm_ext.tools.cli.token_count import FAMILIES, FamilyName

# Where the pixels are not written, decoding small is enough to know which frames can be decoded.
_SMALL = SizeRule(kind="max_edge", max_edge=64)
_RATE = 16_000


def sample(
    file: MediaFile,
    policy: Annotated[Policy, typer.Option(help="Sampling policy.")] = Policy.adaptive,
    max_frames: MaxFrames = 32,
    min_frames: MinFrames = 4,
    fps: Fps = 1.0,
    min_fps: MinFps = 0.1,
    max_fps: MaxFps = 8.0,
    family: Annotated[
        FamilyName | None,
        typer.Option(help="Write frames as this model family gets them; else at displayed size."),
    ] = None,
    video_stream: Annotated[
        int | None,
        typer.Option(min=0, help="Number of a video stream, from 0; else the one players show."),
    ] = None,
    audio_stream: Annotated[
        int | None,
        typer.Option(min=0, help="Number of an audio stream, from 0; else the one players play."),
    ] = None,
    wav: Annotated[
        Path | None,
        output_file(help="Write the sound here: 16 kHz, mono, 16 bit, on the picture's clock."),
    ] = None,
    frames: Annotated[
        Path | None,
        typer.Option(
            file_okay=False,
            callback=folder_to_make,
            help="Write the frames into this directory, as PNG.",
        ),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Show which frames of FILE a sampling policy chooses, and when they are shown.

    `--frames` and `--wav` write what the model gets: a frame's file is named by the frame's index
    and time, `000048_1.600000s.png`.
    """
    from vllm_mm_ext.media.decode.job import run_job

    rule = SizeRule() if family is None else FAMILIES[family].rule
    spec = SamplingSpec(
        policy=policy.value,
        fps=fps,
        max_frames=max_frames,
        min_frames=min(min_frames, max_frames),
        min_fps=min_fps,
        max_fps=max_fps,
        multiple_of=rule.temporal_factor if rule.kind in ("qwen_vl", "qwen3_vl") else 1,
        video_stream=video_stream,
    )
    with media_errors():
        probed = run_job(str(file), DecodeRequest(sampling=spec, probe_only=True))
        info = probed.info
        # Of a file without pictures, only the sound can be written.
        wanted = spec if info.video is not None or wav is None else None
        request = DecodeRequest(
            sampling=wanted,
            size=_SMALL if frames is None else rule,
            audio="none" if wav is None else "optional" if wanted is not None else "required",
            info=info,
            audio_stream=audio_stream,
        )
        result = run_job(str(file), request)
    result.timings.update(probed.timings)
    if frames is not None:
        with writing(frames):
            _write_frames(result, frames)
    samples = None
    if wav is not None:
        with writing(wav):
            samples = _write_sound(result, wav)
    if as_json:
        typer.echo(json.dumps(as_dict(result, samples)))
        return
    if result.selection is not None:
        _print_table(result, file.name)
    if wav is not None:
        heard = f"{samples / _RATE:.2f} s of sound: {wav}" if samples else "no sound to write"
        typer.echo(heard)


def _write_frames(result: DecodeResult, directory: Path) -> None:
    """Write each frame as ``INDEX_TIMEs.png``; an index that was chosen twice is written once."""
    from PIL import Image

    if result.frames is None or result.selection is None:
        return
    directory.mkdir(parents=True, exist_ok=True)
    selection = result.selection
    for index, time, pixels in zip(selection.indices, selection.times, result.frames, strict=True):
        Image.fromarray(pixels).save(directory / f"{index:06d}_{time:.6f}s.png")


def _write_sound(result: DecodeResult, path: Path) -> int:
    """Write the sound, resampled as for the model; without sound, no file.

    Returns:
        The number of samples written.
    """
    from vllm_mm_ext.media.audio.waveforms import resample

    if result.audio is None:
        return 0
    samples = resample(result.audio, result.audio_rate, _RATE)
    write_wav(str(path), pcm16(samples), _RATE)
    return len(samples)


def as_dict(result: DecodeResult, samples: int | None = None) -> dict[str, Any]:
    """The ``--json`` form: ``duration`` (s), ``frames`` (index, time in s) and ``profile``.

    ``profile`` is null for policies that make none; in it, ``confirmed`` is null where no
    thumbnail was decoded.

    Args:
        result: Of the decode job.
        samples: Samples of sound that were written; None adds no ``sound_s`` (s).
    """
    heard = {} if samples is None else {"sound_s": _number(samples / _RATE)}
    if result.selection is None:
        return {"duration": _number(_duration(result)), "policy": None, "frames": [], **heard}
    selection, profile = result.selection, result.selection.profile
    return {
        "duration": _number(_duration(result)),
        **heard,
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
