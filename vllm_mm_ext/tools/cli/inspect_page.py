"""The page of ``vllm-mm inspect``: HTML with inline SVG and images, nothing loaded from outside."""

from __future__ import annotations

import base64
import io
import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from vllm_mm_ext.media.types import ActivityProfile, FrameSelection, MediaInfo
from vllm_mm_ext.tools.cli.common import byte_text, clock
from vllm_mm_ext.tools.cli.page import axis, environment, percent, round_step
from vllm_mm_ext.tools.cli.token_count import Family, TokenCount

# Points of a curve: more than a wide screen has pixels for gains nothing.
_COLUMNS = 1000
_MEL_COLUMNS = 1200
_JPEG_QUALITY = 74
_COLORS = ("#3b5bdb", "#d9480f", "#2b8a3e")
# Dark blue to yellow, evenly growing in brightness, for the spectrogram.
_RAMP = (
    (12, 16, 52),
    (52, 35, 120),
    (140, 41, 129),
    (222, 73, 104),
    (254, 159, 109),
    (252, 253, 191),
)

Floats = npt.NDArray[np.float32]


@dataclass(frozen=True, eq=False)
class Choice:
    """What one policy chose: the selection, its frames uint8 ``[n, h, w, 3]``, their tokens."""

    selection: FrameSelection
    frames: npt.NDArray[np.uint8]
    tokens: TokenCount


@dataclass(frozen=True, eq=False)
class Inspection:
    """Everything the page shows.

    Attributes:
        name: File name.
        info: Probe of the file.
        choices: One per policy; empty without video.
        family: Model family whose tokens are counted.
        audio: float32 mono ``[samples]`` or None.
        audio_rate: Its Hz.
        audio_tokens: Tokens of the sound in that family.
    """

    name: str
    info: MediaInfo
    choices: tuple[Choice, ...]
    family: Family
    audio: Floats | None
    audio_rate: int
    audio_tokens: int


def render(inspection: Inspection) -> str:
    """The page as one HTML document."""
    video = inspection.info.video
    duration = max(inspection.info.duration, video.duration if video else 0.0, 1e-3)
    profile = next((c.selection.profile for c in inspection.choices if c.selection.profile), None)
    step = round_step(duration, 8)
    template = environment().get_template("inspect.html.j2")
    return template.render(
        name=inspection.name,
        facts=_facts(inspection),
        axis=axis(duration, lambda seconds: _tick_text(seconds, step)),
        activity=None if profile is None else _activity(profile, duration),
        keyframes=_keyframes(inspection.info, duration),
        policies=[
            _policy(choice, color, duration)
            for choice, color in zip(inspection.choices, _cycle(_COLORS), strict=False)
        ],
        spans=_spans(inspection.choices, duration),
        audio=_audio(inspection, duration),
        family=inspection.family,
        audio_tokens=inspection.audio_tokens,
    )


def _cycle(colors: tuple[str, ...]) -> list[str]:
    return list(colors) * 2


def _facts(inspection: Inspection) -> list[tuple[str, str]]:
    info = inspection.info
    facts = [
        ("Duration", clock(info.duration)),
        ("File", f"{_container(inspection)}, {byte_text(info.num_bytes)}"),
    ]
    if (video := info.video) is not None:
        rotated = ", mirrored" if video.mirrored else ""
        rotated += f", turned {video.rotation}°" if video.rotation else ""
        rate = "variable, mean " if video.is_vfr else ""
        facts += [
            ("Video", f"{video.codec}, {video.width} x {video.height}{rotated}"),
            ("Frames", f"{video.num_frames} at {rate}{video.fps:.4g} fps"),
        ]
        if info.packets is not None and (keys := int(info.packets.is_key.sum())):
            interval = f"{video.duration / keys:.2g} s apart" if keys > 1 else "at the start"
            facts.append(("Keyframes", f"{keys}, {interval}"))
    else:
        facts.append(("Video", "none"))
    if not info.audio:
        facts.append(("Audio", "none"))
    for audio in info.audio:
        channels = {1: "mono", 2: "stereo"}.get(audio.channels, f"{audio.channels} channels")
        facts.append(("Audio", f"{audio.codec}, {audio.sample_rate / 1000:g} kHz {channels}"))
    return facts


def _container(inspection: Inspection) -> str:
    """One of the demuxer's names: that of the file's suffix if it is among them."""
    names = inspection.info.container.split(",")
    suffix = inspection.name.rpartition(".")[2].lower()
    return suffix if suffix in names else names[0]


def _tick_text(seconds: float, step: float) -> str:
    return clock(seconds, 0 if step >= 1 else 1)


def _activity(profile: ActivityProfile, duration: float) -> dict[str, Any]:
    """SVG paths in a 1000 x 100 box: container activity as an area, confirmed motion as bars.

    Activity is drawn on its own scale of 0 to 1, motion relative to the strongest.
    """
    edges = np.append(profile.time, duration).clip(0, duration) / duration * 1000
    heights = 100 - np.nan_to_num(profile.container.clip(0, 1)) * 96
    stride = max(1, math.ceil(len(heights) / _COLUMNS))
    starts = np.arange(0, len(heights), stride)
    # The highest of the merged bins (the least y), so that short peaks stay visible.
    tops = np.minimum.reduceat(heights, starts) if len(heights) else heights
    ends = edges[np.minimum(starts + stride, len(edges) - 1)]
    steps = " ".join(
        f"L{left:.1f} {top:.1f} L{right:.1f} {top:.1f}"
        for left, right, top in zip(edges[starts], ends, tops, strict=True)
    )
    scores = profile.confirmed
    known = np.flatnonzero(np.isfinite(scores))
    peak = max(float(scores[known].max()), 1e-6) if len(known) else 1.0
    centers = (edges[:-1] + edges[1:]) / 2
    bars = " ".join(f"M{centers[i]:.1f} 100V{98 - float(scores[i]) / peak * 94:.1f}" for i in known)
    return {"area": f"M0 100 {steps} L1000 100Z", "bars": bars, "confirmed": len(known)}


