"""The audio track of a media file as a mono waveform at its own rate, on the picture's clock."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from av.audio.frame import AudioFrame

from vllm_mm_ext.errors import MediaTooLargeError, MediaTooLongError, UnreadableMediaError
from vllm_mm_ext.media.audio.audio_decoder import decoded_frames
from vllm_mm_ext.media.audio.conversion import Packer
from vllm_mm_ext.media.audio.downmix import to_mono
from vllm_mm_ext.media.audio.sound_placement import Clock, FileOrder, Piece, place
from vllm_mm_ext.media.audio.sound_reader import SoundReader
from vllm_mm_ext.media.decode.container import NO_INDEX, TIMES_RESTART
from vllm_mm_ext.media.types import AudioNote, AudioStream, DecodeLimits

# The highest rate of sampled sound in use (DXD is half of it). A header may claim any.
MAX_SAMPLE_RATE = 768_000
# One window of the log-mel transform that all families begin with. From less, Qwen2.5-Omni makes no
# token, and Qwen3-Omni's audio encoder fails.
MIN_AUDIO_S = 0.025
# Of one float32 sample, as which every format is delivered.
_SAMPLE_BYTES = 4
# Sound decoded beyond the end, in seconds, before decoding stops. Where recordings were joined, it
# may overlap: all is decoded that is twice as long as the picture.
_SLACK_S = 1.0
# Decoding stops after so many frames in a row that lie past the end. One timestamp may be wrong.
_PAST_THE_END = 16
# More sound than this, in seconds, before the first picture or after the last is worth a note.
_MISSED_S = 1.0
# Samples of each channel that are mixed at a time. Most frames have a thousand: on its own, each
# costs 35 us, more than its decoding.
_SAMPLES_AT_A_TIME = 1 << 16


@dataclass(frozen=True, eq=False)
class Track:
    """Decoded sound.

    Attributes:
        samples: float32 mono ``[samples]`` in -1..1 from second 0 of the clock on.
        rate: Sampling rate in Hz.
        note: What became of the sound; empty if all of it is there.
    """

    samples: npt.NDArray[np.float32]
    rate: int
    note: AudioNote = ""


def check_audio(stream: AudioStream, limits: DecodeLimits) -> None:
    """Refuse a track, before it is decoded, whose header says that it is past a limit.

    A duration that is only an estimate refuses nothing.

    Raises:
        MediaTooLongError: It is longer than ``limits.max_audio_s``, and ``truncate_audio`` is off.
        MediaTooLargeError: Its sampling rate is past ``MAX_SAMPLE_RATE``, or it decodes to more
            than ``limits.max_audio_bytes``.
    """
    _checked_rate(stream.sample_rate)
    if stream.estimated:
        return
    # Half a second of grace: headers count encoder padding.
    seconds = max(stream.duration - 0.5, 0.0)
    if seconds > limits.max_audio_s and not limits.truncate_audio:
        raise _too_long(f"The audio lasts {stream.duration:.1f} s", stream.duration, limits)
    samples = int(min(seconds, limits.max_audio_s) * stream.sample_rate)
    _check_bytes(samples * stream.channels * _SAMPLE_BYTES, limits)


def decode_audio(
    path: str,
    stream: AudioStream,
    limits: DecodeLimits,
    *,
    origins: Sequence[float] = (),
    beside: Callable[[], FileOrder] | None = None,
    end: float | None = None,
    begin: float | None = None,
    is_part: bool = False,
    reader: SoundReader | None = None,
) -> Track:
    """Decode one audio stream and place its samples by their timestamps.

    Encoder delay and padding are trimmed as FFmpeg does (skip-samples data, edit lists). Where
    there is no sound, and where packets are broken or lost, there is silence. Parts of another
    sampling rate are resampled to that of most of the sound.

    Args:
        path: The file.
        stream: Its audio stream, from ``probe``.
        limits: ``max_audio_s`` with ``truncate_audio``, ``max_audio_bytes`` and
            ``max_output_bytes`` apply.
        origins: For the sound of a video, seconds on the container's clock at which the picture
            starts, as ``sound_placement.Clock`` takes them; none lets the clock start with the
            sound.
        beside: As ``sound_placement.Clock`` takes it.
        end: Seconds from there at which the picture ends, for the sound of a video, which is cut
            at each limit instead of being refused.
        begin: Seconds on the container's clock before which no sound is needed, for a part of a
            video's sound: the decoder begins a little earlier. None to begin with the stream.
        is_part: The picture is a part of a video, before and after which sound is expected.
        reader: The stream in a file that stays open; None to open ``path``.

    Raises:
        MediaTooLongError, MediaTooLargeError: Past a limit.
        UnreadableMediaError: Nothing can be decoded, or less than ``MIN_AUDIO_S``; for the sound of
            a video the result has no samples then.
    """
    of_video = end is not None
    last = limits.max_audio_s if end is None else min(end, limits.max_audio_s)
    mixer = _Mixer()
    kept_s, kept, decoded_bytes, past, any_sound = 0.0, 0, 0, 0, False
    early = late = 0.0  # seconds before the picture, and in a row after it
    cut = False
    opened = reader or SoundReader(path, stream.number, limits.max_pixels)
    with opened if reader is None else nullcontext():
        packets = opened.packets(begin)
        container, source = opened.container, opened.source
        restarts, joins = (
            bool(container.format.flags & flag) for flag in (TIMES_RESTART, NO_INDEX)
        )
        clock = Clock(origins, restarts, beside, joins=joins)
        time_base = float(source.time_base or 0)
        for frame in decoded_frames(container, opened.decoder, packets):
            # Headers of HE-AAC give half the rate that is really played.
            rate = _checked_rate(frame.sample_rate)
            seconds = frame.samples / rate
            stamp = None if frame.pts is None or not time_base else frame.pts * time_base
            time = clock.time(stamp, seconds)
            any_sound = True
            if time is not None and time + seconds <= 0:
                early += seconds
                continue
            is_late = time is not None and time >= last
            past, late = (past + 1, late + seconds) if is_late else (0, 0.0)
            if (past > _PAST_THE_END and late > _MISSED_S) or kept_s > 2 * last + _SLACK_S:
                break
            kept_s += seconds
            kept += frame.samples * _SAMPLE_BYTES
            decoded_bytes += frame.samples * frame.layout.nb_channels * _SAMPLE_BYTES
            try:
                _check_output(kept, limits)
                _check_bytes(decoded_bytes, limits)
            except MediaTooLargeError:
                if not of_video:
                    raise
                cut = True
                break
            mixer.add(frame, rate, time)
    samples, rate, beyond = place(mixer.pieces(), last, limits.max_output_bytes // _SAMPLE_BYTES)
    beyond = beyond and last == limits.max_audio_s
    if beyond and not of_video and not limits.truncate_audio:
        raise _too_long(f"The audio lasts more than {limits.max_audio_s:g} s", None, limits)
    missed = of_video and not is_part and early + late > _MISSED_S
    note: AudioNote = "cut" if cut or beyond else "outside" if missed else ""
    if len(samples) < MIN_AUDIO_S * rate or not rate:
        # Of a part, nothing is decoded where the sound has ended before.
        none: AudioNote = "outside" if any_sound or begin is not None else "unreadable"
        note = "too_short" if len(samples) else none
        if not of_video:
            raise UnreadableMediaError(
                f"The audio lasts {1e3 * len(samples) / rate:.3g} ms, too little to hear anything: "
                f"models need {1e3 * MIN_AUDIO_S:g} ms."
                if len(samples)
                else "The audio stream holds no readable samples.",
                parameter="input_audio",
            )
        samples = samples[:0]
    return Track(samples, rate, note)


class _Mixer:
    """Makes pieces of decoded frames, many frames at a time."""

    def __init__(self) -> None:
        self._pieces: list[Piece] = []
        self._packer = Packer()
        self._kind: tuple[str, str, int] | None = None
        self._frames: list[AudioFrame] = []
        self._times: list[float | None] = []
        self._left = 0

    def add(self, frame: AudioFrame, rate: int, time: float | None) -> None:
        """Add a frame of a sampling rate, at a time of the target clock."""
        frame = self._packer.readable(frame)
        kind = frame.format.name, frame.layout.name, rate
        if kind != self._kind or self._left <= 0:
            self._mix()
            self._kind, self._left = kind, _SAMPLES_AT_A_TIME
        self._frames.append(frame)
        self._times.append(time)
        self._left -= frame.samples

    def pieces(self) -> list[Piece]:
        """Everything that was added."""
        self._mix()
        return self._pieces

    def _mix(self) -> None:
        frames, self._frames = self._frames, []
        times, self._times = self._times, []
        if frames:
            assert self._kind is not None
            rate = self._kind[2]
            parts = zip(to_mono(frames), times, strict=True)
            self._pieces += [Piece(samples, rate, time) for samples, time in parts]


def _checked_rate(rate: int) -> int:
    if not 0 < rate <= MAX_SAMPLE_RATE:
        raise MediaTooLargeError(
            f"The audio has {rate} samples a second, past the limit of {MAX_SAMPLE_RATE}.",
            parameter="input_audio",
            value=rate,
        )
    return rate


def _check_output(num_bytes: int, limits: DecodeLimits) -> None:
    if num_bytes > limits.max_output_bytes:
        raise MediaTooLargeError(
            f"The audio decodes to more than the limit of {limits.max_output_bytes} bytes.",
            parameter="input_audio",
        )


def _check_bytes(num_bytes: int, limits: DecodeLimits) -> None:
    if limits.max_audio_bytes is not None and num_bytes > limits.max_audio_bytes:
        raise MediaTooLargeError(
            f"The audio decodes to at least {num_bytes} bytes of samples in all its channels, past "
            f"the limit of {limits.max_audio_bytes} bytes (VLLM_MAX_AUDIO_DECODE_BYTES).",
            parameter="input_audio",
            value=num_bytes,
        )


def _too_long(what: str, seconds: float | None, limits: DecodeLimits) -> MediaTooLongError:
    return MediaTooLongError(
        f"{what}, past the limit of {limits.max_audio_s:g} s.",
        parameter="input_audio",
        value=None if seconds is None else round(seconds, 3),
    )
