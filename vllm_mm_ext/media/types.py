"""Values that the parts of the media front-end hand to each other, without torch and vLLM."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import numpy.typing as npt

PolicyName = Literal["uniform", "keyframe", "adaptive", "explicit"]
DecoderName = Literal["auto", "pyav", "decord", "nvdec"]
# Why not all sound of a video is there: it goes on past a limit; no decoder takes it; nothing of it
# can be decoded; it has an absurd rate or needs too much memory; it is too short for any model; it,
# or over a second of it, lies before or after the pictures.
AudioNote = Literal["", "cut", "unsupported", "unreadable", "too_large", "too_short", "outside"]


@dataclass(frozen=True)
class VideoStream:
    """One video stream, as its container describes it and its first picture shows it.

    Attributes:
        index: Stream index inside the container.
        codec: FFmpeg codec name (``h264``...).
        width, height: Displayed size in pixels: after cropping, rotation, and stretching of pixels
            that are not square.
        rotation: Clockwise display rotation: 0, 90, 180 or 270 degrees.
        fps: Average frame rate in frames per second.
        is_vfr: True when the gaps between presentation times are uneven.
        num_frames: Presentable frames (frames that an edit list hides do not count).
        num_keyframes: Keyframes among them.
        duration: Seconds from the start of the first frame to the end of the last.
        pixel_format: FFmpeg pixel format name, of the first picture; empty if nothing gives one.
        start: Seconds on the container's clock at which the first frame is shown. The times of the
            packet table and of sound count from here.
        mirrored: The picture is mirrored left to right for display, before it is rotated.
        sample_aspect: Width of a pixel, as stored, divided by its height.
        crop: Columns and rows of the decoded picture that the container cuts off: left, right, top,
            bottom.
        plain: The first picture is shown as decoded, taken as 8-bit BT.601 in limited range.
        origins: Where the container's clock starts anew in the middle of the file, for each part of
            the file the seconds on its clock that are 0 on the picture's; else empty.
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
    start: float = 0.0
    mirrored: bool = False
    sample_aspect: float = 1.0
    crop: tuple[int, int, int, int] = (0, 0, 0, 0)
    plain: bool = True
    origins: tuple[float, ...] = ()
    num_keyframes: int = 0


@dataclass(frozen=True)
class AudioStream:
    """One audio stream, as the container describes it.

    Attributes:
        index: Stream index inside the container.
        codec: FFmpeg codec name (``aac``, ``opus``...).
        sample_rate: Sampling rate in Hz.
        channels: Number of channels.
        duration: Seconds; 0 if the container claims nothing.
        number: Number among the file's audio streams, from 0 in file order.
        start: Seconds on the container's clock at which the sound begins.
        estimated: The duration is an estimate, or a claim that may be far off.
    """

    index: int
    codec: str
    sample_rate: int
    channels: int
    duration: float
    number: int = 0
    start: float = 0.0
    estimated: bool = False


@dataclass(frozen=True, eq=False)
class PacketTable:
    """One row per presentable frame of the video stream, in presentation order.

    Attributes:
        pts: int64 ``[n]`` presentation timestamp in units of the stream's time base.
        time: float64 ``[n]`` presentation time in seconds; the first frame is at 0.
        size: int32 ``[n]`` packet size in bytes.
        is_key: bool ``[n]`` whether the packet is a keyframe (a seek may land there).
        time_base: Seconds per unit of ``pts``.
        order: int64 ``[n]`` place of each row's packet in decoding order; by default the row's.
        exact: ``pts`` are the file's own and unique, so a decoded frame is known by its timestamp,
            else by counting.
        seekable: A seek leaves out nothing that a decoder needs behind it, as new parameters.
    """

    pts: npt.NDArray[np.int64]
    time: npt.NDArray[np.float64]
    size: npt.NDArray[np.int32]
    is_key: npt.NDArray[np.bool_]
    time_base: float
    order: npt.NDArray[np.int64] = field(default_factory=lambda: np.empty(0, np.int64))
    exact: bool = True
    seekable: bool = True

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
    """What the probe finds out about a file: what its container says, and how a picture is shown.

    Attributes:
        container: FFmpeg demuxer name.
        num_bytes: Size of the encoded file.
        duration: Seconds of the longest stream; beside a video, estimates of sound do not count.
        video: The video stream that a player shows (cover art does not count), or None.
        audio: Audio streams, the one that a player plays first; possibly empty.
        packets: Packet table of ``video``; None without video.
        unsupported_audio: The file has audio streams of which none can be decoded.
    """

    container: str
    num_bytes: int
    duration: float
    video: VideoStream | None
    audio: tuple[AudioStream, ...]
    packets: PacketTable | None = field(default=None, repr=False, compare=False)
    unsupported_audio: bool = False


