"""A recording as a real file of hours, written in memory that does not grow with it."""

from __future__ import annotations

from fractions import Fraction
from os import PathLike

import av
import numpy as np
import numpy.typing as npt
from av.video.stream import VideoStream

from vllm_mm_ext.composer.training.clips import Clip
from vllm_mm_ext.composer.training.recordings import Recording
from vllm_mm_ext.composer.training.render import object_cover, render_sound
from vllm_mm_ext.synthetic.encoding import AudioWriter

# Seconds of a recording that are drawn and sounded at once.
_BLOCK_S = 10


def encode_recording(
    recording: Recording,
    path: str | PathLike[str],
    *,
    size: int = 128,
    fps: int = 20,
    quality: int = 23,
    gop: int = 250,
    sample_rate: int = 16_000,
    preset: str = "superfast",
) -> None:
    """Write the recording as H.264 and, with sound, AAC.

    Args:
        recording: What to show.
        path: File to write; its suffix picks the container (``.mp4``, ``.mkv``).
        size: Width and height in pixels, a multiple of 4.
        fps: Frames per second.
        quality: libx264's ``crf``; lower is better.
        gop: Most frames between keyframes.
        sample_rate: Hz of the sound.
        preset: libx264's.

    Raises:
        ValueError: ``size`` is no multiple of 4.
    """
    if size % 4:
        raise ValueError(f"size is {size}; it must be a multiple of 4")
    with av.open(str(path), "w") as container:
        options = {"preset": preset, "crf": str(quality)}
        video = container.add_stream("libx264", rate=fps, options=options)
        assert isinstance(video, VideoStream)
        video.width = video.height = size
        video.pix_fmt = "yuv420p"
        video.gop_size = gop
        # What needs no second core takes none.
        video.thread_count = 1
        sound = None
        if recording.tones is not None:
            sound = AudioWriter(container, "aac", sample_rate, 1, _Sound(recording, sample_rate))
        for start in range(0, recording.duration, _BLOCK_S):
            block = recording.window(start, min(start + _BLOCK_S, recording.duration))
            painter = _Painter(block, size)
            for number in range(block.duration * fps):
                frame = av.VideoFrame.from_ndarray(painter.paint(number / fps), "yuv420p")
                frame.pts, frame.time_base = start * fps + number, Fraction(1, fps)
                container.mux(video.encode(frame))
                if sound is not None:
                    sound.write_until(start + number / fps)
        container.mux(video.encode(None))
        if sound is not None:
            sound.finish()


class _Painter:
    """Draws a clip right in the planes of yuv420p; what stands still is drawn once."""

    def __init__(self, clip: Clip, size: int) -> None:
        self._clip, self._size = clip, size
        self._grids = [(np.arange(n, dtype=np.float32) + 0.5) / n for n in (size, size // 2)]
        self._planes = np.empty((size * 3 // 2, size), np.uint8)
        self._drawn: tuple[object, ...] = ()

    def paint(self, second: float) -> npt.NDArray[np.uint8]:
        """Planes ``[size * 3 / 2, size]`` of what is on screen at a time."""
        scene, flash = self._clip.scene_at(second), self._clip.flash_at(second)
        drawn = (scene, flash, 0.0 if scene.motion == "still" else second)
        if drawn != self._drawn:
            self._drawn = drawn
            behind = _yuv(scene.background if flash is None else flash.rgb)
            front = _yuv(scene.rgb)
            full, half = (object_cover(scene, second, grid) for grid in self._grids)
            size = self._size
            self._planes[:size] = behind[0] + full * (front[0] - behind[0])
            chroma = self._planes[size:].reshape(2, size // 2, size // 2)
            for plane, back, fore in zip(chroma, behind[1:], front[1:], strict=True):
                plane[:] = back + half * (fore - back)
        return self._planes


def _yuv(rgb: tuple[int, int, int]) -> tuple[np.float32, ...]:
    """Limited-range BT.601, with half a step so that it is cut off to the nearest."""
    red, green, blue = (part / 255 for part in rgb)
    return (
        np.float32(16.5 + 65.481 * red + 128.553 * green + 24.966 * blue),
        np.float32(128.5 - 37.797 * red - 74.203 * green + 112.0 * blue),
        np.float32(128.5 + 112.0 * red - 93.786 * green - 18.214 * blue),
    )


class _Sound:
    """The sound track of a recording, rendered block by block as it is read in order."""

    def __init__(self, recording: Recording, rate: int) -> None:
        self._recording, self._rate = recording, rate
        self._block, self._samples = -1, np.empty(0, np.float32)

    def __len__(self) -> int:
        return self._recording.duration * self._rate

    def __getitem__(self, span: slice) -> npt.NDArray[np.float32]:
        length = _BLOCK_S * self._rate
        parts = []
        at, end = int(span.start), min(int(span.stop), len(self))
        while at < end:
            block, inside = divmod(at, length)
            part = self._read(block)[inside : inside + end - at]
            parts.append(part)
            at += len(part)
        return np.concatenate(parts)

    def _read(self, block: int) -> npt.NDArray[np.float32]:
        if block != self._block:
            start = block * _BLOCK_S
            clip = self._recording.window(start, min(start + _BLOCK_S, self._recording.duration))
            self._block, self._samples = block, render_sound(clip, 0, clip.duration, self._rate)
        return self._samples
