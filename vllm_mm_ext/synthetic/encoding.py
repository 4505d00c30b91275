"""Drawing and encoding behind ``testing.media``: pictures to planes, waveforms to packets."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from fractions import Fraction
from pathlib import Path
from typing import Protocol

import av
import numpy as np
import numpy.typing as npt
from av.audio.stream import AudioStream
from av.container import OutputContainer

from vllm_mm_ext.synthetic.scenes import Picture

STAMP_BITS = 16
_NOISE_PLANES = 8
# Ticks per frame period of a variable-rate clip.
_VFR_STEPS = 20


class Painter:
    """Enlarges a drawn picture to packed planes ``[height * 3 / 2, width]`` (yuv420p)."""

    def __init__(self, height: int, width: int, shrink: int, sigma: float, seed: int) -> None:
        self._height, self._width, self._shrink = height, width, shrink
        self._last: Picture | None = None
        self._planes = np.empty((height * 3 // 2, width), np.uint8)
        rng = np.random.default_rng(seed + 1)
        self._noise = [
            np.clip(rng.normal(0, sigma, (height, width)), -29, 29).astype(np.int8).view(np.uint8)
            for _ in range(_NOISE_PLANES if sigma else 0)
        ]
        self._rolls = rng.integers(0, width, 4096)

    def paint(self, picture: Picture, stamp: int | None, number: int) -> npt.NDArray[np.uint8]:
        if picture is not self._last:
            self._enlarge(picture)
            self._last = picture
        if stamp is None and not self._noise:
            return self._planes
        out = self._planes.copy()
        if self._noise:
            # uint8 wrap-around is exact: pictures keep 29 steps off both ends.
            noise = self._noise[number % len(self._noise)].ravel()
            luma = out[: self._height].reshape(-1)
            roll = int(self._rolls[number % len(self._rolls)])
            luma[roll:] += noise[: luma.size - roll]
            luma[:roll] += noise[luma.size - roll :]
        if stamp is not None:
            cell = self._width / STAMP_BITS
            for k in range(STAMP_BITS):
                level = 220 if stamp >> k & 1 else 24
                out[: max(2, self._height // 16), round(k * cell) : round((k + 1) * cell)] = level
        return out

    def _enlarge(self, picture: Picture) -> None:
        h, w, s = self._height, self._width, self._shrink
        luma = self._planes[:h].reshape(h // s, s, w // s, s)
        luma[:] = picture.y[:, None, :, None]
        chroma = self._planes[h:].reshape(2, h // 2, w // 2)
        half = s // 2
        for target, plane in zip(chroma, (picture.u, picture.v), strict=True):
            target.reshape(h // s, half, w // s, half)[:] = plane[:, None, :, None]


class Track(Protocol):
    """Mono samples in -1..1, as an array of them or made as they are asked for."""

    def __len__(self) -> int: ...

    def __getitem__(self, span: slice, /) -> npt.NDArray[np.float32]: ...


class AudioWriter:
    """Encodes a mono waveform to one stream, keeping step with the video."""

    _CHUNK = 4800

    def __init__(
        self,
        container: OutputContainer,
        codec: str,
        rate: int,
        channels: int,
        samples: Track,
    ) -> None:
        stream = container.add_stream(codec, rate=rate)
        assert isinstance(stream, AudioStream)
        stream.layout = "stereo" if channels == 2 else "mono"
        self._container, self._stream, self._rate = container, stream, rate
        self._samples, self._channels, self._done = samples, channels, 0
        names = [fmt.name for fmt in stream.codec_context.codec.audio_formats or []]
        self._kind = next(n for n in ("s16", "s16p", "fltp", "flt") if not names or n in names)
        stream.format = av.AudioFormat(self._kind)
        self._chunks = self._encode()

    def _encode(self) -> Iterator[int]:
        layout = self._stream.layout.name
        resampler = av.AudioResampler(format=self._kind, layout=layout, rate=self._rate)
        for start in range(0, len(self._samples), self._CHUNK):
            chunk = self._samples[start : start + self._CHUNK]
            frame = av.AudioFrame.from_ndarray(
                np.repeat(chunk[None], self._channels, axis=0), format="fltp", layout=layout
            )
            frame.sample_rate, frame.pts = self._rate, start
            frame.time_base = Fraction(1, self._rate)
            for converted in resampler.resample(frame):
                self._container.mux(self._stream.encode(converted))
            yield start + len(chunk)

    def write_until(self, time: float) -> None:
        while self._done < time * self._rate:
            self._done = next(self._chunks, len(self._samples) + 10**12)

    def finish(self) -> None:
        for _ in self._chunks:
            pass
        self._container.mux(self._stream.encode(None))


def frame_ticks(
    rate: Fraction, duration: float, vfr: bool, seed: int
) -> tuple[npt.NDArray[np.int64], Fraction]:
    """Presentation times ``[n]`` and the seconds per unit they are in."""
    time_base = 1 / (rate * _VFR_STEPS) if vfr else 1 / rate
    count = max(1, round(duration * rate))
    if not vfr:
        return np.arange(count, dtype=np.int64), time_base
    gaps = np.random.default_rng(seed).integers(_VFR_STEPS, 4 * _VFR_STEPS + 1, count)
    ticks = np.concatenate([[0], np.cumsum(gaps)])
    return ticks[ticks < count * _VFR_STEPS].astype(np.int64), time_base


def default_audio_codec(path: Path) -> str:
    """FFmpeg encoder that fits the container a suffix stands for."""
    by_suffix = {".wav": "pcm_s16le", ".mp3": "libmp3lame", ".flac": "flac"}
    by_suffix |= dict.fromkeys((".ogg", ".opus", ".webm"), "libopus")
    return by_suffix.get(path.suffix.lower(), "aac")


@contextmanager
def own_priority() -> Iterator[None]:
    """Keep this thread's scheduling policy as it is.

    SVT-AV1, where it may, makes the thread that opens an encoder real-time (SCHED_FIFO, 99), and
    what the thread starts afterwards inherits that: servers whose speed is measured, and encoders
    whose threads wait for each other in a loop (``findings/svt_av1_real_time.sh``).
    """
    policy, parameters = os.sched_getscheduler(0), os.sched_getparam(0)
    try:
        yield
    finally:
        if os.sched_getscheduler(0) != policy:
            os.sched_setscheduler(0, policy, parameters)


def encoder_options(
    codec: str, preset: str, quality: int, bframes: int, open_gop: bool
) -> dict[str, str]:
    """Options that make a codec fast, with its quality near libx264\'s at ``crf`` ``quality``."""
    options = {"bf": str(bframes)} if bframes or codec.startswith("libx26") else {}
    if codec in ("libx264", "libx265"):
        options |= {"preset": preset, "crf": str(quality)}
        if open_gop:
            options["x264-params"] = "open-gop=1"
    elif codec == "mpeg4":
        options["flags"] = "+qscale"
    elif codec.startswith("libvpx"):
        options |= {"crf": str(quality), "b": "0", "deadline": "realtime", "cpu-used": "8"}
    elif codec == "libsvtav1":
        options = {"preset": "12", "crf": str(quality + 10)}
    return options