@dataclass(frozen=True)
class SamplingSpec:
    """Which frames are wanted.

    Attributes:
        policy: ``uniform``, ``keyframe``, ``adaptive``, or ``explicit`` (``indices`` given).
        fps: Frames per second that ``uniform`` takes, and the mean rate that ``adaptive`` aims at.
        max_frames: Most frames, never exceeded.
        min_frames: Least frames, where the clip has that many.
        min_fps: ``adaptive`` leaves no gap wider than 1 / ``min_fps`` seconds, or than two mean
            gaps if these are wider.
        max_fps: ``adaptive`` takes at most this many frames of any second, unless ``fps`` or
            ``min_frames`` asks for more.
        multiple_of: The number of frames is rounded down to a multiple of this, the frames of a
            temporal patch.
        indices: Presentation-order frame indices for ``explicit``, sorted, may repeat.
        video_stream: Number of the stream that they are frames of, among the file's video streams;
            None for the stream that a player shows.
        span: Start and end in seconds on the picture's clock: only this part of the clip is
            sampled, as if it were a clip by itself that begins at 0. None for the whole clip.
    """

    policy: PolicyName = "uniform"
    fps: float = 1.0
    max_frames: int = 32
    min_frames: int = 4
    min_fps: float = 0.1
    max_fps: float = 8.0
    multiple_of: int = 1
    indices: tuple[int, ...] | None = None
    video_stream: int | None = None
    span: tuple[float, float] | None = None


@dataclass(frozen=True, eq=False)
class ActivityProfile:
    """How much happens when in a clip, in bins of equal length.

    Attributes:
        time: float64 ``[m]`` seconds at the start of each bin.
        container: float32 ``[m]`` activity that packet sizes show (stage 1), 0 to 1.
        confirmed: float32 ``[m]`` motion that thumbnails show (stage 2), 0 to 1; NaN without one.
    """

    time: npt.NDArray[np.float64]
    container: npt.NDArray[np.float32]
    confirmed: npt.NDArray[np.float32]

    def mean(self) -> float:
        """How much happens in the clip as a whole, 0 to 1: where known, by what thumbnails show."""
        known = self.confirmed[~np.isnan(self.confirmed)]
        return float(np.clip((known if len(known) else self.container).mean(), 0.0, 1.0))


@dataclass(frozen=True, eq=False)
class FrameSelection:
    """The frames a policy chose, in presentation order.

    Attributes:
        policy: The policy that chose the frames.
        indices: int64 ``[n]`` presentation-order frame indices, strictly increasing
            (non-decreasing for ``explicit``).
        times: float64 ``[n]`` exact presentation times of the frames in seconds.
        profile: Activity profile of the clip for ``adaptive``, else None.
        step: Seconds between the moments 0, ``step``, 2 ``step``... at which the frames are on
            screen; None where they were not taken so.
        activity: How much happens in the clip, 0 to 1, where the policy looked (``adaptive``).
    """

    policy: PolicyName
    indices: npt.NDArray[np.int64]
    times: npt.NDArray[np.float64]
    profile: ActivityProfile | None = None
    step: float | None = None
    activity: float | None = None


