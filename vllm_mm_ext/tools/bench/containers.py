"""Containers and codecs, generated and third-party files: what of each comes out right.

``vllm-mm bench containers --markdown docs/media.md`` writes the page. Generated files have known
content: each frame carries its number as a bar code, and a tone begins at a known time. Files of
others (the package ``iscc-samples``) are held against FFmpeg's decoding of the whole file from its
beginning, in presentation order.
"""

from __future__ import annotations

import importlib.metadata
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import numpy.typing as npt

from vllm_mm_ext.errors import MediaError
from vllm_mm_ext.media.decode.job import run_job
from vllm_mm_ext.media.types import DecodeRequest, DecodeResult, MediaInfo, SamplingSpec, SizeRule
from vllm_mm_ext.testing.media import ClipTruth, Tone, make_clip, read_stamp

RIGHT = "right"
NONE = "-"
"""A cell of the table for what a file does not have."""

SECONDS, RATE = 4.0, Fraction(25)
TONE_S = 1.0
"""When the tone of a generated file begins."""
LATE_S = 0.8
"""How much later the sound of the second file begins."""
_SYNC_S = 0.020
_ELEMENTARY = ("mpegvideo", "m4v", "h264", "hevc")


@dataclass(frozen=True)
class Combination:
    """One kind of generated file.

    Attributes:
        suffix: Of the file; decides the container.
        video: FFmpeg encoder of the pictures.
        audio: FFmpeg encoder of the sound.
        late: Whether a copy whose sound begins later is made: AVI cannot say that, and PyAV copies
            no AV1.
    """

    suffix: str
    video: str
    audio: str
    late: bool = True


COMBINATIONS = (
    Combination("mp4", "libx264", "aac"),
    Combination("mp4", "libx265", "aac"),
    Combination("mp4", "libsvtav1", "libopus", late=False),
    Combination("mp4", "mpeg4", "libmp3lame"),
    Combination("mov", "libx264", "pcm_s16le"),
    Combination("mov", "mjpeg", "alac"),
    Combination("mkv", "libx264", "aac"),
    Combination("mkv", "libvpx-vp9", "flac"),
    Combination("mkv", "mpeg2video", "ac3"),
    Combination("webm", "libvpx", "libopus"),
    Combination("webm", "libvpx-vp9", "libopus"),
    Combination("ts", "libx264", "aac"),
    Combination("ts", "mpeg2video", "mp2"),
    Combination("mpg", "mpeg2video", "mp2"),
    Combination("avi", "mjpeg", "pcm_s16le", late=False),
    Combination("flv", "libx264", "aac"),
    Combination("3gp", "mpeg4", "aac"),
    Combination("asf", "wmv2", "libmp3lame"),
    Combination("nut", "mpeg4", "flac"),
)


@dataclass(frozen=True)
class Finding:
    """A row of the table: each cell is ``RIGHT``, ``NONE``, or says what is wrong.

    Attributes:
        file: What the file is.
        length: Seconds of video (of sound where there is no video).
        frames: How many frames there are.
        times: When they are shown: within half a unit of the container's time base.
        pictures: Whether each is the picture that belongs there.
        sound: Where the tone begins, within 20 ms; for files of others how long the sound is.
        late: The same where the sound begins ``LATE_S`` later than the pictures.
    """

    file: str
    length: str
    frames: str
    times: str
    pictures: str
    sound: str
    late: str = NONE

    @property
    def is_right(self) -> bool:
        """Whether nothing is wrong."""
        cells = (self.length, self.frames, self.times, self.pictures, self.sound, self.late)
        return all(cell in (RIGHT, NONE) for cell in cells)


