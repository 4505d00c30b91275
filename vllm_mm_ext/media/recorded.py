"""Videos that another server has decoded: what it found, without the pixels and the samples.

A *record* says everything about a sampled video that its prompt and its report need: the frames'
number, size, times and digests, the length of the sound, and how its segments came out. A server
that reads a record needs neither the frames nor the sound, as long as it gets the encoder outputs
of all segments as well.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Self

import msgspec
import numpy as np
import numpy.typing as npt

from vllm_mm_ext.config.options import Reduction
from vllm_mm_ext.media.decode.wire import packed, unpacked
from vllm_mm_ext.media.decode.wire_checks import (
    MalformedMessageError,
    check_frames,
    check_info,
    check_sound,
    require,
)
from vllm_mm_ext.media.payload import SampledFrames, Waveform, reduced_digest
from vllm_mm_ext.media.types import (
    AudioNote,
    DecodeLimits,
    DecodeRequest,
    FrameSelection,
    MediaInfo,
)

_DIGEST_BYTES = 32
# Characters of the digest of a sound.
_MAX_NAME = 256


class RecordError(Exception):
    """A record does not fit what this server would make of the video: it is decoded instead."""


class Delivered(msgspec.Struct, frozen=True):
    """What a decode found, beside frames and sound.

    Attributes:
        info: What the container says.
        selection: The frames delivered.
        audio_note: What became of the sound, if it is wanted and not there as a whole.
        limits: ``limits_key`` of the server that decoded.
    """

    info: MediaInfo
    selection: FrameSelection
    audio_note: AudioNote
    limits: str


def limits_key(limits: DecodeLimits) -> str:
    """What of a server's limits decides what comes of a decode: not its time and its memory."""
    return repr(replace(limits, timeout_s=0.0, memory_bytes=0))


class RecordedSound(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A sound track without its samples.

    Attributes:
        samples: Their number at the model's rate.
        rate: That rate in Hz.
        digest: Identity of the samples.
    """

    samples: int
    rate: int
    digest: str


class RecordedSegment(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A segment as another server cut it.

    Attributes:
        track: Digest of the segment's piece of the sound; None for silence.
        kept: int64 cells that a static reduction keeps, as bytes; None without one.
        items: By modality, the mm item without what the encoder takes, as the adapters pack it.
    """

    track: str | None
    kept: bytes | None
    items: dict[str, bytes]


class MediaRecord(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A video as another server decoded and split it.

    Attributes:
        shape: Of the frames, ``(n, height, width, 3)``.
        step, pinned: As in ``SampledFrames``.
        delivered: What the decode found.
        frames: BLAKE3 of each frame, 32 bytes each.
        sound: The sound track; None for a silent video.
        segments: The segments in order.
    """

    shape: tuple[int, int, int, int]
    step: float | None
    pinned: bool
    delivered: Delivered
    frames: bytes
    sound: RecordedSound | None
    segments: tuple[RecordedSegment, ...]

    @classmethod
    def of(cls, frames: SampledFrames, segments: Sequence[RecordedSegment]) -> Self:
        """The record of a video.

        Args:
            frames: As the front-end delivered them, with what the decode found in the memo.
            segments: What became of them.
        """
        delivered: Delivered = frames.memo[DELIVERED]
        count, height, width, channels = frames.shape
        sound = frames.audio
        return cls(
            (count, height, width, channels),
            frames.step,
            frames.pinned,
            delivered,
            b"".join(frames.frame_digests()),
            None
            if sound is None
            else RecordedSound(len(sound), sound.rate or 0, str(sound.digest)),
            tuple(segments),
        )


DELIVERED = "delivered"
"""Where the memo of frames holds the ``Delivered``; only of media that may be kept."""


def pack(record: MediaRecord) -> bytes:
    """The bytes of a record."""
    return packed(record)


def unpack(data: bytes, request: DecodeRequest) -> MediaRecord:
    """A record from its bytes, held against the same limits as what a decode worker returns.

    Args:
        data: As ``pack`` made them.
        request: What a worker of this server would be asked.

    Raises:
        RecordError: They are no record, or not one of an answer to the request.
    """
    try:
        record = unpacked(data, MediaRecord)
        found = record.delivered
        # What a server with wider limits has decoded is nothing to one that would refuse the video.
        require(found.limits == limits_key(request.limits), "result within these limits")
        check_info(found.info)
        require(found.info.packets is None and found.info.video is not None, "description")
        check_frames(record.shape, found.selection, found.info, request)
        sound = record.sound
        samples, rate = (None, 0) if sound is None else (sound.samples, sound.rate)
        check_sound(samples, rate, request)
        require(len(record.frames) == _DIGEST_BYTES * record.shape[0], "number of digests")
        require(sound is None or len(sound.digest) <= _MAX_NAME, "digest of the sound")
    except (msgspec.MsgspecError, MalformedMessageError, RecursionError) as error:
        raise RecordError(f"not a record of this video: {error}") from error
    return record


class RecordedFrames(SampledFrames):
    """Frames that another server has: they have their shape and no pixels (all are 0).

    Attributes:
        record: What is known of them; None on an array derived from them.
    """

    record: MediaRecord | None

    @classmethod
    def of_record(cls, record: MediaRecord, digest: str, reduction: Reduction) -> Self:
        """Frames and sound that take no memory.

        Args:
            record: What is known of them.
            digest: Of the frames without a reduction, as the decode would name them.
            reduction: As in ``SampledFrames``.
        """
        sound = record.sound
        self = cls(
            np.broadcast_to(np.zeros((), np.uint8), record.shape),
            digest=reduced_digest(digest, reduction),
            times=tuple(float(time) for time in record.delivered.selection.times),
            audio=None
            if sound is None
            else Waveform(
                np.broadcast_to(np.zeros((), np.float32), sound.samples),
                digest=sound.digest,
                rate=sound.rate,
            ),
            step=record.step,
            reduction=reduction,
            pinned=record.pinned,
        )
        self.record = record
        size = _DIGEST_BYTES
        digests = record.frames
        self.memo["frame_digests"] = tuple(
            digests[at : at + size] for at in range(0, len(digests), size)
        )
        return self

    def __array_finalize__(self, obj: object) -> None:
        super().__array_finalize__(obj)
        self.record = None

    def reduced(self, reduction: Reduction) -> SampledFrames:
        """The same frames: a record is one of a reduction."""
        assert reduction == self.reduction
        return self


def piece_of(track: str | None, frames: SampledFrames) -> Waveform | None:
    """A segment's piece of a recorded sound: its digest and rate.

    Args:
        track: Digest of the piece; None for silence.
        frames: The recorded frames.
    """
    if track is None or frames.audio is None:
        return None
    return Waveform(np.zeros(1, np.float32), digest=track, rate=frames.audio.rate or 0)


def cells(kept: bytes | None) -> npt.NDArray[np.int64] | None:
    """The cells that a recorded segment keeps.

    Raises:
        RecordError: They are no cells.
    """
    if kept is None:
        return None
    if len(kept) % 8:
        raise RecordError("cells that a segment keeps are cut off")
    found: npt.NDArray[np.int64] = np.frombuffer(kept, np.int64)
    return found


def record_of(frames: Any) -> MediaRecord | None:
    """The record of frames that another server has; None for frames that are here."""
    return frames.record if isinstance(frames, RecordedFrames) else None