def _keyframes(info: MediaInfo, duration: float) -> str:
    """SVG path of one tick per keyframe; empty where they would fill the strip."""
    if info.packets is None:
        return ""
    times = info.packets.time[info.packets.is_key]
    return _ticks(times, duration) if len(times) <= _COLUMNS // 4 else ""


def _ticks(times: npt.NDArray[np.float64], duration: float) -> str:
    # Kept off the edges, where half of the line would be cut away.
    places = (times / duration * 1000).clip(1.5, 998.5)
    return " ".join(f"M{place:.1f} 0V100" for place in places)


def _policy(choice: Choice, color: str, duration: float) -> dict[str, Any]:
    times = choice.selection.times
    return {
        "name": choice.selection.policy,
        "color": color,
        "count": len(times),
        "ticks": _ticks(times, duration),
        "largest_gap": float(np.diff(times, prepend=0.0, append=duration).max()),
        "tokens": choice.tokens,
    }


def _spans(choices: tuple[Choice, ...], duration: float) -> list[dict[str, Any]]:
    """Rows of equal time, each with every policy's frames in it."""
    if not choices:
        return []
    step = round_step(duration, 12)
    spans = []
    for start in np.arange(0, duration - 1e-6, step).tolist():
        end = min(start + step, duration)
        cells = [
            [
                {
                    "src": _jpeg(choice.frames[i]),
                    "time": clock(choice.selection.times[i], 2),
                    "index": int(choice.selection.indices[i]),
                }
                for i in np.flatnonzero(
                    (choice.selection.times >= start - 1e-9)
                    & (choice.selection.times < start + step - 1e-9)
                )
            ]
            for choice in choices
        ]
        spans.append(
            {"start": _tick_text(start, step), "end": _tick_text(end, step), "cells": cells}
        )
    return spans


def _audio(inspection: Inspection, duration: float) -> dict[str, Any] | None:
    """Waveform envelope as an SVG path, log-mel strip as an image, and the share they cover."""
    audio, rate = inspection.audio, inspection.audio_rate
    if audio is None or not len(audio):
        return None
    from vllm_mm_ext.media.audio.waveforms import log_mel, resample

    seconds = len(audio) / rate
    spectrogram = log_mel(resample(audio, rate))
    return {
        "path": _envelope(audio),
        "width": percent(seconds, duration),
        "mel": _spectrogram(spectrogram),
        "bins": spectrogram.shape[0],
        "seconds": seconds,
        "cut": bool(inspection.info.audio and inspection.info.audio[0].duration - seconds > 1),
    }


def _envelope(audio: Floats) -> str:
    """Closed SVG path around the extremes of each column, scaled to the loudest sample."""
    starts = np.linspace(0, len(audio), min(_COLUMNS, len(audio)), endpoint=False, dtype=np.int64)
    scale = 48 / max(float(np.abs(audio).max()), 1e-4)
    x = np.linspace(0, 1000, len(starts))
    high = 50 - np.maximum.reduceat(audio, starts) * scale
    low = 50 - np.minimum.reduceat(audio, starts) * scale
    upper = " ".join(f"{a:.1f} {b:.1f}" for a, b in zip(x, high, strict=True))
    lower = " ".join(f"{a:.1f} {b:.1f}" for a, b in zip(x[::-1], low[::-1], strict=True))
    return f"M{upper} L{lower}Z"


def _spectrogram(spectrogram: Floats) -> str:
    """Palette PNG of ``[mels, frames]``, low frequencies at the bottom."""
    frames = spectrogram.shape[1]
    if frames > _MEL_COLUMNS:
        starts = np.linspace(0, frames, _MEL_COLUMNS, endpoint=False, dtype=np.int64)
        spectrogram = np.maximum.reduceat(spectrogram, starts, axis=1)
    low, high = float(spectrogram.min()), float(spectrogram.max())
    levels = ((spectrogram - low) / max(high - low, 1e-6) * 255).astype(np.uint8)
    image = Image.fromarray(np.ascontiguousarray(levels[::-1]))
    palette = np.stack(
        [
            np.interp(np.linspace(0, 1, 256), np.linspace(0, 1, len(_RAMP)), channel)
            for channel in zip(*_RAMP, strict=True)
        ],
        axis=1,
    )
    image.putpalette(palette.astype(np.uint8).tobytes())
    return _data_uri(image, "PNG", optimize=True)


def _jpeg(frame: npt.NDArray[np.uint8]) -> str:
    return _data_uri(Image.fromarray(frame), "JPEG", quality=_JPEG_QUALITY)


def _data_uri(image: Image.Image, kind: str, **options: Any) -> str:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return f"data:image/{kind.lower()};base64,{base64.b64encode(buffer.getvalue()).decode()}"