def examine_made(combination: Combination, directory: Path) -> Finding:
    """Make the files of a combination in ``directory`` and examine them."""
    path = directory / f"{combination.video}-{combination.audio}.{combination.suffix}"
    truth = make_clip(
        path,
        width=320,
        height=180,
        fps=RATE,
        duration=SECONDS,
        codec=combination.video,
        gop=20,
        scene="shapes",
        audio=[Tone(440.0, TONE_S, SECONDS)],
        audio_codec=combination.audio,
        stamp=True,
    )
    name = f"{combination.suffix}: {_short(combination.video)}, {_short(combination.audio)}"
    try:
        result = _everything(path)
    except MediaError as error:
        return Finding(name, error.message, NONE, NONE, NONE, NONE)
    info = result.info
    return Finding(
        name,
        length=_near(_length(info), SECONDS, 1 / RATE, "s"),
        frames=_equal(_num_frames(info), len(truth.times)),
        times=_times(result, truth),
        pictures=_stamps(result),
        sound=_onset(result, TONE_S),
        late=_late(path) if combination.late else NONE,
    )


def examine_found(path: Path) -> Finding:
    """Examine a file made by others."""
    name = path.name
    try:
        result = _everything(path)
    except MediaError as error:
        return Finding(name, error.message, NONE, NONE, NONE, NONE)
    count, pictures, sound_s = _decode_from_start(path, result)
    info, sound = result.info, NONE
    if sound_s:
        heard = 0.0 if result.audio is None else len(result.audio) / result.audio_rate
        # Sound is cut where the pictures end.
        shown = _length(info) if info.video is not None else sound_s
        sound = _near(heard, min(sound_s, shown), Fraction(1, 10), "s")
    if info.video is None:
        length = _near(_length(info), sound_s, Fraction(1, 10), "s")
        return Finding(name, length, NONE, NONE, NONE, sound)
    assert result.selection is not None
    assert result.frames is not None
    missing = sum(picture is None for picture in pictures)
    wrong = sum(
        picture is None or not np.array_equal(picture, frame)
        for picture, frame in zip(pictures, result.frames, strict=True)
    )
    return Finding(
        name,
        length=NONE,
        frames=_equal(_num_frames(info), count),
        times=RIGHT if not missing else f"{missing} of {len(pictures)} off",
        pictures=RIGHT if not wrong else f"{wrong} of {len(pictures)} wrong",
        sound=sound,
    )


def found_files() -> list[Path]:
    """Video and audio files of the installed ``iscc-samples``; none where it is not installed."""
    try:
        files = importlib.metadata.files("iscc-samples") or []
    except importlib.metadata.PackageNotFoundError:
        return []
    kinds = ("/files/video/", "/files/audio/")
    paths = [Path(str(file.locate())) for file in files if any(k in str(file) for k in kinds)]
    return sorted(path for path in paths if path.suffix not in (".py", ".swf", ".json", ""))


def _everything(path: Path) -> DecodeResult:
    """All frames of a generated file, some of another; and the sound."""
    spec = SamplingSpec(policy="uniform", fps=float(RATE), max_frames=round(SECONDS * RATE))
    info = run_job(str(path), DecodeRequest(probe_only=True)).info
    request = DecodeRequest(
        sampling=None if info.video is None else spec,
        size=SizeRule(),
        audio="optional",
        info=info,
    )
    return run_job(str(path), request)


def _decode_from_start(
    path: Path, result: DecodeResult
) -> tuple[int, list[npt.NDArray[np.uint8] | None], float]:
    """What FFmpeg decodes of the whole file.

    Returns:
        The number of frames; for each frame of ``result`` the one that is shown at its time, None
        where none is; and the seconds of sound.
    """
    info, selection, count = result.info, result.selection, 0
    pictures: list[npt.NDArray[np.uint8] | None] = []
    if info.video is not None:
        assert selection is not None
        assert result.frames is not None
        assert info.packets is not None
        height, width = result.frames.shape[1:3]
        pictures = [None] * len(selection.times)
        # Half a unit of the coarsest clock, that of GIF.
        tolerance = 0.005 + 1e-6
        with av.open(str(path)) as container:
            shown_at = [frame.time for frame in _frames(container, info.video.index)]
        count = len(shown_at)
        times = [np.nan if time is None else time for time in shown_at]
        if info.container in _ELEMENTARY:
            # These formats hold no times, and FFmpeg guesses them; counting tells the frames.
            times = [float(info.packets.time[min(n, len(info.packets) - 1)]) for n in range(count)]
        with av.open(str(path)) as container:
            for time, frame in zip(times, _frames(container, info.video.index), strict=False):
                assert isinstance(frame, av.VideoFrame)
                near = np.flatnonzero(np.abs(selection.times - (time - times[0])) <= tolerance)
                if len(near):
                    shown = frame.reformat(width, height, "rgb24", interpolation="BICUBIC")
                    for place in near.tolist():
                        pictures[place] = shown.to_ndarray().astype(np.uint8)
    seconds = 0.0
    if info.audio:
        with av.open(str(path)) as container:
            for frame in _frames(container, info.audio[0].index):
                assert isinstance(frame, av.AudioFrame)
                seconds += frame.samples / frame.sample_rate
    return count, pictures, seconds


