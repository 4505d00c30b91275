"""The workload of a plan: what one request holds, and how many requests run at a time."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

_LENGTH = re.compile(r"(?:(\d+(?:\.\d+)?)h)?(?:(\d+(?:\.\d+)?)m)?(?:(\d+(?:\.\d+)?)s?)?")
_COUNTED = re.compile(r"(\d+)x(?=\d)")
_SIZE = re.compile(r"(\d{2,5})x(\d{2,5})")
# Width and height of the names that players give to sizes.
_NAMED_SIZES = {
    "240p": (426, 240),
    "360p": (640, 360),
    "480p": (854, 480),
    "720p": (1280, 720),
    "1080p": (1920, 1080),
    "1440p": (2560, 1440),
    "2160p": (3840, 2160),
    "4k": (3840, 2160),
}
CODECS = ("h264", "hevc", "vp9", "av1", "mpeg4")
_MAX_FPS = 60.0
_MAX_SECONDS = 24 * 3600.0
# Media of one kind that an option names, and pixels of a picture.
_MAX_COUNT = 256
_MAX_PIXELS = 8192 * 8192
_DEFAULT_FPS = 1.0
_DEFAULT_SOURCE_FPS = 30.0
# YouTube asks for 5 Mbit/s of 720p at 30 frames per second and 8 of 1080p: 0.18 and 0.13 bits a
# pixel.
_BITS_PER_PIXEL = 0.18

VIDEO_FORM = "[Nx]LENGTH[@FPSfps][:SIZE][:FPSfps][:MBITmbit][:CODEC][:silent]"
VIDEO_EXAMPLE = "60s@2fps:720p"
AUDIO_FORM = "[Nx]LENGTH"
IMAGE_FORM = "N[:SIZE]"


class WorkloadError(ValueError):
    """A workload option cannot be read; the message names option, value and what is valid.

    Attributes:
        option: Name of the option on the command line.
    """

    def __init__(self, option: str, value: object, problem: str) -> None:
        super().__init__(f"{option} {value}: {problem}")
        self.option = option


@dataclass(frozen=True)
class Video:
    """A video of a request.

    Attributes:
        seconds: Its length.
        fps: Frames per second that the model sees.
        width, height: Of the source, in pixels.
        source_fps: Frames per second of the source.
        codec: Of the source.
        sound: It has a sound track.
        mbit: Megabits per second of the source; None: as files of its size usually have.
    """

    seconds: float
    fps: float = _DEFAULT_FPS
    width: int = 1280
    height: int = 720
    source_fps: float = _DEFAULT_SOURCE_FPS
    codec: str = "h264"
    sound: bool = True
    mbit: float | None = None

    @property
    def file_bytes(self) -> int:
        """Bytes of the file, at most in most cases."""
        if self.mbit is not None:
            return round(self.mbit * 1e6 / 8 * self.seconds)
        pixels = self.width * self.height * self.source_fps * self.seconds
        return round(pixels * _BITS_PER_PIXEL / 8)


@dataclass(frozen=True)
class Image:
    """An image of a request, with its size in pixels."""

    width: int = 1280
    height: int = 720


@dataclass(frozen=True)
class Workload:
    """One kind of request, many at a time.

    Attributes:
        videos, images: Of each request.
        audios: Seconds of each sound of a request.
        text: Tokens of the question.
        output: Tokens of the answer.
        concurrency: Requests that run at a time, on all replicas together.
    """

    videos: tuple[Video, ...] = ()
    audios: tuple[float, ...] = ()
    images: tuple[Image, ...] = ()
    text: int = 128
    output: int = 256
    concurrency: int = 1

    @property
    def has_media(self) -> bool:
        """Whether a request holds anything but text."""
        return bool(self.videos or self.audios or self.images)

    @property
    def fps(self) -> float | None:
        """Frames per second at which the server samples; None without video."""
        return self.videos[0].fps if self.videos else None


def read_videos(specs: Sequence[str]) -> tuple[Video, ...]:
    """Read the values of ``--video``.

    Raises:
        WorkloadError: One is no video, or they differ in the frames per second, which one server
            has one setting for.
    """
    videos = tuple(video for spec in specs for video in _videos(spec))
    rates = sorted({video.fps for video in videos})
    if len(rates) > 1:
        raise WorkloadError(
            "--video",
            " and ".join(specs),
            f"a server samples all videos at one rate, got {' and '.join(f'{r:g}' for r in rates)}"
            " fps; plan one rate here, and let requests ask for another with mm_ext.fps",
        )
    return videos


def _videos(spec: str) -> list[Video]:
    count, rest = _counted("--video", spec)
    head, *parts = rest.split(":")
    length, at, rate = head.partition("@")
    video = Video(_seconds("--video", spec, length))
    if at:
        video = replace(video, fps=_rate(spec, rate))
    seen: set[str] = set()
    for part in parts:
        values = _part(spec, part)
        if again := seen & values.keys():
            raise WorkloadError("--video", spec, f"{part!r} says {min(again)} a second time")
        seen |= values.keys()
        video = replace(video, **values)
    return [video] * count


def _part(spec: str, part: str) -> dict[str, Any]:
    """What a part of a video's description says, by the attributes of ``Video``."""
    if part == "silent":
        return {"sound": False}
    if part in CODECS:
        return {"codec": part}
    if part.endswith("fps"):
        return {"source_fps": _rate(spec, part)}
    if part.endswith("mbit"):
        return {"mbit": _mbit(spec, part)}
    if (size := _size(part)) is not None:
        return {"width": size[0], "height": size[1]}
    raise WorkloadError(
        "--video",
        spec,
        f"{part!r} is none of: a size ({', '.join(_NAMED_SIZES)} or WIDTHxHEIGHT, up to "
        f"8192x8192), the source's frame rate (25fps) or bit rate (4mbit), a codec "
        f"({', '.join(CODECS)}), silent. The form is {VIDEO_FORM}, for example {VIDEO_EXAMPLE}",
    )


