"""The audio track of a media file as a mono waveform at its own rate."""

from __future__ import annotations

import av
import numpy as np
import numpy.typing as npt
from av.audio.frame import AudioFrame

from vllm_mm_ext.errors import MediaTooLargeError, MediaTooLongError, UnreadableMediaError
from vllm_mm_ext.media.decode.container import open_container
from vllm_mm_ext.media.types import AudioStream, DecodeLimits

# The highest rate of sampled sound in use (DXD is half of it). A header may claim any.
MAX_SAMPLE_RATE = 768_000
# Of one float32 sample, as which every format is delivered.
_SAMPLE_BYTES = 4
# Beyond any headroom: 120 dB above full scale.
_MAX_AMPLITUDE = 1e6
# Full scale of FFmpeg's integer sample formats (planar ones end in "p").
_FULL_SCALE = {"s16": 2.0**15, "s32": 2.0**31, "s64": 2.0**63}


def check_audio(stream: AudioStream, limits: DecodeLimits) -> None:
    """Refuse a track, before it is decoded, whose header says that it is past a limit.

    Raises:
        MediaTooLongError: It is longer than ``limits.max_audio_s``, and ``truncate_audio`` is off.
        MediaTooLargeError: Its sampling rate is past ``MAX_SAMPLE_RATE``, or it decodes to more
            than ``limits.max_audio_bytes``.
    """
    _checked_rate(stream.sample_rate)
    # Half a second of grace: headers count encoder padding.
    seconds = max(stream.duration - 0.5, 0.0)
    if not limits.truncate_audio:
        _check_length(seconds, limits)
    samples = int(min(seconds, limits.max_audio_s) * stream.sample_rate)
    _check_bytes(samples * stream.channels * _SAMPLE_BYTES, limits)


def decode_audio(
    path: str, stream: AudioStream, limits: DecodeLimits
) -> tuple[npt.NDArray[np.float32], int]:
    """Decode one audio stream.

    Encoder delay and padding are trimmed as FFmpeg does (skip-samples data, edit lists).
    Broken packets are left out.

    Args:
        path: The file.
        stream: Its audio stream, from ``probe``.
        limits: ``max_audio_s`` with ``truncate_audio``, ``max_audio_bytes`` and
            ``max_output_bytes`` apply.

    Returns:
        float32 ``[samples]`` in -1..1, the mean of the channels, and Hz.

    Raises:
        MediaTooLongError, MediaTooLargeError: Past a limit.
        UnreadableMediaError: The sample rate changes midway.
    """
    chunks: list[npt.NDArray[np.float32]] = []
    total, decoded_bytes, rate = 0, 0, stream.sample_rate
    with open_container(path, max_pixels=limits.max_pixels) as container:
        source = container.streams[stream.index]
        context = source.codec_context
        draining = False
        packets = iter(container.demux(source))
        while not draining:
            try:
                packet = next(packets, None)
            except av.FFmpegError:
                packet = None
            draining = packet is None or packet.size == 0
            try:
                frames: list[AudioFrame] = list(context.decode(None if draining else packet))  # type: ignore[attr-defined]
            except av.FFmpegError as error:
                if isinstance(error, MemoryError):
                    raise
                continue
            for frame in frames:
                if chunks and frame.sample_rate != rate:
                    raise UnreadableMediaError(
                        f"The audio changes from {rate} Hz to {frame.sample_rate} Hz midway.",
                        parameter="input_audio",
                    )
                # Headers of HE-AAC give half the rate that is really played.
                rate = _checked_rate(frame.sample_rate)
                chunks.append(_mono(frame))
                total += len(chunks[-1])
                decoded_bytes += len(chunks[-1]) * frame.layout.nb_channels * _SAMPLE_BYTES
            if total * _SAMPLE_BYTES > limits.max_output_bytes:
                raise MediaTooLargeError(
                    f"The audio decodes to more than the limit of {limits.max_output_bytes} bytes.",
                    parameter="input_audio",
                )
            if total > limits.max_audio_s * rate:
                if not limits.truncate_audio:
                    _check_length(total / rate, limits)
                break
            _check_bytes(decoded_bytes, limits)
    samples = np.concatenate(chunks) if chunks else np.empty(0, np.float32)
    return samples[: int(limits.max_audio_s * rate)], rate


def _checked_rate(rate: int) -> int:
    if rate > MAX_SAMPLE_RATE:
        raise MediaTooLargeError(
            f"The audio has {rate} samples a second, past the limit of {MAX_SAMPLE_RATE}.",
            parameter="input_audio",
            value=rate,
        )
    return rate


def _mono(frame: AudioFrame) -> npt.NDArray[np.float32]:
    name = frame.format.name
    data = frame.to_ndarray()
    if not frame.format.is_planar:
        data = data.reshape(-1, frame.layout.nb_channels).T
    else:
        name = name[:-1]
    if name == "u8":
        scaled = (data.astype(np.float32) - 128.0) / 128.0
    elif name in _FULL_SCALE:
        scaled = (data / _FULL_SCALE[name]).astype(np.float32)
    else:
        # Floats in a file may be anything. What is not finite, or so large that its power would not
        # be, makes the model's features NaN, and attention kernels can carry NaN to others.
        scaled = np.nan_to_num(data.astype(np.float32), nan=0.0, posinf=0.0, neginf=0.0)
        scaled = np.clip(scaled, -_MAX_AMPLITUDE, _MAX_AMPLITUDE, out=scaled)
    return np.asarray(scaled.mean(axis=0) if len(scaled) > 1 else scaled[0], np.float32)


def _check_bytes(num_bytes: int, limits: DecodeLimits) -> None:
    if limits.max_audio_bytes is not None and num_bytes > limits.max_audio_bytes:
        raise MediaTooLargeError(
            f"The audio decodes to at least {num_bytes} bytes of samples in all its channels, past "
            f"the limit of {limits.max_audio_bytes} bytes (VLLM_MAX_AUDIO_DECODE_BYTES).",
            parameter="input_audio",
            value=num_bytes,
        )


def _check_length(seconds: float, limits: DecodeLimits) -> None:
    if seconds > limits.max_audio_s:
        raise MediaTooLongError(
            f"The audio lasts {seconds:.1f} s, past the limit of {limits.max_audio_s:g} s.",
            parameter="input_audio",
            value=round(seconds, 3),
        )
