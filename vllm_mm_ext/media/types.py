"""Values that cross the media front-end: plain, picklable, free of torch and vLLM."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import numpy.typing as npt

PolicyName = Literal["uniform", "keyframe", "adaptive", "explicit"]
DecoderName = Literal["auto", "pyav", "decord"]


@dataclass(frozen=True)
class VideoStream:
    """One video stream, as the container describes it (nothing is decoded).

    Attributes:
        index: Stream index inside the container.
        codec: FFmpeg codec name (``h264``, ``mpeg4``, ``av1``...).
        width, height: Displayed size in pixels, after rotation.
        rotation: Clockwise display rotation in degrees: 0, 90, 180 or 270.
        fps: Average frame rate in frames per second.
        is_vfr: True when the gaps between presentation times are uneven.
        num_frames: Presentable frames (those an edit list hides are not counted).
        duration: Seconds from the first to the end of the last frame.
        pixel_format: FFmpeg pixel format name, empty where the headers do not tell.
    """

    index: int
    codec: str
    width: int
    height: int
    rotation: int
    fps: float
    is_vfr: bool
    num_frames: int
    duration: float
    pixel_format: str


@dataclass(frozen=True)
class AudioStream:
    """One audio stream: FFmpeg codec name, Hz, channel count, seconds."""

    index: int
    codec: str
    sample_rate: int
    channels: int
    duration: float


@dataclass(frozen=True, eq=False)
class PacketTable:
    """One row per presentable frame of the video stream, in presentation order.

    Attributes:
        pts: int64 ``[n]`` presentation time in stream time-base units, as in the file.
        time: float64 ``[n]`` presentation time in seconds; the first frame is at 0.
        size: int32 ``[n]`` packet size in bytes.
        is_key: bool ``[n]`` packet is a keyframe (a seek may land there).
        time_base: Seconds per time-base unit.
        order: int64 ``[n]`` position of each row's packet among all packets of the stream in
            decoding order; by default the rows are in decoding order themselves.
        exact: ``pts`` are the file's own and unique, so that a decoded frame can be told by
            its pts. False where they had to be made up (then frames are told by counting).
    """

    pts: npt.NDArray[np.int64]
    time: npt.NDArray[np.float64]
    size: npt.NDArray[np.int32]
    is_key: npt.NDArray[np.bool_]
    time_base: float
    order: npt.NDArray[np.int64] = field(default_factory=lambda: np.empty(0, np.int64))
    exact: bool = True

    def __post_init__(self) -> None:
        if len(self.order) != len(self.pts):
            object.__setattr__(self, "order", np.arange(len(self.pts), dtype=np.int64))

    def __len__(self) -> int:
        return len(self.pts)

    @property
    def nbytes(self) -> int:
        """Bytes of all columns."""
        columns = (self.pts, self.time, self.size, self.is_key, self.order)
        return sum(column.nbytes for column in columns)


@dataclass(frozen=True)
class MediaInfo:
    """What a container says about itself, without decoding.

    Attributes:
        container: FFmpeg demuxer name.
        num_bytes: Size of the encoded file in bytes.
        duration: Seconds, the longest of the streams.
        video: First real video stream (cover art does not count), or None.
        audio: Audio streams in file order, possibly empty.
        packets: Packet table of ``video``; None without video.
    """

    container: str
    num_bytes: int
    duration: float
    video: VideoStream | None
    audio: tuple[AudioStream, ...]
    packets: PacketTable | None = field(default=None, repr=False, compare=False)


@dataclass(frozen=True)
class SamplingSpec:
    """Which frames are wanted.

    Attributes:
        policy: ``uniform``, ``keyframe``, ``adaptive``, or ``explicit`` (``indices`` given).
        fps: Frames per second asked of ``uniform``; also the mean rate ``adaptive`` aims at.
        max_frames: Hard ceiling on the number of frames, never exceeded.
        min_frames: Floor, where the clip has that many frames.
        min_fps: ``adaptive`` keeps at least this many frames in every second, budget allowing.
        max_fps: ``adaptive`` puts at most this many frames into any second.
        multiple_of: The count is rounded down to a multiple of this (temporal patch size).
        indices: Presentation-order frame indices for ``explicit``, sorted, may repeat.
    """

    policy: PolicyName = "uniform"
    fps: float = 1.0
    max_frames: int = 32
    min_frames: int = 4
    min_fps: float = 0.1
    max_fps: float = 8.0
    multiple_of: int = 1
    indices: tuple[int, ...] | None = None


@dataclass(frozen=True, eq=False)
class ActivityProfile:
    """How much happens when.

    Attributes:
        time: float64 ``[m]`` seconds at the start of each bin.
        container: float32 ``[m]`` stage-1 activity from packet sizes, 0..1.
        confirmed: float32 ``[m]`` stage-2 motion score where thumbnails were decoded, else NaN.
    """

    time: npt.NDArray[np.float64]
    container: npt.NDArray[np.float32]
    confirmed: npt.NDArray[np.float32]


@dataclass(frozen=True, eq=False)
class FrameSelection:
    """The frames a policy chose, in presentation order.

    Attributes:
        policy: The policy that chose them.
        indices: int64 ``[n]`` presentation-order frame indices, strictly increasing
            (non-decreasing for ``explicit``).
        times: float64 ``[n]`` their exact presentation times in seconds.
        profile: Activity profile for ``adaptive``, else None.
        step: Seconds between the moments 0, ``step``, 2 ``step``... of which the frames are those
            on screen; None where they were not taken on such a grid.
    """

    policy: PolicyName
    indices: npt.NDArray[np.int64]
    times: npt.NDArray[np.float64]
    profile: ActivityProfile | None = None
    step: float | None = None


@dataclass(frozen=True)
class SizeRule:
    """How big frames should leave the decoder. See ``media.sizing``.

    Attributes:
        kind: ``native`` keeps the displayed size; ``fixed`` resizes to ``height`` x ``width``;
            ``qwen_vl`` and ``qwen3_vl`` follow those families' ``smart_resize``;
            ``max_edge`` shrinks so that the longer edge is at most ``max_edge``.
        factor: Both sides are rounded to this (patch x merge size) in the qwen kinds.
        min_pixels, max_pixels: Pixel budget per frame (``qwen_vl``) or, over all frames,
            per video (``qwen3_vl``).
        temporal_factor: Temporal patch size (``qwen3_vl``).
        total_pixels: For ``qwen_vl``: cap on the pixels of all frames, 0 for none.
        max_frame_pixels: Cap on the pixels of one frame, applied last and above ``min_pixels``;
            0 for none. Without effect on ``fixed``. A qwen kind's frame has at least ``factor`` x
            ``factor`` pixels nevertheless.
    """

    kind: Literal["native", "fixed", "max_edge", "qwen_vl", "qwen3_vl"] = "native"
    height: int = 0
    width: int = 0
    max_edge: int = 0
    factor: int = 28
    min_pixels: int = 0
    max_pixels: int = 0
    temporal_factor: int = 2
    total_pixels: int = 0
    max_frame_pixels: int = 0


@dataclass(frozen=True)
class DecodeLimits:
    """Hard limits on one decode job. Passing one is a ``MediaError``, never a crash.

    Attributes:
        timeout_s: Wall-clock seconds from start to result; the worker is killed past it.
        memory_bytes: Address-space ceiling of a worker process.
        max_pixels: Pixels in one source frame.
        max_frames: Frames returned by one job.
        max_output_bytes: Bytes of frames returned by one job.
        max_duration_s: Seconds of video; 0 for no limit.
        max_audio_s: Seconds of audio.
        max_audio_bytes: Bytes of audio as it is decoded: float32 samples of all channels at the
            file's own rate. None for no limit.
        truncate_audio: Cut audio at ``max_audio_s`` instead of refusing it.
    """

    timeout_s: float = 60.0
    memory_bytes: int = 4 << 30
    max_pixels: int = 8192 * 4320
    max_frames: int = 768
    max_output_bytes: int = 2 << 30
    max_duration_s: float = 4 * 3600.0
    max_audio_s: float = 600.0
    max_audio_bytes: int | None = None
    truncate_audio: bool = False


@dataclass(frozen=True)
class DecodeRequest:
    """One job for a decode worker over one encoded file.

    Attributes:
        sampling: Frames wanted, or None for no video.
        size: Output size rule.
        audio: ``required`` (no audio stream is an error), ``optional`` (silence is fine,
            ``DecodeResult.audio`` is None) or ``none``.
        decoder: Backend; ``auto`` picks the measured best.
        threads: FFmpeg threads, 0 for one per core.
        probe_only: Return only ``info``, packet table included.
        info: What ``probe_only`` said about the same file, which is then not read again.
    """

    sampling: SamplingSpec | None = None
    size: SizeRule = SizeRule()
    audio: Literal["none", "optional", "required"] = "none"
    decoder: DecoderName = "auto"
    threads: int = 0
    probe_only: bool = False
    info: MediaInfo | None = None
    limits: DecodeLimits = DecodeLimits()


@dataclass(eq=False)
class DecodeResult:
    """What a decode worker returns.

    Attributes:
        info: Probe of the container.
        selection: Frames really decoded (a broken frame is dropped from it).
        frames: uint8 RGB ``[n, height, width, 3]`` at the target size, or None.
        audio: float32 mono ``[samples]`` at ``audio_rate``, or None.
        audio_rate: Hz of ``audio`` (the stream's own rate).
        decoder: Backend that did the work.
        timings: Stage name to seconds: ``probe``, ``profile``, ``decode``, ``audio``.
    """

    info: MediaInfo
    selection: FrameSelection | None = None
    frames: npt.NDArray[np.uint8] | None = None
    audio: npt.NDArray[np.float32] | None = None
    audio_rate: int = 0
    decoder: str = ""
    timings: dict[str, float] = field(default_factory=dict)