def read_audios(specs: Sequence[str]) -> tuple[float, ...]:
    """Seconds of each sound that the values of ``--audio`` name.

    Raises:
        WorkloadError: One is no length.
    """
    audios: list[float] = []
    for spec in specs:
        count, length = _counted("--audio", spec)
        audios += [_seconds("--audio", spec, length)] * count
    return tuple(audios)


def read_images(specs: Sequence[str]) -> tuple[Image, ...]:
    """The images that the values of ``--image`` name.

    Raises:
        WorkloadError: One is not a number with a size.
    """
    images: list[Image] = []
    for spec in specs:
        count, colon, named = spec.partition(":")
        size = _size(named) if colon else (1280, 720)
        if not count.isdecimal() or size is None:
            raise WorkloadError(
                "--image",
                spec,
                f"the form is {IMAGE_FORM}, for example 2 or 2:1024x1024; sizes are "
                f"{', '.join(_NAMED_SIZES)} or WIDTHxHEIGHT, up to 8192x8192",
            )
        images += [Image(*size)] * _count("--image", spec, count)
    return tuple(images)


def _counted(option: str, spec: str) -> tuple[int, str]:
    found = _COUNTED.match(spec)
    if found is None:
        return 1, spec
    return _count(option, spec, found[1]), spec[found.end() :]


def _count(option: str, spec: str, digits: str) -> int:
    # Python refuses to read numbers of thousands of digits.
    count = int(digits[:9])
    if not 1 <= count <= _MAX_COUNT:
        raise WorkloadError(option, spec, f"a number from 1 to {_MAX_COUNT}; leave it out for none")
    return count


def _seconds(option: str, spec: str, length: str) -> float:
    found = _LENGTH.fullmatch(length)
    hours, minutes, seconds = (float(part or 0) for part in found.groups()) if found else (0, 0, 0)
    total = 3600 * hours + 60 * minutes + seconds
    if found is None or total <= 0:
        form = VIDEO_FORM if option == "--video" else AUDIO_FORM
        raise WorkloadError(
            option,
            spec,
            f"{length!r} is no length: 30s, 5m, 2h or 1h30m. The form is {form}",
        )
    if total > _MAX_SECONDS:
        raise WorkloadError(option, spec, f"{length!r} is too long: up to 24h")
    return total


def _rate(spec: str, text: str) -> float:
    try:
        rate = float(text.removesuffix("fps"))
    except ValueError:
        rate = 0.0
    if not 0 < rate <= _MAX_FPS:
        raise WorkloadError(
            "--video",
            spec,
            f"{text!r} is no frame rate: a number above 0 and up to {_MAX_FPS:g}, such as 2fps",
        )
    return rate


def _mbit(spec: str, text: str) -> float:
    try:
        rate = float(text.removesuffix("mbit"))
    except ValueError:
        rate = 0.0
    if not 0 < rate < 1000:
        raise WorkloadError(
            "--video", spec, f"{text!r} is no bit rate: a number above 0 and below 1000, as 4mbit"
        )
    return rate


def _size(text: str) -> tuple[int, int] | None:
    if text in _NAMED_SIZES:
        return _NAMED_SIZES[text]
    found = _SIZE.fullmatch(text)
    if found is None or int(found[1]) * int(found[2]) > _MAX_PIXELS:
        return None
    return int(found[1]), int(found[2])
