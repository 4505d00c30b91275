"""Pictures and sound of a clip at any time, and the clip as a real file. numpy and PyAV."""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from os import PathLike
from typing import Any

import av
import numpy as np
import numpy.typing as npt
from av.video.stream import VideoStream

from vllm_mm_ext.composer.training.clips import Clip, Scene
from vllm_mm_ext.synthetic.encoding import AudioWriter

Frames = npt.NDArray[np.uint8]
Samples = npt.NDArray[np.float32]
Plane = npt.NDArray[Any]

# Part of a tone over which it swells and dies away.
_FADE_S = 0.02
# Where a moving object turns up and leaves, as shares of the picture.
_PATH = (0.24, 0.76)


def render_frames(clip: Clip, seconds: Sequence[float], size: int) -> Frames:
    """Pictures ``[times, size, size, 3]`` on screen at the given seconds."""
    grid = (np.arange(size, dtype=np.float32) + 0.5) / size
    out = np.empty((len(seconds), size, size, 3), np.uint8)
    for index, second in enumerate(seconds):
        scene = clip.scene_at(second)
        flash = clip.flash_at(second)
        behind = np.array(scene.background if flash is None else flash.rgb, np.float32)
        cover = object_cover(scene, second, grid)[..., None]
        front = np.array(scene.rgb, np.float32)
        out[index] = np.rint(behind + cover * (front - behind))
    return out


def coverage(clip: Clip, second: float, cells: int) -> npt.NDArray[np.float32]:
    """Share of each of ``[cells, cells]`` parts of the picture that the object takes."""
    grid = (np.arange(4 * cells, dtype=np.float32) + 0.5) / (4 * cells)
    fine = object_cover(clip.scene_at(second), second, grid)
    out: npt.NDArray[np.float32] = fine.reshape(cells, 4, cells, 4).mean(axis=(1, 3))
    return out


def object_cover(scene: Scene, second: float, grid: Plane) -> Plane:
    """Share of each pixel that the object takes, ``[len(grid), len(grid)]``.

    Args:
        scene: On screen.
        second: Within the scene.
        grid: Centres of the pixels both ways, as shares of the picture.
    """
    x, y = position(scene, second)
    distance = _distance(scene, grid[None, :] - x, grid[:, None] - y)
    return np.clip(0.5 - len(grid) * distance, 0, 1).astype(np.float32)


def position(scene: Scene, second: float) -> tuple[float, float]:
    """Centre of the object, as shares of the picture from the left and from the top."""
    done = (second - scene.start) / (scene.end - scene.start)
    there = _PATH[0] + done * (_PATH[1] - _PATH[0])
    match scene.motion:
        case "right":
            return there, scene.across
        case "left":
            return 1 - there, scene.across
        case "down":
            return scene.across, there
        case "up":
            return scene.across, 1 - there
        case "still":
            return scene.along, scene.across


def _distance(scene: Scene, x: Plane, y: Plane) -> Plane:
    """Signed distance to the outline, negative inside (exact enough for smooth edges)."""
    r = np.float32(scene.radius)
    out: Plane
    match scene.shape:
        case "circle":
            out = np.hypot(x, y) - r
        case "ring":
            out = np.abs(np.hypot(x, y) - r * 0.78) - r * 0.22
        case "bar":
            out = np.maximum(np.abs(x) - r, np.abs(y) - r * 0.36)
        case "cross":
            a, b = np.abs(x), np.abs(y)
            thick = r * 0.32
            out = np.minimum(np.maximum(a - r, b - thick), np.maximum(b - r, a - thick))
        case "triangle":
            # Apex above, sides with a slope of two.
            side = np.abs(x) * 0.894 - (y + r) * 0.447
            out = np.maximum(side, y - r * 0.75)
    return out


def render_sound(clip: Clip, start: float, end: float, rate: int = 16_000) -> Samples:
    """Samples ``[round((end - start) * rate)]`` of a span of the sound track, in -1..1.

    Raises:
        ValueError: The clip has no sound track.
    """
    if clip.tones is None:
        raise ValueError("the clip has no sound track")
    count = round((end - start) * rate)
    first = round(start * rate)
    out = np.zeros(count)
    for tone in clip.tones:
        begin, stop = round(tone.start * rate), round(tone.end * rate)
        low, high = max(begin, first), min(stop, first + count)
        if low >= high:
            continue
        time = (np.arange(low, high) - begin) / rate
        length = (stop - begin) / rate
        growth = np.log(tone.hz[1] / tone.hz[0]) / length
        # Phase of an exponential glide: the integral of hz[0] * exp(growth * t).
        turns = tone.hz[0] * (np.expm1(growth * time) / growth if growth else time)
        fade = np.clip(np.minimum(time, length - time) / _FADE_S, 0, 1)
        out[low - first : high - first] = tone.amplitude * fade * np.sin(2 * np.pi * turns)
    if clip.hiss:
        noise = np.random.default_rng(clip.seed % (1 << 63)).standard_normal(rate)
        out += clip.hiss * noise[(np.arange(count) + first) % rate]
    return np.clip(out, -1, 1).astype(np.float32)


def encode_clip(
    clip: Clip,
    path: str | PathLike[str],
    *,
    size: int = 192,
    fps: int = 20,
    quality: int = 23,
    gop: int = 60,
    sample_rate: int = 48_000,
) -> None:
    """Write the clip as H.264 and, with sound, AAC.

    Args:
        clip: What to show.
        path: File to write; its suffix picks the container (``.mp4``, ``.mkv``).
        size: Width and height in pixels, even.
        fps: Frames per second.
        quality: libx264's ``crf``; lower is better.
        gop: Most frames between keyframes.
        sample_rate: Hz of the sound.

    Raises:
        ValueError: ``size`` is odd.
    """
    if size % 2:
        raise ValueError(f"size is {size}; it must be even")
    with av.open(str(path), "w") as container:
        video = container.add_stream(
            "libx264", rate=fps, options={"preset": "veryfast", "crf": str(quality)}
        )
        assert isinstance(video, VideoStream)
        video.width = video.height = size
        video.pix_fmt = "yuv420p"
        video.gop_size = gop
        sound = None
        if clip.has_sound:
            samples = render_sound(clip, 0, clip.duration, sample_rate)
            sound = AudioWriter(container, "aac", sample_rate, 1, samples)
        for number in range(clip.duration * fps):
            second = number / fps
            frame = av.VideoFrame.from_ndarray(render_frames(clip, [second], size)[0], "rgb24")
            frame.pts, frame.time_base = number, Fraction(1, fps)
            container.mux(video.encode(frame))
            if sound is not None:
                sound.write_until(second)
        container.mux(video.encode(None))
        if sound is not None:
            sound.finish()
