"""What the front-end delivers of media: sampled videos and waveforms."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from blake3 import blake3

from vllm_mm_ext.media.audio import waveforms as audio_ops
from vllm_mm_ext.media.fetch.byte_lease import Lease
from vllm_mm_ext.media.payload import SampledFrames, Waveform
from vllm_mm_ext.media.types import AudioNote, FrameSelection, MediaInfo

# Of one log-mel frame of a track, which the processor keeps with the frames: float32, the 128 bins
# of Whisper large-v3's front end, which the omni families share.
_MEL_FRAME_BYTES = 128 * 4


@dataclass(frozen=True, eq=False)
class VideoResult:
    """A sampled video.

    Attributes:
        frames: Pixels with their digest, exact times and sound.
        info: Probe of the container.
        selection: The frames delivered.
        stages: Seconds per stage of the work done for this result.
        cached: True when nothing was decoded for the caller.
        lease: Of frames and sound, on the media budget.
        audio_note: What became of the sound, if it is wanted and not there as a whole.
        source: Digest of the file that the video was decoded from.
    """

    frames: SampledFrames
    info: MediaInfo
    selection: FrameSelection
    stages: dict[str, float]
    cached: bool
    lease: Lease | None = None
    audio_note: AudioNote = ""
    source: str = ""

    @property
    def codec(self) -> str:
        """FFmpeg's name of the codec of the frames."""
        return self.info.video.codec if self.info.video else ""

    @property
    def nbytes(self) -> int:
        """Bytes the cache accounts for this entry, with the log-mel frames its track will get."""
        audio = self.frames.audio
        if audio is None:
            return int(self.frames.nbytes)
        mel = audio_ops.padded_length(len(audio)) // audio_ops.HOP * _MEL_FRAME_BYTES
        return int(self.frames.nbytes + audio.nbytes + mel)


@dataclass(frozen=True, eq=False)
class AudioResult:
    """A waveform at the model's rate, with its lease on the media budget.

    Attributes:
        waveform: The samples with their digest.
        stages: Seconds per stage of the work done for this result.
        cached: True when nothing was decoded for the caller.
        source: Digest of the file that the sound was decoded from.
        codec: FFmpeg's name of the codec.
    """

    waveform: Waveform
    stages: dict[str, float]
    cached: bool
    lease: Lease | None = None
    source: str = ""
    codec: str = ""

    @property
    def nbytes(self) -> int:
        """Bytes the cache accounts for this entry."""
        return int(self.waveform.nbytes)


def window_digest(frames: SampledFrames, info: MediaInfo, selection: FrameSelection) -> str:
    """Digest of what a model is shown of a span of a video, whatever the file around the span.

    Args:
        frames: The frames of the span, with its sound.
        info: Of the span.
        selection: The frames delivered.
    """
    video = info.video
    assert video is not None
    hasher = blake3(b"window")
    # Models are told numbers of frames and the rate by which these become seconds.
    told = (
        video.num_frames,
        f"{video.fps:.9g}",
        f"{video.duration:.9f}",
        selection.indices.tolist(),
    )
    times = None if frames.times is None else [f"{time:.9f}" for time in frames.times]
    for part in (frames.shape, frames.pinned, frames.step, times, told):
        hasher.update(repr(part).encode() + b"\0")
    for frame in frames.frame_digests():
        hasher.update(frame)
    sound = frames.audio
    if sound is not None:
        hasher.update(f"{sound.rate}|{sound.digest}".encode())
    return str(hasher.hexdigest())


def memory_of(waveform: Waveform) -> np.ndarray[Any, Any]:
    """The samples of a waveform, which is a view of them as are its own views."""
    assert waveform.base is not None
    return waveform.base


def key_of(kind: Literal["video", "audio", "track"], *parts: str) -> str:
    """Name of what comes of a decode, from all that decides it."""
    hasher = blake3(kind.encode())
    for part in parts:
        hasher.update(len(part).to_bytes(8, "little"))
        hasher.update(part.encode())
    return str(hasher.hexdigest())