def _frames(
    container: av.container.InputContainer, index: int
) -> Iterator[av.VideoFrame | av.AudioFrame]:
    stream = container.streams[index]
    for packet in container.demux(stream):
        try:
            yield from packet.decode()  # type: ignore[misc]
        except av.FFmpegError:
            continue


def _late(path: Path) -> str:
    """What comes out of a copy of the file whose sound begins ``LATE_S`` later."""
    target = path.with_name(f"late-{path.name}")
    with av.open(str(path)) as source, av.open(str(target), "w") as output:
        streams = {s.index: output.add_stream_from_template(s) for s in source.streams}
        for packet in source.demux():
            if packet.dts is None or packet.pts is None:
                continue
            assert packet.time_base is not None
            if packet.stream.type == "audio":
                shift = round(LATE_S / float(packet.time_base))
                packet.pts += shift
                packet.dts += shift
            packet.stream = streams[packet.stream.index]
            output.mux(packet)
    try:
        return _onset(_everything(target), TONE_S + LATE_S)
    except MediaError as error:
        return error.message


def _onset(result: DecodeResult, expected: float) -> str:
    """Whether the tone begins where expected: where 5 ms of sound first reach half its level."""
    if result.audio is None:
        return "no sound"
    window = result.audio_rate // 200
    power = np.convolve(np.square(result.audio), np.full(window, 1 / window), "valid")
    loud = np.flatnonzero(power > np.quantile(power, 0.95) / 4)
    if not len(loud):
        return "silence"
    begins = (loud[0] + window / 2) / result.audio_rate
    off = begins - expected
    return RIGHT if abs(off) <= _SYNC_S else f"{1e3 * off:+.0f} ms"


def _times(result: DecodeResult, truth: ClipTruth) -> str:
    assert result.selection is not None
    times = result.selection.times
    if len(times) != len(truth.times):
        return f"{len(times)} times"
    off = np.abs(times - truth.times).max()
    # Half a unit of the coarsest clock, which counts in milliseconds.
    return RIGHT if off <= 0.0005 + 1e-6 else f"{1e3 * off:.1f} ms off"


def _stamps(result: DecodeResult) -> str:
    assert result.frames is not None
    assert result.selection is not None
    numbers = [read_stamp(frame) for frame in result.frames]
    wrong = sum(a != b for a, b in zip(numbers, result.selection.indices.tolist(), strict=True))
    return RIGHT if not wrong else f"{wrong} of {len(numbers)} wrong"


def _length(info: MediaInfo) -> float:
    return info.video.duration if info.video is not None else info.duration


def _num_frames(info: MediaInfo) -> int:
    return 0 if info.video is None else info.video.num_frames


def _near(value: float, expected: float, tolerance: Fraction, unit: str) -> str:
    near = abs(value - expected) <= float(tolerance) + 1e-6
    return RIGHT if near else f"{value:.2f} {unit}, not {expected:.2f}"


def _equal(value: int, expected: int) -> str:
    return RIGHT if value == expected else f"{value}, not {expected}"


def _short(codec: str) -> str:
    return (
        codec.removeprefix("lib")
        .removeprefix("vpx-")
        .removeprefix("svt")
        .replace("mp3lame", "mp3")
        .replace("vpx", "vp8")
    )