@dataclass(frozen=True)
class SizeRule:
    """The rule for the size at which frames leave the decoder; see ``media.sizing``.

    Attributes:
        kind: ``native`` keeps the displayed size; ``fixed`` resizes to ``height`` x ``width``;
            ``qwen_vl`` and ``qwen3_vl`` follow the ``smart_resize`` of these model families;
            ``max_edge`` shrinks so that the longer edge is at most ``max_edge``.
        height, width: Size in pixels, for ``fixed``.
        max_edge: Pixels of the longer edge, for ``max_edge``.
        factor: For the qwen kinds: both sides are multiples of this (patch size x merge size).
        min_pixels, max_pixels: Bounds on the pixels of one frame (``qwen_vl``) or of all together
            (``qwen3_vl``).
        temporal_factor: Temporal patch size, for the qwen kinds.
        total_pixels: For ``qwen_vl``: bound on the pixels of all frames together, 0 for none.
        max_frame_pixels: Bound on the pixels of one frame, 0 for none. It is applied last and wins
            over ``min_pixels``. It has no effect on ``fixed``, and a frame of a qwen kind has at
            least ``factor`` x ``factor`` pixels all the same.
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
class PictureRules:
    """What an operator chooses about how pictures are shown.

    Attributes:
        stretch: Pictures whose pixels are not square are stretched to their display shape.
        background: Red, green and blue, 0 to 255, behind and beside pictures that do not fill all.
    """

    stretch: bool = True
    background: tuple[int, int, int] = (0, 0, 0)


AS_PLAYERS = PictureRules()
"""Pictures are shown as players show them."""


@dataclass(frozen=True)
class DecodeLimits:
    """Hard limits on one decode job. A job that passes one ends in a ``MediaError``, not a crash.

    Attributes:
        timeout_s: Wall-clock seconds from start to result; then the pool kills the worker.
        memory_bytes: Most address space of a worker process.
        max_pixels: Pixels in one source frame.
        max_frames: Frames returned by one job.
        max_output_bytes: Bytes of all frames returned by one job.
        max_duration_s: Seconds of video; 0 for no limit.
        max_audio_s: Seconds of audio.
        max_audio_bytes: Bytes of decoded float32 samples of all channels; None for no limit.
        truncate_audio: Cut audio that is longer than ``max_audio_s`` instead of refusing it.
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
class GpuRules:
    """How a decode worker uses a GPU's video engines.

    Attributes:
        memory_bytes: Most GPU memory for the pictures of one worker; the CUDA context is beside it.
        from_megapixels: The codecs of which ``auto`` gives files to the GPU, each with the least
            megapixels that a job has to decode.
    """

    memory_bytes: int = 512 << 20
    from_megapixels: tuple[tuple[str, float], ...] = ()


NO_RULES = GpuRules()
"""Of itself, no file is worth a GPU."""


@dataclass(frozen=True)
class DecodeRequest:
    """One job for a decode worker over one encoded file.

    Attributes:
        sampling: Frames wanted (of a probe, its ``video_stream`` counts). Without it and with
            required sound, the pictures of the file are not looked at.
        size: Rule for the size of the frames.
        audio: ``required`` (a file without readable sound is an error), ``optional`` (sound that
            cannot be had is left out, and ``DecodeResult.audio_note`` says why) or ``none``.
        decoder: Decoder backend; ``auto`` picks the one that measured best.
        gpu: How a GPU is used, by ``nvdec`` and ``auto``.
        threads: FFmpeg threads, 0 for one per core.
        probe_only: Return only ``info``, packet table included.
        info: What an earlier probe of the same file returned; the container is not read again.
        limits: Hard limits of the job.
        picture: How pictures are shown.
        audio_stream: Number among the file's audio streams, from 0; None for a player's choice.
        content: Digest of the file; a worker keeps such a file open after a job about a span.
    """

    sampling: SamplingSpec | None = None
    size: SizeRule = SizeRule()
    audio: Literal["none", "optional", "required"] = "none"
    decoder: DecoderName = "auto"
    threads: int = 0
    probe_only: bool = False
    info: MediaInfo | None = None
    limits: DecodeLimits = DecodeLimits()
    picture: PictureRules = AS_PLAYERS
    audio_stream: int | None = None
    content: str = ""
    gpu: GpuRules = NO_RULES

    @property
    def sound_alone(self) -> bool:
        """Whether the sound of the file is all that counts."""
        return self.sampling is None and self.audio == "required"

    @property
    def may_use_gpu(self) -> bool:
        """Whether a GPU may decode frames for this job."""
        wanted = self.decoder == "nvdec" or (
            self.decoder == "auto" and bool(self.gpu.from_megapixels)
        )
        return wanted and self.sampling is not None and not self.probe_only


@dataclass(eq=False)
class DecodeResult:
    """What a decode worker returns.

    Attributes:
        info: What the container says about the file.
        selection: The frames that were decoded: others in place of those that turned out broken, as
            far as there are any. ``explicit`` frames that are broken are left out.
        frames: uint8 RGB ``[n, height, width, 3]`` at the target size, or None.
        audio: float32 mono ``[samples]`` at ``audio_rate``, or None. With frames it begins at the
            first picture of the video and ends with the last one at the latest; without, it begins
            with the sound itself.
        audio_rate: Sampling rate of ``audio`` in Hz, the stream's own.
        decoder: Name of the backend that decoded.
        decoder_note: Why a GPU that was to decode did not; empty where all went as planned.
        timings: Stage name to seconds: ``probe``, ``profile``, ``decode``, ``audio``.
        audio_note: What became of optional sound that is not there as a whole.
    """

    info: MediaInfo
    selection: FrameSelection | None = None
    frames: npt.NDArray[np.uint8] | None = None
    audio: npt.NDArray[np.float32] | None = None
    audio_rate: int = 0
    decoder: str = ""
    decoder_note: str = ""
    timings: dict[str, float] = field(default_factory=dict)
    audio_note: AudioNote = ""
