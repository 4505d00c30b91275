"""``vllm-mm inspect``: one self-contained page about a file and the frames policies choose."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from vllm_mm_ext.media.types import DecodeLimits, DecodeRequest, SamplingSpec, SizeRule
from vllm_mm_ext.tools.cli.common import (
    Fps,
    MaxFps,
    MaxFrames,
    MediaFile,
    MinFps,
    MinFrames,
    Policy,
    media_errors,
    output_file,
    writing,
)
from vllm_mm_ext.tools.cli.token_count import FAMILIES, Family, FamilyName, count_tokens

if TYPE_CHECKING:
    from vllm_mm_ext.tools.cli.inspect_page import Inspection

_THUMBNAIL = SizeRule(kind="max_edge", max_edge=240)
_MAX_AUDIO_S = 600.0


def inspect(
    file: MediaFile,
    output: Annotated[Path, output_file("-o", "--output", help="HTML file to write.")],
    policies: Annotated[
        str, typer.Option(help="Policies to compare, separated by commas.")
    ] = "uniform,adaptive",
    family: Annotated[
        FamilyName, typer.Option(help="Model family whose tokens are counted.")
    ] = FamilyName.qwen25_omni,
    max_frames: MaxFrames = 32,
    min_frames: MinFrames = 4,
    fps: Fps = 1.0,
    min_fps: MinFps = 0.1,
    max_fps: MaxFps = 8.0,
) -> None:
    """Write a page that shows activity, chosen frames, sound and token counts of FILE."""
    specs = [
        SamplingSpec(
            policy=policy.value,
            fps=fps,
            max_frames=max_frames,
            min_frames=min(min_frames, max_frames),
            min_fps=min_fps,
            max_fps=max_fps,
        )
        for policy in _parse_policies(policies)
    ]
    from vllm_mm_ext.tools.cli.inspect_page import render

    with media_errors():
        inspection = _inspect(file, specs, FAMILIES[family])
    with writing(output):
        output.write_text(render(inspection), encoding="utf-8")
    typer.echo(f"{output}: {output.stat().st_size / 1024:.0f} KiB")


def _parse_policies(text: str) -> list[Policy]:
    names = [name.strip() for name in text.split(",") if name.strip()]
    unknown = [name for name in names if name not in list(Policy)]
    if unknown or not names:
        raise typer.BadParameter(
            f"{text!r}: choose from {', '.join(Policy)}", param_hint="--policies"
        )
    return [Policy(name) for name in dict.fromkeys(names)]


def _inspect(file: Path, specs: list[SamplingSpec], family: Family) -> Inspection:
    from vllm_mm_ext.media.decode.job import run_job
    from vllm_mm_ext.tools.cli.inspect_page import Choice, Inspection

    limits = DecodeLimits(max_audio_s=_MAX_AUDIO_S, truncate_audio=True)
    info = run_job(str(file), DecodeRequest(probe_only=True, limits=limits)).info
    audio, audio_rate = None, 0
    if info.audio:
        sound = run_job(str(file), DecodeRequest(audio="optional", limits=limits))
        audio, audio_rate = sound.audio, sound.audio_rate
    audio_s = len(audio) / audio_rate if audio is not None and audio_rate else 0.0
    choices = []
    for spec in specs if info.video is not None else ():
        done = run_job(str(file), DecodeRequest(sampling=spec, size=_THUMBNAIL, limits=limits))
        assert done.selection is not None
        assert done.frames is not None
        tokens = count_tokens(family, info.video, len(done.frames), audio_s)
        choices.append(Choice(done.selection, done.frames, tokens))
    return Inspection(
        name=file.name,
        info=info,
        choices=tuple(choices),
        family=family,
        audio=audio,
        audio_rate=audio_rate,
        audio_tokens=count_tokens(family, None, 0, audio_s).audio,
    )
